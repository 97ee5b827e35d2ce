"""Strategies as a recipe asks for them: stages in a row, forgetting provoked and prevented, K models from one stage."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from fledge.core import recipe
from fledge.core.artifact import Artifact, Model, TaskModel, sha256_of
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter, Event
from fledge.core.job import Job
from fledge.core.plan import describe
from fledge.core.recipe import Recipe
from fledge.core.stage import Execution
from fledge.models.adapters import LoRA
from fledge.models.build import build_model
from fledge.models.save import save_model
from fledge.models.shape import ModelShape
from fledge.records import shards
from fledge.records.kinds import Conversation, Document, Labelled, Message
from fledge.training.policy import open_policy
from fledge.training.settings import TrainSettings
from fledge.training.stages import DirectPreferences, Pretrain
from fledge.training.strategies.folds import over_folds
from fledge.training.strategies.settings import Forgetting
from fledge.training.strategies.stages import CrossValidate
from tests.training.test_stages import preferences, write
from tests.training.toys import tokenizer

ENGLISH = [("hello", "hello there"), ("who", "you are here"), ("are", "there you are")]
CHINESE = [("你好", "人民法院"), ("法院", "你好人民")]
RECIPE = """
name: chain
seed: 3
stages:
  first:                                     # a model that has learned one thing …
    use: train.sft
    model: {root}/fresh
    data: {root}/english
    held_out: {root}/english_held
    train: &quick {{batch_size: 8, max_length: 64, dtype: float32, lr: 5e-3, schedule: constant, steps: 60}}
  second: &second                            # … is taught another, with rows of the first in every batch,
    use: train.sft
    model: first
    data: {root}/chinese
    held_out: {root}/chinese_held
    replay: {{data: {root}/english, share: 0.25}}
    forgetting: {{data: {{english: {root}/english_held}}, rows: 24}}   # and what it forgets is measured
    train: &next {{batch_size: 8, max_length: 64, dtype: float32, lr: 3e-3, schedule: constant, steps: 40}}
  plain: {{<<: *second, replay: null}}
  held: {{<<: *second, replay: null, train: {{<<: *next, l2_sp: 0.1}}}}
  elastic: {{<<: *second, replay: null, ewc: {{data: {root}/english, strength: 20000, rows: 32}}}}
  aligned:
    use: train.dpo
    model: second
    data: {root}/preferences
    ewc: {{data: {root}/chinese, strength: 10, rows: 4}}
    forgetting: {{data: {{english: {root}/english_held, chinese: {root}/chinese_held}}}}
    train: {{batch_size: 8, max_length: 64, steps: 2, unfreeze: {{every: 1}}, l2_sp: 0.01}}
"""


def talks(pairs: list[tuple[str, str]], count: int, seed: int) -> list[Conversation]:
    picks = random.Random(seed).choices(pairs, k=count)
    return [
        Conversation((Message("user", f"{q} {i}"), Message("assistant", a)), meta={"topic": q})
        for i, (q, a) in enumerate(picks)
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, names = tmp_path_factory.mktemp("strategies"), tokenizer()
    model = build_model(
        ModelShape(hidden=32, layers=2, head_dim=8, kv_heads=2, context=128).resolve(len(names)), 1, names
    )
    save_model(model, names, folder / "fresh", names.chat_template)
    for name, pairs, count, seed in (
        ("english", ENGLISH, 64, 1), ("english_held", ENGLISH, 24, 2),
        ("chinese", CHINESE, 64, 3), ("chinese_held", CHINESE, 24, 4),
    ):  # fmt: skip
        write(folder / name, "conversations", talks(pairs, count, seed))
    write(folder / "preferences", "preferences", preferences(12, 3))
    (folder / "recipe.yaml").write_text(RECIPE.format(root=folder), encoding="utf-8")
    return folder


class Chain:
    """Runs a recipe's stages one after another in this process, each once."""

    def __init__(self, checked: Recipe, folder: Path) -> None:
        self.recipe, self.folder = checked, folder
        self.made: dict[str, Any] = {}
        self.heard: dict[str, list[Event]] = {}

    def __call__(self, name: str) -> Any:
        if name in self.made:
            return self.made[name]
        node = self.recipe.node(name)
        references = node.stage.references()
        inputs = {
            references[dotted].text: found[part] if isinstance(found := self(parent), dict) else found
            for dotted, (parent, part) in node.parents.items()
        }
        inputs |= {text: _opened(references, text, outside.path) for text, outside in node.outside.items()}
        folder = self.folder / name
        (folder / "out").mkdir(parents=True)
        self.heard[name] = []
        events = Emitter(name, 0, self.heard[name].append)
        job = Job(name, folder / "out", folder, node.seed, Execution(), events, inputs)
        self.made[name] = node.stage.run(job)
        return self.made[name]


