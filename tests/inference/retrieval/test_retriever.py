"""Search in both languages: by words, by meaning across languages, by both, and without saying the same twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from fledge.core.errors import FledgeError
from fledge.inference.native import NativeEngine
from fledge.inference.opening import open_engine
from fledge.inference.prompting.retrieving import retriever
from fledge.inference.prompting.tools import Search
from fledge.inference.retrieval.index import Cut, Index, build_index
from fledge.inference.retrieval.measure import Question, search_quality
from fledge.inference.retrieval.ranking import fuse
from fledge.inference.retrieval.retriever import Retriever
from fledge.inference.retrieval.vectors import embed, fitted
from tests.inference import tiny
from tests.inference.retrieval.library import Meaning

QUESTIONS = [
    Question("By whom is the boiler repaired?", ("harbour workshop",), ("guide.md",)),
    Question("How high is the lighthouse?", ("sixty-three",), ("lighthouse.html",)),
    Question("When does the museum open on Thursdays?", ("nine",), ("museum.jsonl#L1",)),
    Question("差旅费由谁审核？", ("财务部",), ("handbook.md",)),
    Question("每位读者最多借几本书？", ("五本",), ("rules/library.txt",)),
    Question("博物馆的门票多少钱？", ("二十元",), ("museum.jsonl#L2",)),
]


def test_every_question_finds_its_source_first(by_words: Retriever) -> None:
    for question in QUESTIONS:
        found = by_words.search(question.text, 3)
        assert found[0].source == question.sources[0].split("#")[0], question.text
        assert [p.score for p in found] == sorted((p.score for p in found), reverse=True)
    assert search_quality(by_words, QUESTIONS, 3) == {"recall@3": 1.0, "mrr": 1.0, "ndcg@3": 1.0}


def test_a_single_chinese_character_finds_the_words_that_have_it(by_words: Retriever) -> None:
    for query, source in (("审", "handbook.md"), ("票 馆", "museum.jsonl")):
        assert by_words.search(query, 1)[0].source == source, query
    assert by_words.index.terms("书 a") == ["书", "a"] and by_words.search("龘", 3) == []


def test_meaning_finds_what_shares_no_word(index: Index, by_words: Retriever) -> None:
    assert not by_words.search("灯塔有多高", 3) or by_words.search("灯塔有多高", 3)[0].source != "lighthouse.html"
    for by in ("vectors", "both", "auto"):
        dense = Retriever(index, Meaning(), by=by)  # type: ignore[arg-type]
        assert dense.search("灯塔", 2)[0].source == "lighthouse.html"
        assert dense.search("Who can fix the heating?", 2)[0].source == "guide.md"


def test_both_is_the_fusion_of_the_two_rankings(index: Index) -> None:
    model, query = Meaning(), "借阅图书 museum"
    words = [p.where for p in Retriever(index).search(query, 50)]
    dense = [p.where for p in Retriever(index, model, by="vectors").search(query, 50)]
    names = sorted(set(words) | set(dense))
    wanted = dict(fuse([[names.index(w) for w in ranking] for ranking in (words, dense)]))
    found = Retriever(index, model, by="both").search(query, 50)
    assert {p.where: p.score for p in found} == pytest.approx({names[i]: score for i, score in wanted.items()})


@pytest.mark.parametrize("with_model", [False, True])
def test_diversity_takes_other_passages_and_a_text_is_found_once(with_model: bool, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    same = "The boiler is repaired by experts. "
    for name, text in {
        "a.txt": same, "b.txt": same, "c.txt": same + "Yes.", "d.txt": same + "Indeed.",
        "e.txt": "The boiler stands beside the apple tree, below the museum.", "f.txt": "锅炉在地下室里。",
    }.items():  # fmt: skip
        (folder / name).write_text(text, encoding="utf-8")
    model = Meaning() if with_model else None
    build_index(folder, tmp_path / "i", Cut(60, 0, "bigrams"), model, embedder="m")
    plain = Retriever.open(tmp_path / "i", model, by="auto").search("boiler repaired experts", 3)
    mixed = Retriever.open(tmp_path / "i", model, by="auto", diversity=0.7).search("boiler repaired experts", 3)
    assert len({p.text for p in plain}) == 3 and {"a.txt", "b.txt"} & {plain[0].source}
    assert mixed[0].source == plain[0].source
    assert "e.txt" in [p.source for p in mixed][1:]
    assert "e.txt" not in [p.source for p in plain]


def test_vectors_of_a_real_engine_are_those_it_gives_alone(engine: NativeEngine, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    texts = [f"说明{i} number {i} " * (1 + i % 5) for i in range(12)] + ["很长的文字" * 200]
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_text(text, encoding="utf-8")
    build_index(folder, tmp_path / "i", Cut(2000, 0, "bigrams"), engine, embedder="tiny")
    found = Retriever.open(tmp_path / "i", engine, by="vectors").search(texts[3].strip(), 3)
    assert found[0].source == "03.txt" and found[0].score == pytest.approx(1, abs=1e-5)
    assert len(engine.encode(fitted(engine, texts[-1]))) <= engine.context  # what is too long is cut, not refused
    assert fitted(engine, texts[0]) == texts[0]
    assert embed(engine, []).shape == (0, 0)


def test_an_index_knows_the_folder_of_its_model_again(shelf: Path, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", tiny.llama())
    with open_engine(folder) as engine:  # type: ignore[union-attr]
        build_index(shelf, tmp_path / "i", Cut(60, 10, "bigrams"), engine, embedder=str(folder))
    found = retriever(str(tmp_path / "i"), str(folder)).search("博物馆每周一闭馆，门票二十元，学生半价。", 2)
    assert found[0].where == "museum.jsonl#L2"
    other = tiny.save(tmp_path / "other", tiny.llama(seed=1))
    with pytest.raises(FledgeError, match="another embedding model"):
        retriever(str(tmp_path / "i"), str(other))


def test_the_retriever_is_a_tool_that_names_places(by_words: Retriever) -> None:
    seen = Search(by_words, k=2)("Who repairs the boiler?", "en")
    assert seen.startswith("[1] (guide.md#L") and "harbour workshop" in seen


def test_wrong_use_is_said(index: Index, by_words: Retriever) -> None:
    with pytest.raises(FledgeError, match="query is empty"):
        by_words.search("  ")
    with pytest.raises(FledgeError, match="k is out of range"):
        by_words.search("a", 0)
    with pytest.raises(FledgeError, match="diversity"):
        Retriever(index, diversity=2)
    with pytest.raises(FledgeError, match="needs the embedding model"):
        Retriever(index, by="both")
    assert by_words.search("qqqq 龘") == [] == by_words.search("？！")
