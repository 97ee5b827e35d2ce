"""The main text of an HTML page: what a reader came for, as plain text, without the page around it.

    text, title = extract(html)

One walk over the tree (`selectolax`, on the Lexbor parser) cuts the page into blocks: paragraphs, headings, list items,
table rows, code. Elements that say what they are (`nav`, `role="banner"`, `class="cookie-notice"`) are not entered,
unless most of the page's text is in them. Then density decides, as in Kohlschütter et al. (2010): blocks whose text is
mostly links are boilerplate, long ones are text, and as in jusText (Pomikálek, 2011) short ones follow the blocks
around them. The smallest element that holds nearly all that is certainly text is the page's body; the rest is dropped.

Nothing depends on spaces: a length is counted in words, a Chinese character for 3/5 of one, and a sentence ends with
the marks of either script.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from fledge.data.texts import UNSPACED
from fledge.records.raw.markup import parse

_TITLES = ("h1", "h2", "h3", "h4", "h5", "h6")
_BLOCKS = frozenset(
    (*_TITLES, "html", "body", "main", "article", "section", "div", "p", "ul", "ol", "li", "dl", "dt", "dd", "table",
     "thead", "tbody", "tfoot", "tr", "td", "th", "caption", "pre", "blockquote", "figure", "figcaption", "header",
     "details", "summary", "fieldset", "form", "center", "address", "hgroup", "search")
)  # fmt: skip
_NEVER = (
    "script", "style", "noscript", "template", "svg", "iframe", "canvas", "object", "embed", "button", "select",
    "option", "input", "textarea", "dialog", "nav", "aside", "footer", "menu", "audio", "video", "map", "link",
)  # fmt: skip
_INLINE = frozenset(["b", "i", "em", "strong", "code", "tt", "kbd", "samp", "var", "cite", "u", "font"])
_ROLES = frozenset(
    ["navigation", "banner", "search", "complementary", "contentinfo", "dialog", "alert", "menu", "tablist"]
)
_ASIDE = re.compile(
    r"(?:^|[\s_-])(?:nav|navi|navbar|navigation|navheader|navfooter|menu|menubar|sidebar|sidenav|breadcrumbs?|crumbs?"
    r"|footer|foot|cookies?|consent|gdpr|banner|masthead|advert|adverts|advertisement|ads?|adsense|sponsor|sponsored"
    r"|promo|related|recommended|recommendations?|share|sharing|sharebar|social|comments?|commentlist|disqus|respond"
    r"|replies|newsletter|subscribe|subscription|signup|login|popup|modal|overlay|paging|pagination|pager|toc|tags"
    r"|taglist|tagcloud|widgets?|copyright|skip|skiplink|sphinxsidebar\w*|headerlink|hidden|sr|screenreader|toolbar"
    r"|byline|bio|prevnext|permalink|rating|hotnews|tuijian|pinglun|fenxiang|daohang|banquan)(?:$|[\s_-])"
)
_HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden")
_WIDE = re.compile(f"[{UNSPACED}]")
_DIGITS = re.compile(r"\d+")
_BREAK = "\v"  # where a <br> stood
_SENTENCE_END = re.compile("[.!?:;…。！？：；][\"'”’）)」』]*$")
_MARKS = re.compile(r"[,;.!?](?=\s|$)|[，；。！？、：]")
_LEGAL = re.compile(
    r"©|\(c\)\s*\d{4}|all rights reserved|privacy policy|terms of (?:use|service)|cookies?\b.{0,60}\b(?:accept|agree|"
    r"consent|use)|(?:we|site) uses? cookies|版权所有|保留所有权利|[京沪粤浙苏鲁川渝津闽鄂湘]ICP[备证]|公网安备|"
    r"隐私政策|(?:使用|服务)条款|(?:使用|接受).{0,8}\s?[Cc]ookie",
    re.IGNORECASE,
)

_ROWS = 3  # of a table that is one; fewer are a page laid out
MAX_NESTING = 200
"""Elements deeper than this are left out: pages that nest on purpose."""


@dataclass(slots=True)
class Block:
    """A paragraph, heading, list item, table row or piece of code, and where it stands."""

    kind: str  # p, h, li, tr, pre
    text: str
    linked: int  # characters inside links
    parent: int  # number of the element that holds it
    group: int  # number of the list or table it belongs to; 0: none
    level: int = 0  # of a heading
    words: float = 0.0
    good: bool = False

    @property
    def link_density(self) -> float:
        return self.linked / max(1, len(self.text))


@dataclass(slots=True)
class _Walk:
    """What the walk over the tree has found so far."""

    total: int  # characters of text on the page
    blocks: list[Block] = field(default_factory=list)
    parents: list[int] = field(default_factory=lambda: [0])  # element → the element around it; 0: the page
    parts: list[str] = field(default_factory=list)  # of the block being read
    linked: int = 0


def extract(html: str) -> tuple[str, str]:
    """(main text, title) of a page; each is "" where there is none."""
    page = parse(html)
    if page.body is None:
        return "", ""
    title = _title(page)
    page.strip_tags(list(_NEVER))
    body = page.body
    walk = _Walk(len(body.text()))
    _enter(walk, body, 0, 0, "p", 0)
    _close(walk, 0, 0, "p")
    return _written(_kept(_main(walk))), title


def words_of(text: str) -> float:
    """The length of a text in words; three fifths for a character of a script without spaces."""
    wide = 0 if text.isascii() else len(_WIDE.findall(text))
    return text.count(" ") + (wide < len(text)) + 0.6 * wide if text else 0.0


def _line(text: str) -> str:
    return " ".join(text.split())


def _title(page: Any) -> str:
    """What the page calls itself: the longest heading that its title repeats, else the title, else the first one."""
    named = page.css_first('meta[property="og:title"]')
    if named is not None and (content := (named.attributes.get("content") or "").strip()):
        return _line(content)
    node = page.css_first("title")
    title = _line(node.text()) if node is not None else ""
    heads = [_line(head.text()).strip(" ¶") for head in page.css("h1,h2")]
    return max((head for head in heads if head and head in title), key=len, default=title or next(iter(heads), ""))


def _enter(walk: _Walk, node: Any, parent: int, group: int, kind: str, depth: int, link: bool = False) -> None:
    """Read the children of an element. `parent` is the number of the block element around, `group` of the list or
    table, `kind` what text directly inside is."""
    parts, child = walk.parts, node.child
    while child is not None:
        tag = child.tag
        if tag == "-text":
            text = child.text_content or ""
            parts.append(text)
            if link:
                walk.linked += len(text.strip())
        elif tag == "br":
            parts.append(_BREAK)
        elif tag[0] not in "-!" and depth < MAX_NESTING and (tag in _INLINE or not _aside(walk, child, tag)):
            if tag not in _BLOCKS and tag != "hr":
                _enter(walk, child, parent, group, kind, depth + 1, link or tag == "a")
            elif kind == "tr":  # a cell is one piece
                parts.append(" ")
                _enter(walk, child, parent, group, kind, depth + 1, link)
                parts.append(" ")
            elif tag == "hr":
                _close(walk, parent, group, kind)
            else:
                _block(walk, child, tag, parent, group, kind, depth)
        child = child.next


def _block(walk: _Walk, node: Any, tag: str, parent: int, group: int, kind: str, depth: int) -> None:
    """Read an element that stands on lines of its own."""
    _close(walk, parent, group, kind)
    walk.parents.append(parent)
    number = len(walk.parents) - 1
    if tag == "tr":
        _row(walk, node, number, group, depth)
        return
    if tag in ("ul", "ol", "table"):
        group = number
    inside = "pre" if tag == "pre" else "h" if tag in _TITLES else "li" if tag in ("li", "dt", "dd") else kind
    if kind in ("pre", "li") and inside == "p":
        inside = kind
    _enter(walk, node, number, group, inside, depth + 1)
    _close(walk, number, group, inside, int(tag[1]) if tag in _TITLES else 0)


def _row(walk: _Walk, row: Any, number: int, group: int, depth: int) -> None:
    """A row of a table on one line; a row of a page that is laid out with tables cell by cell."""
    cells = [cell for cell in row.iter() if cell.tag in ("td", "th")]
    if any(map(_is_layout, cells)):
        for cell in cells:
            walk.parents.append(number)
            at = len(walk.parents) - 1
            _enter(walk, cell, at, 0, "p", depth + 1)
            _close(walk, at, 0, "p")
        return
    texts = []
    for cell in cells:
        _enter(walk, cell, number, group, "tr", depth + 1)
        texts.append(" ".join("".join(walk.parts).split()))
        walk.parts.clear()
    walk.parts.append(" | ".join(texts) if any(texts) else "")
    _close(walk, number, group, "tr")


def _is_layout(cell: Any) -> bool:
    """Whether a cell holds a part of the page rather than a value."""
    if cell.css_first("table,pre,h1,h2,h3,h4") is not None or len(cell.css("p,div,li")) > 3:
        return True
    return len(cell.text()) > 600


def _close(walk: _Walk, parent: int, group: int, kind: str, level: int = 0) -> None:
    """What has been read is a block, or several where two line breaks stand between."""
    if not walk.parts:
        return
    text, linked = "".join(walk.parts), walk.linked
    walk.parts.clear()
    walk.linked = 0
    if kind == "pre":
        text = text.replace(_BREAK, "\n").strip("\n").rstrip()
        pieces = [text] if text.strip() else []
    elif _BREAK in text:
        lines = "\n".join(" ".join(line.split()) for line in text.split(_BREAK))
        pieces = [piece.strip() for piece in lines.split("\n\n") if piece.strip()]
    else:
        text = " ".join(text.split())
        pieces = [text] if text else []
    whole = sum(map(len, pieces))
    for piece in pieces:
        share = linked if len(pieces) == 1 else linked * len(piece) // whole
        walk.blocks.append(Block(kind, piece, share, parent, group, level, words_of(piece)))


def _aside(walk: _Walk, node: Any, tag: str) -> bool:
    """Whether an element says that it is not the text of the page, and does not hold most of it."""
    said = node.attributes
    if not said:
        return tag == "header" and node.css_first("h1") is None and not _holds_most(walk, node)
    style = said.get("style")
    if "hidden" in said or said.get("aria-hidden") == "true" or (style and _HIDDEN.search(style)):
        return not _holds_most(walk, node)  # pages that a script unveils are hidden whole
    named = said.get("class") or "", said.get("id") or ""
    if (
        said.get("role") in _ROLES
        or (tag == "header" and node.css_first("h1") is None)
        or (tag not in ("body", "main", "article") and (_names_aside(named[0]) or _names_aside(named[1])))
    ):
        return not _holds_most(walk, node)
    return False


@lru_cache(maxsize=2**14)
def _names_aside(name: str) -> bool:
    """Whether a class or id is one of something beside the text; they repeat by the thousand."""
    return len(name) > 1 and _ASIDE.search(name.lower()) is not None


def _holds_most(walk: _Walk, node: Any) -> bool:
    return 2 * len(node.text()) > walk.total


def _main(walk: _Walk) -> list[Block]:
    """The blocks inside the smallest element that holds nearly all that is certainly text."""
    weights = [0.0] * len(walk.parents)
    for block in walk.blocks:
        if block.link_density < 1 / 3:
            prose = block.words >= 10 and (block.kind == "pre" or _MARKS.search(block.text) is not None)
            weights[block.parent] += block.words * (1.0 if prose else 0.2)
    for number in range(len(weights) - 1, 0, -1):
        weights[walk.parents[number]] += weights[number]
    inside, enough = 0, 0.85 * weights[0]
    for number in range(1, len(weights)):  # an element comes before those inside it
        if walk.parents[number] == inside and weights[number] >= enough > 0:
            inside = number
    held = [False] * len(weights)
    held[inside] = True
    for number in range(inside + 1, len(weights)):
        held[number] = held[walk.parents[number]]
    return [block for block in walk.blocks if held[block.parent]]


def _kept(blocks: list[Block]) -> list[Block]:
    """Blocks that are text by themselves, and the short ones and headings that belong to them."""
    lists: dict[int, list[Block]] = {}
    for block in blocks:
        if block.group:
            lists.setdefault(block.group, []).append(block)
    navigation = {number for number, items in lists.items() if _is_navigation(items)}
    furniture = Counter(_DIGITS.sub("0", b.text) for b in blocks if b.kind == "p" and b.words < 8)
    blocks = [
        block
        for block in blocks
        if block.group not in navigation
        and not _is_boilerplate(block)
        and furniture[_DIGITS.sub("0", block.text)] < 3  # the names of buttons, the panes of a forum
    ]
    for block in blocks:
        block.good = (
            block.kind in ("pre", "li")
            or (block.kind == "tr" and len(lists[block.group]) >= _ROWS)
            or (block.kind != "h" and (block.words >= 12 or (block.words >= 3 and _ends(block.text))))
        )
    good = [at for at, block in enumerate(blocks) if block.good]
    if not good:
        return [block for block in blocks if block.words >= 5]
    kept = []
    for at, block in enumerate(blocks[: good[-1] + 1]):
        if block.kind == "h" and not _leads(blocks, at):
            continue
        if block.good or block.kind == "h" or at > good[0]:
            kept.append(block)
    return kept


def _is_navigation(items: list[Block]) -> bool:
    """A list or table of links: most of its text is links and no item says much besides."""
    size = sum(len(item.text) for item in items)
    linked = sum(item.linked for item in items)
    return linked > 0.6 * size and all(item.words * (1 - item.link_density) < 12 for item in items)


def _is_boilerplate(block: Block) -> bool:
    """Mostly links, or the small print of a site."""
    if block.kind == "pre":
        return False
    if block.kind == "h":
        return block.words > 60
    if block.link_density > 0.6 and not (block.words > 25 and block.link_density < 0.8) and not block.group:
        return True
    return block.words < 40 and _LEGAL.search(block.text) is not None


def _ends(text: str) -> bool:
    return _SENTENCE_END.search(text) is not None


def _leads(blocks: list[Block], at: int) -> bool:
    """Whether text follows a heading before another heading of its level or above."""
    level = blocks[at].level
    for block in blocks[at + 1 :]:
        if block.good:
            return True
        if block.kind == "h" and block.level <= level:
            return False
    return False


def _written(blocks: list[Block]) -> str:
    """The blocks as plain text: an empty line between them, none inside a list or a table."""
    parts: list[str] = []
    before: Block | None = None
    for block in blocks:
        if before is not None:
            together = block.group and block.group == before.group and block.kind == before.kind
            parts.append("\n" if together else "\n\n")
        parts.append(f"- {block.text}" if block.kind == "li" and block.group else block.text)
        before = block
    return "".join(parts)


def extract_with_trafilatura(html: str) -> tuple[str, str]:
    """The same by trafilatura (Barbaresi, 2021), set to precision as in FineWeb; but without its removal of repeated
    paragraphs, which depends on the pages that the process saw before."""
    import trafilatura

    text = trafilatura.extract(html, favor_precision=True, include_comments=False)
    return text or "", _title(parse(html))
