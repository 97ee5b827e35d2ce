"""Papers in LaTeX: one document a paper, its `\\input` files taken in, without comments, preamble, figures, tables and
bibliography. Formulas stay as they are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from fledge.core.errors import need
from fledge.data.sources import Setting
from fledge.records.kinds import Document, Record
from fledge.records.raw.encodings import decode
from fledge.records.raw.packed import open_packed

_CLASS = re.compile(r"\\document(?:class|style)\b")
_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*?(?:\n[ \t]*|$)")
_INPUT = re.compile(r"\\(?:(?:input|include|subfile)\s*\{([^{}]+)\}|input\s+([^\s{}\\]+))")
_BODY = re.compile(r"\\begin\s*\{document\}(.*?)(?:\\end\s*\{document\}|\Z)", re.DOTALL)
_TITLE = re.compile(r"\\title\s*(?:\[[^\]]*\])?\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_DEPTH = 20
_DROPPED = (
    "figure", "figure*", "table", "table*", "tabular", "tabularx", "longtable", "tikzpicture", "thebibliography",
    "wrapfigure", "algorithm", "algorithmic", "filecontents", "CCSXML", "IEEEbiography",
)  # fmt: skip
_SILENT = (
    "cite", "citep", "citet", "citealp", "citealt", "citeauthor", "citeyear", "parencite", "textcite", "autocite",
    "ref", "eqref", "autoref", "cref", "Cref", "pageref", "label", "includegraphics", "bibliography",
    "bibliographystyle", "vspace", "hspace", "thanks", "index", "maketitle", "tableofcontents", "author", "date",
    "affiliation", "email", "nocite", "addbibresource", "printbibliography", "pagestyle", "thispagestyle",
)  # fmt: skip
_HEADINGS = ("part", "chapter", "section", "subsection", "subsubsection", "paragraph", "subparagraph")


def read(file: Path, setting: Setting) -> Iterator[Record]:
    """The paper that begins in `file`. A file without `\\documentclass` is a part of another and set aside."""
    source = _source(file, setting)
    if source is None:
        setting.reject("is longer than a row may be, or in no known encoding", where=file.name)
        return
    if not _CLASS.search(source):
        setting.reject("is a part of another file (no \\documentclass)", where=file.name)
        return
    whole = _with_inputs(source, file, setting, (file,))
    body = _BODY.search(whole)
    if body is None:
        setting.reject("has no \\begin{document}", where=file.name)
        return
    title = _TITLE.search(whole)
    try:
        name, text = plain_latex(title[1]) if title else "", plain_latex(_TITLE.sub("", body[1]))
    except (RecursionError, ValueError, IndexError) as error:  # nested too deeply, or broken
        setting.reject("cannot be parsed", f"{type(error).__name__}: {error}"[:200], where=file.name)
        return
    if not text:
        setting.reject("holds no text", where=file.name)
        return
    name = " ".join(name.split())
    yield Document("\n\n".join(filter(None, (name, text))), "", "", "", {"title": name, "file": file.name})


def plain_latex(source: str) -> str:
    """LaTeX as plain text, formulas as they stand. Raises ValueError or RecursionError where it cannot be parsed."""
    walker, writer = _parser()
    nodes, _, _ = walker(source).get_latex_nodes()
    text = writer.nodelist_to_text(nodes)
    text = re.sub(r"[ \t]*\n[ \t]*", "\n", re.sub(r"[ \t]+", " ", text))
    text = re.sub(r"[ \t\xa0]+([.,;:)\]])", r"\1", text)  # where a citation stood before it
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _source(file: Path, setting: Setting) -> str | None:
    with open_packed(file, setting.limits) as stream:
        content = stream.read(setting.limits.row + 1)
    found = decode(content) if len(content) <= setting.limits.row else None
    return None if found is None else _COMMENT.sub(r"\1", found[0].replace("\r\n", "\n"))


def _with_inputs(source: str, file: Path, setting: Setting, trail: tuple[Path, ...]) -> str:
    """The source with its parts in their places. A part that is not there, or leads out of the source's folder, or in
    a circle, is left out and counted."""

    def part(match: re.Match[str]) -> str:
        name = (match[1] or match[2]).strip()
        places = [trail[0].parent / name, file.parent / name]
        tries = [place if place.suffix else place.with_name(place.name + ".tex") for place in places] + places
        found = next((place for place in tries if place.is_file() and _within(place, setting.root)), None)
        if found is None or found.resolve() in {path.resolve() for path in trail} or len(trail) > _DEPTH:
            setting.reject("a part is missing", name, where=trail[0].name)
            return ""
        text = _source(found, setting)
        if text is None:
            setting.reject("is longer than a row may be, or in no known encoding", where=name)
            return ""
        return "\n" + _with_inputs(text, found, setting, (*trail, found)) + "\n"

    return _INPUT.sub(part, source)


def _within(file: Path, root: Path) -> bool:
    return file.resolve().is_relative_to(root.resolve())


@cache
def _parser() -> tuple[Any, Any]:
    """pylatexenc set up: what is dropped, what is silent, headings on lines of their own."""
    need("pylatexenc", "data")
    from pylatexenc import latex2text, latexwalker
    from pylatexenc.macrospec import EnvironmentSpec, MacroSpec

    words = latex2text.get_default_latex_context_db()
    words.add_context_category(
        "fledge",
        macros=[latex2text.MacroTextSpec(name, discard=True) for name in _SILENT]
        + [latex2text.MacroTextSpec(name, simplify_repl=_heading) for name in _HEADINGS]
        + [latex2text.MacroTextSpec("footnote", discard=True), latex2text.MacroTextSpec("item", "\n- ")]
        + [latex2text.MacroTextSpec(name, simplify_repl=_last) for name in ("href", "url", "path", "texorpdfstring")],
        environments=[latex2text.EnvironmentTextSpec(name, discard=True) for name in _DROPPED],
        prepend=True,
    )
    syntax = latexwalker.get_default_latex_context_db()
    syntax.add_context_category(
        "fledge",
        macros=[MacroSpec(name, "*[[{") for name in _SILENT if name not in ("maketitle", "tableofcontents")]
        + [MacroSpec(name, "*[{") for name in _HEADINGS]
        + [MacroSpec("href", "{{"), MacroSpec("texorpdfstring", "{{"), MacroSpec("url", "{"), MacroSpec("path", "{")],
        environments=[EnvironmentSpec(name, "") for name in _DROPPED],
        prepend=True,
    )

    def walker(source: str) -> Any:
        return latexwalker.LatexWalker(source, latex_context=syntax, tolerant_parsing=True)

    return walker, latex2text.LatexNodes2Text(latex_context=words, math_mode="verbatim", strict_latex_spaces=False)


def _last(node: Any, l2tobj: Any) -> str:
    """The last argument: what is meant to be read."""
    given = [item for item in node.nodeargd.argnlist if item is not None]
    return str(l2tobj.nodelist_to_text([given[-1]])).strip() if given else ""


def _heading(node: Any, l2tobj: Any) -> str:
    return f"\n\n{_last(node, l2tobj)}\n\n"
