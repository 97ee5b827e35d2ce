"""What `inspect` found as one HTML file that needs nothing else, in English and 简体中文, on a telephone, too.

Whatever the data say is escaped, and a content security policy forbids the page to load or run anything but its own
few lines of script.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fledge.core.language import LANGUAGES, language, t
from fledge.core.units import show_bytes
from fledge.data.inspection.bars import bar, histogram, interval, short
from fledge.data.inspection.inspect import EDGES, Report, fact_name, unit_name
from fledge.data.inspection.spot_check import Verdicts, said

TEMPLATES = Path(__file__).parent / "templates"


def page(report: Report, verdicts: Verdicts | None = None) -> str:
    """The page as text; `verdicts` are of a spot check that a person judged."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (TEMPLATES / "inspect.js").read_text(encoding="utf-8").strip()
    html = environment.get_template("inspect.html.jinja").render(
        lang="zh-CN" if language() == "zh" else "en",
        say=say,
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((TEMPLATES / "inspect.css").read_text(encoding="utf-8")),
        r=report,
        kind=_both({lang: _kind_name(report.kind, lang) for lang in LANGUAGES}),
        size=show_bytes(report.bytes),
        rejected=sum(sum(reasons.values()) for reasons in report.rejected.values()),
        bar=bar,
        interval=interval,
        said=said,
        histograms={name: histogram(_LABELS, lengths.histogram) for name, lengths in report.measured.items()},
        length_in=lambda name: _both({lang: _length_in(name, lang) for lang in LANGUAGES}),
        fact=lambda name: _both({lang: fact_name(name, lang) for lang in LANGUAGES}),
        verdicts=verdicts,
    )
    return html + "\n"


_LABELS = [f"≥{short(edge)}" if edge else "0" for edge in EDGES]


def say(sentence: str, /, **values: Any) -> Markup:
    """`t(sentence, …)` in both languages at once; the page shows one of them."""
    return _both({lang: t(sentence, lang, **values) for lang in LANGUAGES})


def _kind_name(kind: str, lang: str) -> str:
    return {
        "documents": t("documents", lang),
        "conversations": t("conversations", lang),
        "preferences": t("preferences", lang),
        "ratings": t("ratings", lang),
        "labelled": t("labelled texts", lang),
        "prompts": t("prompts to answer", lang),
    }[kind]


def _length_in(name: str, lang: str) -> str:
    return t("length in {unit}", lang, unit=unit_name(name, lang))


def _both(texts: dict[str, str]) -> Markup:
    span = Markup('<span data-lang="{}" lang="{}">{}</span>')
    return Markup("").join(span.format(lang, lang, text) for lang, text in texts.items())
