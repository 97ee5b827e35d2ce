"""The examination of a corpus for evaluation items, and its report: JSON for programs, text and a page for people.

`contamination.json`: settings; for every task its items, how many could be checked, and each contaminated one with its
evidence; for every shard its documents and the contaminated ones. `report.txt` and `report.html` say it in both
languages.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fledge.core.artifact import Artifact, write_atomic
from fledge.core.job import Job
from fledge.core.language import LANGUAGES, t
from fledge.data.decontamination.contamination import as_json, by_task, matches
from fledge.data.refine import Refinery
from fledge.data.steps.decontaminate import Decontaminate, Overlap
from fledge.records.shards import kind_in, shards_of

REPORT = "contamination.json"
_SHOWN = 50  # items of a task in the page
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}th,td{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}th span{display:block;font-weight:normal;color:#666}"""


def examine(job: Job, data: Artifact, step: Decontaminate) -> dict[str, Any]:
    """Look for the step's items in a corpus; write the report below `job.out`. Returns the metrics."""
    index = step.index(lambda named: job.files_of(named.text))
    scratch = job.work / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    sketches = Refinery(job, kind_in(data), [step]).sketched(step, data, scratch)
    found = matches(sketches.tables(), sketches.rows, step.common_documents, step.least)
    dirty_rows = sorted({match.row for match in found})
    tasks = by_task(index, found)
    settings = {name: getattr(step, name) for name in Overlap.model_fields}
    says = as_json(tasks, _by_shard(data, dirty_rows, sketches.rows), settings)
    write_report(says, job.out)
    return {
        "documents": sketches.rows,
        "contaminated_documents": len(dirty_rows),
        "items": {name: task.items for name, task in tasks.items()},
        "checked": {name: task.checked for name, task in tasks.items()},
        "contaminated": {name: len(task.dirty) for name, task in tasks.items()},
    }


def _by_shard(data: Artifact, dirty_rows: Sequence[int], rows: int) -> dict[str, dict[str, int]]:
    """Documents, and contaminated ones, of every shard (of raw files: of all together)."""
    import pyarrow.parquet as pq

    sizes = {shard.name: pq.read_metadata(shard).num_rows for shard in shards_of(data)} or {data.path.name: rows}
    shards, first, dirty = {}, 0, Counter[str]()
    for name, size in sizes.items():
        dirty[name] = sum(first <= row < first + size for row in dirty_rows)
        shards[name] = {"documents": size, "contaminated": dirty[name]}
        first += size
    return shards


def read_report(path: Path) -> dict[str, set[str]]:
    """Task → the ids of its contaminated items, from a report's folder."""
    says = json.loads((path / REPORT).read_text(encoding="utf-8"))
    return {name: {item["id"] for item in task["contaminated"]} for name, task in says["tasks"].items()}


# --- for people ----------------------------------------------------------------------------------------------------

Table = tuple[list[str], list[list[str]]]  # heads (sentences of the catalogue), rows


def write_report(says: dict[str, Any], out: Path) -> None:
    """`contamination.json`, `report.txt`, `report.html`."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / REPORT, json.dumps(says, ensure_ascii=False, indent=1) + "\n")
    tables = list(_tables(says))
    write_atomic(out / "report.txt", "\n\n".join([*_summary(says), *map(_as_text, tables)]) + "\n")
    write_atomic(out / "report.html", _as_page(says, tables))


def _summary(says: dict[str, Any]) -> Iterator[str]:
    tasks = says["tasks"].values()
    for lang in LANGUAGES:
        yield t(
            "{items} of {checked} checked items stand in {documents} documents",
            lang,
            items=sum(len(task["contaminated"]) for task in tasks),
            checked=sum(task["checked"] for task in tasks),
            documents=sum(shard["contaminated"] for shard in says["shards"].values()),
        )


def _tables(says: dict[str, Any]) -> Iterator[Table]:
    """By task, by shard, and the items with their strongest evidence."""
    rows = []
    for name, task in says["tasks"].items():
        dirty = len(task["contaminated"])
        share = f"{100 * dirty / max(1, task['checked']):.1f} %"
        rows.append([name, str(task["items"]), str(task["checked"]), str(dirty), share])
    yield _words("task", "evaluation items", "checked", "contaminated", "share"), rows
    shards = says["shards"].items()
    yield (
        _words("shard", "documents", "contaminated"),
        [[name, str(shard["documents"]), str(shard["contaminated"])] for name, shard in shards],
    )
    for name, task in says["tasks"].items():
        strongest = sorted(task["contaminated"], key=lambda item: (-item["share"], item["id"]))[:_SHOWN]
        if strongest:
            yield (
                [name, *_words("units covered", "longest run", "documents", "document")],
                [
                    [item["id"], f"{100 * item['share']:.0f} %", str(item["longest"]), str(item["documents_in_all"]),
                     item["documents"][0]["id"]]
                    for item in strongest
                ],
            )  # fmt: skip


def _words(*words: str) -> list[str]:
    """The heads in both languages."""
    return [" ".join(t(word, lang) for lang in LANGUAGES) for word in words]


def _as_text(table: Table) -> str:
    heads, rows = table
    lines = [heads, *rows]
    widths = [max(_width(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell + " " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _width(text: str) -> int:
    """Columns in a terminal: Chinese characters take two."""
    from unicodedata import east_asian_width

    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def _as_page(says: dict[str, Any], tables: Sequence[Table]) -> str:
    title = " · ".join(t("Contamination: evaluation items in training data", lang) for lang in LANGUAGES)
    rule = " · ".join(t("n-grams of {n} units", lang, n=says["settings"]["n"]) for lang in LANGUAGES)
    body = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(line)}</p>" for line in (*_summary(says), rule))]
    for heads, rows in tables:
        cells = "".join(f"<th>{escape(head)}</th>" for head in heads)
        body.append(f"<table><tr>{cells}</tr>")
        body += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        body.append("</table>")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
