"""The classifier: it learns, its probabilities mean what they say, and it repeats bit for bit."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fledge.core.artifact import Artifact
from fledge.core.artifact import Classifier as ClassifierArtifact
from fledge.core.errors import FledgeError
from fledge.core.reference import Ref
from fledge.data.judges.classifier import Bags, Classifier, Features, Settings, loss, softmax, train
from fledge.data.judges.classifier_training import calibration_error, choose, divide, macro_auc, macro_f1, rows_of
from fledge.data.judges.stages import TrainClassifier
from fledge.data.stages import Refine
from fledge.data.steps import Rejected
from fledge.data.steps.classify import Classify
from fledge.records.kinds import Document, Labelled
from tests.data.conftest import Runner, chinese, digests, english, through, write

SPORT = ["match", "team", "goal", "player", "coach", "球队", "比赛", "进球", "教练", "冠军"]
COOKING = ["flour", "oven", "butter", "recipe", "spoon", "面粉", "烤箱", "黄油", "菜谱", "勺子"]


def topics(seed: int, rows: int, hint: int = 2) -> list[Labelled]:
    """Random text of both languages in which a few words give the topic away; in a tenth they are of the wrong one."""
    rng = random.Random(seed)
    made = []
    for i in range(rows):
        label = ("sport", "cooking")[i % 2]
        told = label if rng.random() > 0.1 else ("sport", "cooking")[1 - i % 2]
        words = rng.choices(SPORT if told == "sport" else COOKING, k=hint)
        language = ("en", "zh")[i // 2 % 2]
        text = english(rng, 3) if language == "en" else chinese(rng, 3)
        cut = len(text) // 2
        made.append(Labelled(f"{text[:cut]} {' '.join(words)} {text[cut:]}", label, f"{seed}-{i}", language))
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> ClassifierArtifact:
    folder = tmp_path_factory.mktemp("classifier")
    runner = Runner(folder / "jobs")
    data = write(folder / "data", topics(0, 1200))
    made = runner(TrainClassifier(data=[Ref("data")], held_out=0.3, calibrate=0.2, bits=14), {"data": data})
    assert any(event.kind == "progress" for event in runner.events)
    return made  # type: ignore[no-any-return]


def test_it_learns_and_its_numbers_are_those_of_new_rows(trained: ClassifierArtifact) -> None:
    classifier = Classifier.load(trained.path)
    fresh = topics(77, 800)
    says = classifier.predict([row.text for row in fresh])
    assert all(sum(p.values()) == pytest.approx(1) and set(p) == {"sport", "cooking"} for p in says)
    right = np.mean([max(p, key=lambda label: p[label]) == row.label for p, row in zip(says, fresh, strict=True)])
    assert right > 0.84  # a tenth of the rows tell the wrong topic
    metrics = trained.metrics
    assert metrics["accuracy_low"] - 0.03 < right < metrics["accuracy_high"] + 0.03
    for name in ("accuracy", "macro_f1", "auc", "log_loss", "calibration_error"):
        assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"] or name == "calibration_error"
    assert metrics["rows_by_label"] == {"cooking": 600, "sport": 600}
    assert metrics["held_out_rows"] + metrics["calibrate_rows"] + metrics["learn_rows"] == 1200


def test_its_probabilities_are_frequencies(trained: ClassifierArtifact) -> None:
    """Of new texts that get a label with probability p, about a share p has it: by bins, and better than before."""
    classifier = Classifier.load(trained.path)
    fresh = topics(78, 2000)
    gold = np.array([classifier.labels.index(row.label) for row in fresh])
    scores = classifier.scores([row.text for row in fresh])
    p = softmax(scores / classifier.temperature)
    assert calibration_error(p, gold) < 0.08
    assert loss(scores / classifier.temperature, gold) <= loss(scores, gold) + 0.005
    sure = p.max(axis=1) > 0.85
    assert abs((p.argmax(axis=1) == gold)[sure].mean() - p.max(axis=1)[sure].mean()) < 0.06


def test_a_text_is_judged_by_itself(trained: ClassifierArtifact) -> None:
    classifier = Classifier.load(trained.path)
    texts = [row.text for row in topics(5, 300)] + ["", "球队 进球"]
    together = classifier.probabilities(texts)
    alone = np.concatenate([classifier.probabilities([text]) for text in texts])
    assert (together == alone).all()
    assert classifier.predict([]) == []
    assert (
        classifier.predict(["球队 进球 match 冠军"])[0]["sport"]
        > 0.7
        > classifier.predict(["面粉 oven 菜谱"])[0]["sport"]
    )


def test_the_same_input_gives_the_same_bytes_in_any_order(run: Runner, tmp_path: Path) -> None:
    rows = topics(1, 300)
    rows += [replace(row, text=row.text.upper(), id="") for row in rows[:20]]  # the same text to everybody but a byte
    stage = TrainClassifier(data=[Ref("data")], bits=12, held_out=0.2, calibrate=0.2, epochs=2)
    outs = [
        run(stage, {"data": write(tmp_path / name, order)}).path
        for name, order in (("a", rows), ("b", rows[::-1]), ("c", [*rows, *rows[:40]]))
    ]
    assert digests(outs[0]) == digests(outs[1]) == digests(outs[2])  # a text that comes twice counts once
    other = run(stage, {"data": write(tmp_path / "d", rows)}, seed=1).path
    assert digests(outs[0]) != digests(other)


def test_training_is_the_gradient_of_the_loss() -> None:
    """One step of AdaGrad from zero moves every weight by lr against the sign of a numerical gradient."""
    features = Features(bits=6)
    rows = topics(3, 24)
    bags, gold = (
        Bags.of(features, [row.text for row in rows]),
        np.array([row.label == "sport" for row in rows], np.int64),
    )
    settings = Settings(epochs=1, lr=0.3, seed=0)
    classifier = train(["a", "b"], features, (bags, gold), (bags, gold), settings)
    for bucket in range(0, 64, 7):
        for label in (0, 1):
            weight = np.zeros((64, 2))
            ends = []
            for step in (1e-4, -1e-4):
                weight[bucket, label] = step
                ends.append(loss(bags.scores(weight, np.zeros(2)), gold))
            slope = (ends[0] - ends[1]) / 2e-4
            expected = -0.3 * slope / np.sqrt(slope**2 + 1e-8)
            assert classifier.weight[bucket, label] == pytest.approx(expected, rel=1e-2, abs=1e-4)


def test_features_are_counts_of_hashed_grams() -> None:
    buckets, values = Features(bits=24, unit_grams=2, characters=(3, 3)).of("ab  AB\nab")
    # units: ab ×3, "ab ab" ×2; characters of " ab ab ab ": " ab" ×3, "ab " ×3, "b a" ×2
    raw = np.log1p([3, 2, 3, 3, 2])
    assert sorted(values) == pytest.approx(sorted(raw / np.linalg.norm(raw)))
    assert len(set(buckets.tolist())) == 5 and (np.diff(buckets.astype(np.int64)) > 0).all()
    assert len(Features().of("")[0]) == 0
    long = Features(longest=10)
    assert (long.of("0123456789abc")[0] == long.of("0123456789xyz")[0]).all()


def test_numbers_against_their_definitions() -> None:
    gold, guess = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    f1 = [2 * 2 / (3 + 3), 2 * 2 / (3 + 2), 0.0]
    assert macro_f1(guess, gold, 3) == pytest.approx(np.mean(f1))
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4], [0.2, 0.8]])
    labels = np.array([0, 0, 1, 1])
    # of the 4 pairs (positive, negative): 0.9 beats both, 0.6 ties once and beats once
    assert macro_auc(p, labels) == pytest.approx((2 + 1.5) / 4)
    # bins: 0.9 right; 0.6 and 0.6, one right; 0.8 right
    assert calibration_error(p, labels) == pytest.approx((0.1 + abs(1.2 - 1) + 0.2) / 4)


def test_from_good_and_bad_corpora_equal_numbers_are_taken(run: Runner, tmp_path: Path) -> None:
    rng = random.Random(0)
    good = write(tmp_path / "good", [Document(english(rng, 3), f"g{i}", "en") for i in range(400)])
    shout = [Document(english(rng, 3).upper().replace(" ", "! "), f"b{i}", "en") for i in range(120)]
    bad = write(tmp_path / "bad", shout)
    stage = TrainClassifier(positive=[Ref("good")], negative=[Ref("bad")], bits=12, held_out=0.2, calibrate=0.2)
    made = run(stage, {"good": good, "bad": bad})
    assert made.metrics["rows_by_label"] == {"negative": 120, "positive": 120}
    assert made.metrics["accuracy"] > 0.9
    assert set(Classifier.load(made.path).predict(["hello"])[0]) == {"positive", "negative"}


def test_rows_of_a_group_never_stand_on_two_sides(tmp_path: Path) -> None:
    rows = [Labelled(f"text number {i}", "ab"[i % 2], f"{i}", "en", meta={"law": f"law {i // 10}"}) for i in range(400)]
    data: Artifact = write(tmp_path / "data", rows)
    found = [row for some in choose(rows_of(data, "law", 0), 10**6, False).values() for row in some]
    parts = divide(found, 0.2, 0.2)
    group = {row.text: row.meta["law"] for row in rows}
    sides = [{group[found[i].text] for i in at} for at in parts.values()]
    assert not (sides[0] & sides[1] or sides[1] & sides[2] or sides[0] & sides[2]) and all(sides)
    assert sum(map(len, parts.values())) == 400
    assert Counter(row.label for row in found) == {"a": 200, "b": 200}


def test_the_step_tags_and_refuses(trained: ClassifierArtifact) -> None:
    rows = [
        Document("球队 进球 match 冠军 教练", "a", "zh"),
        Document("flour oven butter recipe spoon", "b", "en"),
    ]
    model, counts = Ref[Any](str(trained.path)), Counter[str]()
    sport, cooking = through(Classify(model=model, key="topic"), rows, counts)
    assert isinstance(sport, Document) and isinstance(cooking, Document)
    assert (sport.meta["topic"], cooking.meta["topic"]) == ("sport", "cooking")
    assert float(sport.meta["topic_probability"]) > 0.7
    assert counts == {"topic/sport": 1, "topic/cooking": 1}
    sport, cooking = through(Classify(model=model, keep={"sport": 0.6}, tag=False), rows)
    assert isinstance(sport, Document) and not sport.meta
    assert isinstance(cooking, Rejected) and cooking.value.startswith("sport 0.")
    assert not [
        r for r in through(Classify(model=model, keep={"sport": 0.6, "cooking": 0.6}), rows) if isinstance(r, Rejected)
    ]


def test_in_the_refinery(run: Runner, tmp_path: Path, trained: ClassifierArtifact) -> None:
    data = write(tmp_path / "data", [Document(row.text, row.id, row.language) for row in topics(6, 60)])
    stage = Refine(data=Ref("data"), steps=[{"classify": {"model": "topics", "keep": {"sport": 0.5}}}])
    outs = [run(stage, {"data": data, "topics": trained}, workers=workers) for workers in (1, 2)]
    assert digests(outs[0].path) == digests(outs[1].path)
    assert 15 < outs[0].metrics["rows_out"] < 45


def test_wrong_input_is_said(run: Runner, tmp_path: Path, trained: ClassifierArtifact) -> None:
    with pytest.raises(FledgeError, match="is not a classifier"):
        Classifier.load(tmp_path)
    with pytest.raises(FledgeError, match="did you mean"):
        through(Classify(model=Ref(str(trained.path)), keep={"sports": 0.5}), [Document("x", "a", "en")])
    with pytest.raises(ValueError, match="between 0 and 1"):
        Classify(model=Ref("x"), keep={"sport": 2})
    one = write(tmp_path / "one", [row for row in topics(0, 100) if row.label == "sport"])
    with pytest.raises(FledgeError, match="two labels"):
        run(TrainClassifier(data=[Ref("data")]), {"data": one})
    assert list(TrainClassifier().check()) and list(TrainClassifier(positive=[Ref("a")]).check())
    assert not list(TrainClassifier(positive=[Ref("a")], negative=[Ref("b")]).check())
