"""Dumps of MediaWiki (`zhwiki-…-pages-articles.xml.bz2`): a document an article, wikitext taken off.

The dump is read as a stream, a page at a time; a multistream dump in spans, by as many processes as there are.
Redirects and the pages of other namespaces (talk, user, template, …) are counted among the rejected. Templates are left
out with what they would have said; tables, references and files too; the words of links stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fledge.core.errors import need
from fledge.data.sources import Setting
from fledge.data.sources.xml import elements
from fledge.records.kinds import Document, Record

_LINKED = re.compile(
    r"^\s*(?:file|image|category|media|文件|檔案|档案|图像|圖像|分类|分類|ファイル|画像|カテゴリ)\s*:", re.IGNORECASE
)
_NO_TEXT = frozenset(["ref", "gallery", "math", "chem", "score", "timeline", "imagemap", "hiero", "style", "script"])
_VARIANT = re.compile(r"-\{(?:[^{}|]*\|)?([^{}]*)\}-")  # -{zh-cn:软件;zh-tw:軟體}- of the Chinese Wikipedia
_MAGIC = re.compile(r"__[A-Z]{3,}__")
_REDIRECT = re.compile(r"^\s*#\s*(?:redirect|重定向|轉向)", re.IGNORECASE)


def read(file: Path, setting: Setting) -> Iterator[Record]:
    """The articles, with `title`, `url` and `revision` in `meta`; `id` is the page's number."""
    language, base = _site(file, replace(setting, span=None)) if setting.span and setting.span[0] else ("", "")
    for name, element in elements(file, {"base", "page"}, setting, "mediawiki"):
        match name:
            case "":
                language = language or _language(element)
            case "base":
                base = _place(element)
            case _ if (document := _article(element, language, base, setting)) is not None:
                yield document


def _site(file: Path, setting: Setting) -> tuple[str, str]:
    """Language and address, which only the beginning of the dump tells."""
    language = ""
    for name, element in elements(file, {"base", "page"}, setting):
        if name == "page":
            break
        if name == "base":
            return language, _place(element)
        language = _language(element)
    return language, ""


def _language(root: ElementTree.Element) -> str:
    return root.get("{http://www.w3.org/XML/1998/namespace}lang", "")[:2].lower()


def _place(base: ElementTree.Element) -> str:
    return (base.text or "").rpartition("/")[0]


def _article(page: ElementTree.Element, language: str, base: str, setting: Setting) -> Document | None:
    said = {element.tag.rpartition("}")[2]: element for element in page}
    if not {"title", "id"} <= said.keys():
        setting.reject("is not a page", "", ElementTree.tostring(page, "unicode")[:500])
        return None
    title, where = said["title"].text or "", f"page {said['id'].text}"
    revision = {element.tag.rpartition("}")[2]: element for element in said.get("revision", ())}
    source = (revision["text"].text if "text" in revision else "") or ""
    space = said["ns"].text if "ns" in said else "0"
    if space != "0":
        setting.reject("is not an article", f"namespace {space}", title, where)
    elif "redirect" in said or _REDIRECT.match(source):
        setting.reject("is a redirect", "", title, where)
    elif len(source) > setting.limits.row:
        setting.reject("is longer than a row may be", f"{len(source)} characters", title, where)
    elif not (text := plain_wikitext(source)):
        setting.reject("holds no text", "", title, where)
    else:
        meta = {"title": title, "revision": revision["id"].text or "" if "id" in revision else ""}
        if base:
            meta["url"] = f"{base}/{title.replace(' ', '_')}"
        return Document(f"{title}\n\n{text}", said["id"].text or "", language, "", meta)
    return None


def plain_wikitext(source: str) -> str:
    """Wikitext as plain text: headings and list items on lines of their own, paragraphs apart by a blank line."""
    code = need("mwparserfromhell", "data").parse(_VARIANT.sub(_first_variant, source), skip_style_tags=False)
    out: list[str] = []
    _walk(code, out)
    text = _MAGIC.sub("", "".join(out)).replace("\xa0", " ")
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in text.split("\n")]
    text = "\n".join(line for line in lines if not re.fullmatch(r"[*#:;\-\s]*", line) or not line)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _first_variant(match: re.Match[str]) -> str:
    """`zh-cn:软件;zh-tw:軟體` → 软件: one spelling of those given, mainland's where there is one."""
    spelt = dict(part.split(":", 1) for part in match[1].split(";") if ":" in part)
    spelt = {name.strip(): value.strip() for name, value in spelt.items()}
    return next((spelt[name] for name in ("zh-cn", "zh-hans") if name in spelt), next(iter(spelt.values()), match[1]))


def _walk(code: Any, out: list[str]) -> None:
    """Append the words of parsed wikitext."""
    for node in code.nodes:
        match type(node).__name__:
            case "Text":
                out.append(str(node.value))
            case "Wikilink":
                if not _LINKED.match(str(node.title)):
                    _walk(node.text if node.text is not None else node.title, out)
            case "ExternalLink":
                if node.title is not None:
                    _walk(node.title, out)
            case "Heading":
                out.append("\n")
                _walk(node.title, out)
                out.append("\n")
            case "HTMLEntity":
                out.append(str(node.normalize()))
            case "Tag":
                _tag(node, out)


def _tag(node: Any, out: list[str]) -> None:
    name = str(node.tag).strip().lower()
    if name in ("br", "hr"):
        out.append("\n")
    elif name == "li":
        if not out or out[-1] != "- ":  # an item of an item
            out.append("- ")
    elif name not in _NO_TEXT and name != "table" and node.contents is not None:
        _walk(node.contents, out)