def _opened(references: Any, text: str, path: Path) -> Artifact:
    kinds: tuple[type[Artifact], ...] = next(ref.kinds for ref in references.values() if ref.text == text)
    return next(kind for kind in kinds if not kind.problem_with(path))(path)


@pytest.fixture(scope="module")
def chain(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    torch.set_num_threads(1)
    return Chain(recipe.load(root / "recipe.yaml"), tmp_path_factory.mktemp("chain"))


def test_forgetting_is_measured_and_each_remedy_keeps_more(chain: Chain) -> None:
    assert chain("first").metrics["answer_loss"] < 0.2
    found = {name: chain(name).metrics for name in ("plain", "second", "held", "elastic")}
    for name, metrics in found.items():
        before, after = metrics["forgetting_english_before"], metrics["forgetting_english_after"]
        assert before == pytest.approx(chain("first").metrics["answer_loss"], rel=1e-5), "the same rows, the same model"
        assert metrics["forgetting_english"] == pytest.approx(after - before, abs=1e-9), name
        assert metrics["forgetting_english_low"] < metrics["forgetting_english"] < metrics["forgetting_english_high"]
        assert metrics["answer_loss"] < 0.5 * metrics["answer_loss_before"], "the new task is learned all the same"
    forgot = {name: metrics["forgetting_english"] for name, metrics in found.items()}
    assert forgot["plain"] > 2 and found["plain"]["forgetting_english_low"] > 1
    assert forgot["second"] < 0.2 * forgot["plain"]
    assert forgot["held"] < 0.7 * forgot["plain"] and forgot["elastic"] < 0.7 * forgot["plain"]
    for name in ("second", "held", "elastic"):
        assert found[name]["forgetting_english_high"] < found["plain"]["forgetting_english_low"], "not by chance"
    warned = [str(e.value) for e in chain.heard["plain"] if e.kind == "message" and e.name == "warning"]
    assert any("forgotten in part" in text for text in warned)


def test_replayed_rows_have_curves_of_their_own(chain: Chain) -> None:
    chain("second")
    curves = {
        e.name: float(e.value) for e in chain.heard["second"] if e.kind == "metric" and e.name.startswith("loss/")
    }
    assert set(curves) == {"loss/new", "loss/english"}
    assert curves["loss/english"] < 0.5 < curves["loss/new"], "the old answers are still known"
    assert [e for e in chain.heard["elastic"] if e.name == "ewc"] and [
        e for e in chain.heard["held"] if e.name == "l2_sp"
    ]
    assert "fisher.safetensors" in {p.name for p in (chain.folder / "elastic").iterdir()}


def test_stages_in_a_row_end_with_a_model_that_knows_of_its_past(chain: Chain) -> None:
    metrics = chain("aligned").metrics
    assert metrics["beta"] == 0.1 and metrics["steps"] == 2
    for name in ("english", "chinese"):
        assert abs(metrics[f"forgetting_{name}"]) < 0.3, "two small steps"
    first_step = next(float(e.value) for e in chain.heard["aligned"] if e.kind == "metric" and e.name == "dpo")
    assert first_step < 0.75, "it began at ln 2"


def test_texts_are_replayed_and_consolidated_too(root: Path, tmp_path: Path) -> None:
    english = [Document(" ".join(["hello there you are here"] * (3 + i % 3))) for i in range(20)]
    chinese = [Document("你好人民法院。" * (3 + i % 4), meta={}) for i in range(20)]
    for name, rows in (("en", english), ("zh", chinese)):
        write(tmp_path / name, "documents", rows)
    train = {"batch_size": 4, "dtype": "float32", "log_every": 2}
    checked = recipe.from_values({"name": "texts", "stages": {
        "base": {
            "use": "train.pretrain", "data": str(tmp_path / "en"), "tokenizer": str(root / "fresh"), "seq_len": 32,
            "tokens": 2048, "model": {"hidden": 32, "layers": 2, "head_dim": 8, "context": 64}, "train": train,
            "replay": {"data": str(tmp_path / "zh"), "share": 0.25},
        },
        "further": {
            "use": "train.continue", "model": "base", "data": str(tmp_path / "zh"), "tokens": 512, "seq_len": 32,
            "ewc": {"data": str(tmp_path / "en"), "rows": 3, "strength": 5}, "train": train,
            "forgetting": {"data": [str(tmp_path / "en"), str(root / "english_held")], "rows": 5},
        },
        "adapted": {
            "use": "train.sft", "model": "further", "data": str(root / "english"), "lora": {"rank": 2},
            "ewc": {"data": str(tmp_path / "zh"), "rows": 2}, "train": {"steps": 2, "batch_size": 4, "log_every": 1},
        },
        "wrong": {
            "use": "train.continue", "model": "base", "data": str(tmp_path / "zh"), "tokens": 512, "seq_len": 32,
            "ewc": {"data": str(root / "preferences")}, "train": train,
        },
    }})  # fmt: skip
    chain = Chain(checked, tmp_path / "chain")
    assert chain("base").metrics["steps"] == 16
    assert {"loss/new", "loss/zh"} <= {e.name for e in chain.heard["base"] if e.kind == "metric"}
    assert chain("base").metrics["epochs"] > 0
    chain("further")
    pulls = [float(e.value) for e in chain.heard["further"] if e.kind == "metric" and e.name == "ewc"]
    assert len(pulls) == 2 and pulls[1] > 0
    told = chain("further").metrics
    assert {"forgetting_en", "forgetting_english_held"} <= set(told)
    assert 0 < told["forgetting_en_before"] < 8, "bits a byte"
    chain("adapted")
    pulls = [float(e.value) for e in chain.heard["adapted"] if e.kind == "metric" and e.name == "ewc"]
    assert pulls[0] == 0 < pulls[1], "of an adapter on a base in bf16, too"
    with pytest.raises(FledgeError, match="nothing is to be learned"):
        chain("wrong")


@pytest.mark.parametrize(
    "stage, words",
    [
        (DirectPreferences(model="m", data="d", train={"dropout": {"attention": 0.1}}), "without dropout"),
        (Pretrain(data="d", tokenizer="t", model={"size": "1M"}, tokens=100, train={"dropout": {"hidden": 0.1}}),
         "part of the model"),
    ],
)  # fmt: skip
def test_dropout_where_it_would_do_nothing_is_refused(stage: Any, words: str) -> None:
    assert any(words in problem.what for problem in stage.check())


def test_dropout_is_active_in_training_and_nowhere_else(root: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    names, ids = tokenizer(), torch.arange(4, 40)[None]
    config = GPT2Config(vocab_size=len(names), n_embd=16, n_layer=2, n_head=2, n_positions=64,
                        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)  # fmt: skip
    save_model(GPT2LMHeadModel(config), names, tmp_path / "gpt2", names.chat_template)
    for folder, parts in ((root / "fresh", ("attention",)), (tmp_path / "gpt2", ("attention", "hidden", "embedding"))):
        for part in parts:
            policy = open_policy(folder, TrainSettings(dropout={part: 0.5}), None, 0)
            asked = []
            for training in (True, True, False, False):
                policy.model.train(training)
                asked.append(policy.model(ids, use_cache=False).logits.detach())
            assert not torch.equal(asked[0], asked[1]) and torch.equal(asked[2], asked[3]), part
        plain = open_policy(folder, TrainSettings(), None, 0).model.train()
        assert torch.equal(plain(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        adapted = open_policy(
            folder, TrainSettings(dropout={"attention": 0.5}, dtype="float32"), LoRA(rank=2), 0
        ).model.train()
        assert not torch.equal(adapted(ids, use_cache=False).logits, adapted(ids, use_cache=False).logits)
    with pytest.raises(FledgeError, match="dropout"):
        open_policy(root / "fresh", TrainSettings(dropout={"pooler": 0.1}), None, 0)


def test_general_data_may_be_named_or_not() -> None:
    names = {"english_held_out": "english.held_out", "wiki": "/data/wiki"}
    for given in (names, list(names.values())):
        assert {name: ref.text for name, ref in Forgetting(data=given).data.items()} == names
    assert list(Forgetting(data="english.held_out").data) == ["english_held_out"]


def test_what_cannot_be_measured_is_said(root: Path, chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(FledgeError, match="preferences"):
        checked = recipe.from_values(
            {"name": "x", "stages": {"a": {
                "use": "train.sft", "model": str(root / "fresh"), "data": str(root / "english"),
                "forgetting": {"data": {"p": str(root / "preferences")}}, "train": {"steps": 1}}}}
        )  # fmt: skip
        Chain(checked, tmp_path)("a")


# --- folds -----------------------------------------------------------------------------------------------------------


def folds_recipe(root: Path, k: int = 3, **inner: Any) -> dict[str, Any]:
    return {
        "name": "folds",
        "stages": {
            "folds": {"use": "data.split", "data": str(root / "english"), "folds": 3, "stratify": "topic"},
            "models": {
                "use": "train.cross_validate", "folds": "folds", "k": k,
                "stage": {
                    "use": "train.sft", "model": str(root / "fresh"),
                    "train": {"batch_size": 8, "max_length": 64, "dtype": "float32", "lr": 5e-3, "steps": 6}, **inner,
                },
            },
            "merged": {"use": "train.sft", "model": "models.3", "data": "folds.2", "train": {"steps": 1}},
        },
    }  # fmt: skip


def test_k_models_come_from_one_stage_and_their_spread_is_told(root: Path, tmp_path: Path) -> None:
    chain = Chain(recipe.from_values(folds_recipe(root)), tmp_path)
    models = chain("models")
    assert list(models) == ["1", "2", "3"] and all(type(m) is Model for m in models.values())
    parts = chain("folds")
    held = [{r.id for r in shards.read(parts[str(k)], "conversations")} for k in (1, 2, 3)]
    taught = [{r.id for r in shards.read(parts[f"train_{k}"], "conversations")} for k in (1, 2, 3)]
    assert all(not mine & learned for mine, learned in zip(held, taught, strict=True))
    losses = [models[k].metrics["answer_loss"] for k in models]
    assert len(set(losses)) == 3 and all(models[k].metrics["rows"] == len(taught[int(k) - 1]) for k in models)
    for model in models.values():
        assert model.metrics["folds"] == 3
        assert model.metrics["answer_loss_mean"] == pytest.approx(sum(losses) / 3)
        spread = (sum((x - sum(losses) / 3) ** 2 for x in losses) / 2) ** 0.5
        assert model.metrics["answer_loss_sd"] == pytest.approx(spread)
    digests = {k: sha256_of(model.path / "model.safetensors") for k, model in models.items()}
    assert len(set(digests.values())) == 3
    assert {"fold_1/loss", "fold_3/loss"} <= {e.name for e in chain.heard["models"] if e.kind == "metric"}
    chain("merged")

    folder, node = tmp_path / "models", chain.recipe.node("models")
    asked: list[str] = []
    kept = next(p for p in folder.iterdir() if p.name.endswith("fold-2"))
    (kept / "fold.json").unlink()  # as if it had been killed in the second fold
    job = Job(
        "models", tmp_path / "again", folder, 0, Execution(), Emitter("x", 1, lambda e: asked.append(str(e.value))),
        {ref.text: _input(chain, node, dotted) for dotted, ref in node.stage.references().items()},
    )  # fmt: skip
    job.out.mkdir()
    again = node.stage.run(job)
    assert [text for text in asked if text.startswith("fold ")] == ["fold 2 of 3"]
    assert {k: sha256_of(m.path / "model.safetensors") for k, m in again.items()} == digests


def _input(chain: Chain, node: Any, dotted: str) -> Artifact:
    if dotted in node.parents:
        parent, part = node.parents[dotted]
        found: Artifact = chain(parent)[part]
        return found
    ref = node.stage.references()[dotted]
    return ref.kinds[0](node.outside[ref.text].path)  # type: ignore[no-any-return]


def test_classifiers_are_cross_validated_in_order_of_time(root: Path, tmp_path: Path) -> None:
    rows = [
        Labelled(
            f"{q} {i}", "greeting" if q == "hello" else "other", meta={"day": f"2024年{1 + i // 28}月{1 + i % 28}日"}
        )
        for i, (q, _) in enumerate(random.Random(5).choices(ENGLISH, k=60))
    ]
    write(tmp_path / "labelled", "labelled", rows)
    checked = recipe.from_values({"name": "x", "stages": {
        "parts": {"use": "data.split", "data": str(tmp_path / "labelled"), "folds": 2, "time": "day"},
        "models": {"use": "train.cross_validate", "folds": "parts", "k": 2, "stage": {
            "use": "train.classify", "model": str(root / "fresh"), "train": {"steps": 2, "batch_size": 4}}},
    }})  # fmt: skip
    models = Chain(checked, tmp_path)("models")
    assert list(models) == ["1", "2"] and {type(m) for m in models.values()} == {TaskModel}
    accuracy = [models[k].metrics["accuracy"] for k in models]
    assert models["1"].metrics["accuracy_mean"] == pytest.approx(sum(accuracy) / 2)


def test_a_fold_s_stage_is_checked_and_is_part_of_the_fingerprint(root: Path) -> None:
    def problems(**changes: Any) -> str:
        with pytest.raises(FledgeError) as caught:
            recipe.from_values(folds_recipe(root, **changes))
        return str(caught.value)

    assert 'no output "4"' in problems(k=4)
    assert 'unknown key "stepz"' in problems(train={"stepz": 2}) and "stage.train.stepz" in problems(train={"stepz": 2})
    assert "brings its own" in problems(data="x")
    assert "cannot be run fold by fold" in problems(use="train.pretrain2")
    assert "two folds or more" in problems(k=1)
    assert "cannot be run fold by fold" in problems(use="train.pretrain"), "it has several held-out texts"
    node = recipe.from_values(folds_recipe(root)).node("models")
    references = node.stage.references()
    assert {ref.expects for key, ref in references.items() if key != "stage.model"} == {"conversations"}
    described = json.dumps(describe(node, {"folds": "f"}), sort_keys=True)
    assert '"model": "→"' in described.encode().decode("unicode_escape") or "\\u2192" in described
    other = recipe.from_values(folds_recipe(root, train={"steps": 7})).node("models")
    assert json.dumps(describe(other, {"folds": "f"}), sort_keys=True) != described
    assert CrossValidate.model_validate(node.stage.config_values()).config_values() == node.stage.config_values()
    renamed = folds_recipe(root)
    renamed["stages"]["parts"] = renamed["stages"].pop("folds")
    renamed["stages"]["models"]["folds"] = "parts"
    renamed["stages"]["merged"]["data"] = "parts.2"
    assert describe(recipe.from_values(renamed).node("models"), {"parts": "f"}) == describe(node, {"folds": "f"})


def test_means_and_deviations_are_of_what_every_fold_measured() -> None:
    found = over_folds([{"a": 1.0, "b": 2, "c": "x", "d": True}, {"a": 3.0, "b": 2, "d": False}, {"a": 5.0, "b": 2}])
    assert found == {"folds": 3, "a_mean": 3.0, "a_sd": 2.0, "b_mean": 2.0, "b_sd": 0.0}
