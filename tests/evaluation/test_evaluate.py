"""The stage with real (tiny) models: numbers, files, determinism, resumption."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fledge.core.artifact import Artifact, files_of, sha256_of
from fledge.core.events import Event
from fledge.core.intervals import mcnemar, paired_proportions
from fledge.evaluation import subject as subjects
from fledge.evaluation.evaluate import compare
from fledge.evaluation.stages import Evaluate
from fledge.evaluation.subject import Named, clip, open_subject, weights_of
from fledge.evaluation.tasks.base import Paired
from tests.evaluation.fakes import job_for

CONFIG: dict[str, Any] = {
    "models": {"base": "base", "tuned": "tuned"},
    "completes": ["base"],
    "tasks": [
        {"task": "bits_per_byte", "data": {"en": "talk"}, "train": {"en": "talk"}, "bytes": "200"},
        {"task": "answer_loss", "data": "talk"},
        {"task": "preference_accuracy", "data": "pairs", "reference": "base", "reward_model": "judge"},
        {"task": "answer_match", "data": "questions", "label": "identity", "max_new_tokens": 8},
        {"task": "samples", "prompts": ["hello", "你好"], "max_new_tokens": 8},
    ],
}


def run(folder: Path, world: dict[str, Artifact], events: list[Event] | None = None) -> tuple[Any, dict[str, Any]]:
    stage = Evaluate.model_validate(CONFIG)
    made = stage.run(job_for(stage, folder, world, events))
    return made, json.loads((made.path / "scores.json").read_text(encoding="utf-8"))


def digests(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in files_of(folder)}


@pytest.fixture(scope="module")
def scored(
    world: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Any], list[Event]]:
    events: list[Event] = []
    return *run(tmp_path_factory.mktemp("scored"), world, events), events


def test_every_model_answers_every_task(scored: tuple[Any, dict[str, Any], list[Event]]) -> None:
    made, scores, events = scored
    assert list(scores["models"]) == ["base", "tuned", "judge"]
    assert [scores["models"][name]["kind"] for name in scores["models"]] == ["model", "model", "reward-model"]
    tuned = scores["models"]["tuned"]["metrics"]
    assert {"bits_per_byte_en", "answer_loss", "answer_loss_zh", "preference_accuracy", "identity"} <= set(tuned)
    assert set(scores["models"]["judge"]["metrics"]) == {"preference_accuracy"}
    assert made.metrics["tuned.answer_loss"] == tuned["answer_loss"]["value"]
    low, high = made.metrics["tuned.answer_loss_interval"]
    assert low < made.metrics["tuned.answer_loss"] < high
    assert made.metrics["baselines.xz.bits_per_byte_en"] > 0 and made.metrics["baselines.ngram.bits_per_byte_en"] > 0
    assert not any("seconds" in name for name in made.metrics)
    done = [e for e in events if e.kind == "progress"][-1]
    assert done.value == done.data["total"] == 2 * (2 + 5 + 5 + 1 + 2) + 5  # the judge sees the preferences only
    names = {name for name in files_of(made.path) if name.startswith("items/preference_accuracy")}
    assert names == {f"items/preference_accuracy/{model}.jsonl" for model in ("base", "tuned", "judge")}


def test_bits_per_byte_is_the_measure_of_pre_training(
    scored: tuple[Any, dict[str, Any], list[Event]], world: dict[str, Artifact]
) -> None:
    from fledge.models.load import load_model, load_tokenizer
    from fledge.training.corpus import excerpt
    from fledge.training.held_out import bits_per_byte, xz_bits_per_byte

    texts = excerpt(world["talk"], 200)
    assert sum(len(text.encode()) for text in texts) == 200
    for name in ("base", "tuned"):
        wanted = bits_per_byte(load_model(world[name].path), load_tokenizer(world[name].path), texts)
        assert scored[0].metrics[f"{name}.bits_per_byte_en"] == pytest.approx(wanted.value, rel=1e-5)
    assert scored[0].metrics["baselines.xz.bits_per_byte_en"] == xz_bits_per_byte("".join(texts).encode())


def test_answer_loss_is_that_of_plain_cross_entropy(
    scored: tuple[Any, dict[str, Any], list[Event]], world: dict[str, Artifact]
) -> None:
    from fledge.models.load import load_model
    from fledge.records.chat import ChatRenderer
    from fledge.records.shards import read
    from fledge.training.held_out import answer_loss

    renderer = ChatRenderer.from_folder(world["tuned"].path)
    rows = list(read(world["talk"], "conversations"))
    wanted, tokens = answer_loss(load_model(world["tuned"].path), renderer, rows, 256)
    items = [json.loads(line) for line in (scored[0].path / "items/answer_loss/tuned.jsonl").open(encoding="utf-8")]
    assert sum(item["tokens"] for item in items) == tokens
    assert scored[0].metrics["tuned.answer_loss"] == pytest.approx(wanted, rel=1e-5)


def test_the_reward_is_the_reward_models_own(
    scored: tuple[Any, dict[str, Any], list[Event]], world: dict[str, Artifact]
) -> None:
    import torch

    from fledge.models.load import load_model
    from fledge.records.chat import ChatRenderer
    from fledge.records.kinds import Message
    from tests.evaluation.conftest import ENGLISH

    model, renderer = load_model(world["judge"].path, reward=True), ChatRenderer.from_folder(world["judge"].path)
    ids = renderer.render((Message("user", "hello"), Message("assistant", ENGLISH[0]))).ids
    wanted = model(torch.tensor([ids])).logits.item()
    first = (scored[0].path / "items/preference_accuracy/judge.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(first)["chosen"]["reward"] == pytest.approx(wanted, abs=1e-4)


def test_the_same_again_and_after_an_interruption(
    scored: tuple[Any, dict[str, Any], list[Event]],
    world: dict[str, Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed while the second model answered: the first is not loaded again, and every byte is the same."""
    loaded: list[str] = []

    def load(named: Named, dtype: str, device: str) -> Any:
        loaded.append(named.name)
        return open_subject(named, dtype, device)

    monkeypatch.setattr(subjects, "open_subject", load)
    first, _ = run(tmp_path, world)
    assert loaded == ["base", "tuned", "judge"]
    assert digests(first.path) == digests(scored[0].path)
    (tmp_path / "work/items/samples/tuned.jsonl").unlink()
    shutil.rmtree(first.path)
    loaded.clear()
    again, _ = run(tmp_path, world)
    assert loaded == ["tuned"]
    assert digests(again.path) == digests(scored[0].path)


