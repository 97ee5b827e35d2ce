"""What a model writes cannot act in the browser."""

from __future__ import annotations

import pytest

from fledge.studio.markdown import render


def test_markdown_is_rendered() -> None:
    html = render(
        "# Head\n\n**bold** and `code`\n\n1. one\n2. two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```py\nx < 1\n```"
    )
    for part in ("<h1>Head</h1>", "<strong>bold</strong>", "<ol>", "<table>", "<td>2</td>", "x &lt; 1"):
        assert part in html
    assert "<br" in render("one\ntwo")


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "a <b onclick=alert(1)>b</b>",
        "<!-- comment -->",
        "![x](http://elsewhere.example/track.png)",
        "[x](javascript:alert(1))",
        "[x](JaVaScRiPt:alert(1))",
        "[x](data:text/html;base64,PHNjcmlwdD4=)",
        "[x](vbscript:x)",
        "<javascript:alert(1)>",
        '[x](http://a.example "title\' onmouseover=alert(1)")',
        "```<script>\nx\n```",
    ],
)
def test_nothing_that_acts_survives(text: str) -> None:
    html = render(text).lower()
    for tag in ("<script", "<img", "<b ", "<!--"):
        assert tag not in html
    for scheme in ('href="javascript', 'href="data', 'href="vbscript'):
        assert scheme not in html
    assert " onmouseover=" not in html.split('title="')[0]


def test_unfinished_text_renders_at_every_step() -> None:
    text = "Here:\n\n```python\ndef f():\n    return 1\n```\n\n| a |\n|---|\n| 你好 |\n\n**done**"
    for end in range(len(text) + 1):
        assert render(text[:end]).count("<pre>") == render(text[:end]).count("</pre>")
