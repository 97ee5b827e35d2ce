"""What a model writes, as HTML that can do nothing.

Raw HTML shows as the text it is, images are not loaded (an address in an answer must not call home), and only web and
mail addresses become links. The browser sanitizes the result once more.
"""

from __future__ import annotations

from functools import cache

from markdown_it import MarkdownIt


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "breaks": True})
    return parser.enable(["table", "strikethrough"]).disable(["image", "html_block", "html_inline"])


def render(text: str) -> str:
    """The HTML of a Markdown text. A code block that has not ended yet counts as ended."""
    return str(_parser().render(text))
