"""HTML that is nothing but content (a chapter, a post, an entry of a feed) as plain text. Whole web pages, where the
content has to be found first, are the business of the refinery's step `extract`."""

from __future__ import annotations

import re
from typing import Any

from fledge.core.errors import need

_SKIPPED = frozenset(["script", "style", "head", "template", "noscript", "svg", "math", "iframe", "object"])
_BLOCKS = frozenset(
    [
        "address", "article", "aside", "blockquote", "body", "center", "dd", "details", "div", "dl", "dt", "fieldset",
        "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "html", "li",
        "main", "nav", "ol", "p", "pre", "section", "summary", "table", "tbody", "td", "tfoot", "th", "thead", "tr",
        "ul",
    ]
)  # fmt: skip
_APART = frozenset(["p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table", "ul", "ol", "dl", "figure"])
_PARAGRAPH, _LINE, _KEPT_BREAK, _KEPT_SPACE = "\x1c\x1d\x1e\x1f"
"""While a text is put together: ends of blocks, and the white space of preformatted text."""
_SPACE = re.compile(r"[ \t\r\n\f\x1c-\x1f]+")
_ENDS = re.compile(r"[ \t\n\x1c\x1d]*[\x1c\x1d][ \t\n\x1c\x1d]*")


_ELEMENT = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)")
_ENDLESS = frozenset(  # elements without an end tag, or that often have none
    re.findall(
        r"\w+",
        """
    area base basefont bgsound br col embed frame hr img input keygen link meta param source track wbr p li dt
    dd td th tr thead tbody tfoot option optgroup rt rp html head body path circle rect line polygon use
    """,
    )
)
MOST_OPEN = 1_000


def parse(html: str) -> Any:
    """The page as a tree (a `LexborHTMLParser`). Elements within more than `MOST_OPEN` open ones lose their tags, not
    their text: the time to parse grows with the depth (16 s for 100,000 `<div>`; browsers stop at 512)."""
    return need("selectolax.lexbor", "data").LexborHTMLParser(_shallow(html))


def _shallow(html: str) -> str:
    if html.count("<") <= MOST_OPEN:
        return html
    depth, kept, end = 0, list[str](), 0
    for match in _ELEMENT.finditer(html):
        if match[2].lower() in _ENDLESS:
            continue
        deepest = depth if match[1] else depth + 1
        depth = max(0, depth - 1 if match[1] else depth + 1)
        if deepest > MOST_OPEN and match.start() >= end:
            kept.append(html[end : match.start()])
            end = html.find(">", match.end()) + 1 or len(html)
    return "".join([*kept, html[end:]])


def plain(html: str) -> str:
    """The text of HTML: paragraphs, headings and lists apart by a blank line, other blocks by a line break, list items
    behind a dash, `pre` as it stands between ``` lines."""
    root = parse(html).body
    if root is None:
        return ""
    out: list[str] = []
    _walk(root, out)
    text = _ENDS.sub(lambda found: "\n\n" if _PARAGRAPH in found[0] else "\n", "".join(out))
    text = re.sub(r" *\n *", "\n", re.sub(r" {2,}", " ", text)).strip()
    return text.replace(_KEPT_BREAK, "\n").replace(_KEPT_SPACE, " ")


def _walk(node: Any, out: list[str]) -> None:
    """Append the text below a node. A stack of its own: a page may be nested thousands deep."""
    stack: list[Any] = [node]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            out.append(item)
            continue
        tag = item.tag
        if tag == "-text":
            out.append(_SPACE.sub(" ", item.text_content or ""))
        elif tag == "br":
            out.append("\n")
        elif tag == "pre":
            code = re.sub(r"[\x1c-\x1f]", "", item.text() or "").strip("\n")
            kept = code.replace("\n", _KEPT_BREAK).replace(" ", _KEPT_SPACE)
            out.append(f"{_PARAGRAPH}```{_KEPT_BREAK}{kept}{_KEPT_BREAK}```{_PARAGRAPH}")
        elif tag not in _SKIPPED and not tag.startswith(("-", "_")):
            edge = _PARAGRAPH if tag in _APART else _LINE if tag in _BLOCKS else ""
            out.append(edge + ("- " if tag == "li" else ""))
            stack.append(edge)
            children = []
            child = item.child
            while child is not None:
                children.append(child)
                child = child.next
            stack += reversed(children)
