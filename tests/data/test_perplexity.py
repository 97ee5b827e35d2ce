"""The step `perplexity`: thirds and thresholds by language, over the whole corpus."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from fledge.core.artifact import NGram
from fledge.core.errors import FledgeError
from fledge.core.reference import Ref
from fledge.data.judges.kneser_ney import train_ngram
from fledge.data.judges.ngram_model import NGramModel, Segmenter
from fledge.data.stages import Refine
from fledge.data.steps import Rejected
from fledge.data.steps.perplexity import Perplexity
from fledge.records.kinds import Document, Record
from fledge.records.rejects import read_rejects
from fledge.records.shards import read
from tests.data.conftest import Runner, chinese, corpus, digests, english, through, write


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    train_ngram(
        [write(folder / "data", corpus(0, 200))], Segmenter("words"), folder / "model",
        order=3, min_count=1, prune_from=0, sample=10**9, held_out=0, tell=lambda done, of: None,
    )  # fmt: skip
    return folder / "model"


def mixed(seed: int, rows: int) -> list[Document]:
    """Texts of both languages, some of whose words (a growing share) are strange."""
    rng = random.Random(seed)
    made = []
    for i in range(rows):
        noise = " ".join("qzxv" + rng.choice("abcdef") for _ in range(4 * (i // 2)))
        text = english(rng, 6) if i % 2 else chinese(rng, 6)
        made.append(Document(f"{text} {noise}".strip(), f"{i:03d}", "en" if i % 2 else "zh"))
    return made


def kept(rows: Iterable[Record | Rejected]) -> list[Document]:
    return [row for row in rows if isinstance(row, Document)]


def test_every_text_gets_its_perplexity_and_its_third(model: Path) -> None:
    rows = mixed(1, 60)
    expected = NGramModel.load(model).perplexities([row.text for row in rows])
    found = kept(through(Perplexity(model=Ref(str(model))), rows))
    assert [row.meta["perplexity"] for row in found] == [f"{value:.1f}" for value in expected]
    for language in ("en", "zh"):
        mine = [i for i, row in enumerate(rows) if row.language == language]
        by_rank = sorted(mine, key=lambda i: expected[i])
        assert [found[i].meta["perplexity_bucket"] for i in by_rank] == ["head"] * 10 + ["middle"] * 10 + ["tail"] * 10
    assert "perplexity_bucket" not in kept(through(Perplexity(model=Ref(str(model)), bucket=False), rows))[0].meta


def test_a_text_is_refused_above_a_value_or_a_percentile_of_its_language(model: Path) -> None:
    rows = mixed(2, 40)
    values = NGramModel.load(model).perplexities([row.text for row in rows])
    english_rows = [i for i, row in enumerate(rows) if row.language == "en"]
    limit = float(np.sort(values[english_rows])[12])
    judged = through(Perplexity(model=Ref(str(model)), max={"en": limit}), rows)
    assert [i for i, row in enumerate(judged) if isinstance(row, Rejected)] == [
        i for i in english_rows if values[i] > limit
    ]
    refused = next(row for row in judged if isinstance(row, Rejected))
    assert refused.reason == "perplexity" and float(refused.value) > limit
    judged = through(Perplexity(model=Ref(str(model)), percentile=80), rows)
    for language in ("en", "zh"):
        mine = [i for i, row in enumerate(rows) if row.language == language]
        gone = [i for i in mine if isinstance(judged[i], Rejected)]
        assert sorted(gone) == sorted(sorted(mine, key=lambda i: values[i])[-4:])


def test_in_the_refinery_the_same_from_any_number_of_workers(run: Runner, tmp_path: Path, model: Path) -> None:
    data = write(tmp_path / "data", mixed(3, 90))
    step = {"perplexity": {"model": "ngram", "percentile": 90}}
    outs = []
    for workers in (1, 2):
        inputs = {"data": data, "ngram": NGram(model)}
        outs.append(run(Refine(data=Ref("data"), steps=[step]), inputs, workers=workers))
    assert digests(outs[0].path) == digests(outs[1].path)
    assert outs[0].metrics["rejected"] == {"perplexity": {"perplexity": 10}}
    assert all(row.meta["perplexity_bucket"] for row in read(outs[0], "documents"))
    assert len(list(read_rejects(outs[0].path))) == 10


def test_a_wrong_model_is_an_error_and_an_empty_corpus_is_none(run: Runner, tmp_path: Path, model: Path) -> None:
    with pytest.raises(FledgeError, match="n-gram model"):
        through(Perplexity(model=Ref(str(tmp_path))), mixed(4, 2))
    inputs = {"data": write(tmp_path / "none", [], "documents"), "ngram": NGram(model)}
    out = run(Refine(data=Ref("data"), steps=[{"perplexity": {"model": "ngram"}}]), inputs)
    assert out.metrics["rows_out"] == 0