def test_comparisons_are_item_by_item() -> None:
    right = {"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0, 0.0, 1.0, 1.0]}
    (row,) = compare(Paired("acc", right), 0)
    wanted = paired_proportions(2, 1, 4).to_json()
    assert row == {"metric": "acc", "model": "b", "against": "a", **wanted, "p": mcnemar(2, 1)}
    loss = Paired("loss", {"a": [2.0, 4.0], "b": [1.0, 3.0]}, {"a": [1, 3], "b": [1, 3]}, proportion=False)
    assert compare(loss, 0)[0]["value"] == pytest.approx(-0.5)
    other = Paired("loss", {"a": [2.0, 4.0], "b": [1.0, 3.0]}, {"a": [1, 3], "b": [2, 2]}, proportion=False)
    assert compare(other, 0) == []  # another tokenizer: another unit


def test_weights_are_counted_without_loading(world: dict[str, Artifact]) -> None:
    from fledge.models.load import load_model

    parameters, size = weights_of(world["base"].path)
    assert parameters == load_model(world["base"].path).num_parameters()
    assert size == (world["base"].path / "model.safetensors").stat().st_size


def test_clip_keeps_one_token_of_the_prompt() -> None:
    assert clip([1, 2, 3], [4, 5], 10) == ([1, 2, 3], [4, 5])
    assert clip([1, 2, 3], [4, 5], 3) == ([2, 3], [4, 5])
    assert clip([1, 2, 3], [4, 5, 6, 7], 3) == ([4], [5, 6, 7])


def test_what_is_wrong_is_said_before_anything_runs() -> None:
    stage = Evaluate.model_validate({**CONFIG, "completes": ["bsae"], "tasks": CONFIG["tasks"] + [CONFIG["tasks"][1]]})
    problems = [str(problem) for problem in stage.check()]
    assert "bsae" in problems[0] and 'did you mean "base"?' in problems[0]
    assert 'two tasks are called "answer_loss"' in problems[1]
    with pytest.raises(ValidationError, match="bits_per_bite"):
        Evaluate.model_validate({"models": {"a": "a"}, "tasks": [{"task": "bits_per_bite"}]})
    with pytest.raises(ValidationError, match=r"a\.b"):
        Evaluate.model_validate({"models": {"a.b": "a"}, "tasks": [CONFIG["tasks"][1]]})


def test_references_and_estimate() -> None:
    from fledge.core.machine import Machine
    from fledge.core.stage import Size

    stage = Evaluate.model_validate(CONFIG)
    assert {ref.text for ref in stage.references().values()} == {"base", "tuned", "talk", "pairs", "judge", "questions"}
    small = stage.estimate({"base": Size(parameters=2e6), "tuned": Size(parameters=2e6)}, Machine(2, 8e9))
    large = stage.estimate({"base": Size(parameters=2e8), "tuned": Size(parameters=2e8)}, Machine(2, 8e9))
    assert small.seconds[0] < small.seconds[1] < large.seconds[1] and small.memory[1] < large.memory[1]
    assert math.isfinite(large.seconds[1])
