"""Longer contexts: what scaling does to the positions of a trained model, and what it is refused for."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fledge.core.artifact import Documents, Model, files_of
from fledge.core.errors import FledgeError
from fledge.core.events import Emitter
from fledge.core.job import Job
from fledge.core.stage import Execution
from fledge.models.adapters import LoRA, add_lora
from fledge.models.build import build_model
from fledge.models.extension import extend_folder
from fledge.models.load import context_of, load_model
from fledge.models.rope import RopeScaling
from fledge.models.save import save_model
from fledge.models.shape import ModelShape
from fledge.models.stages import ExtendContext
from fledge.records.kinds import Document
from fledge.records.shards import ShardWriter
from tests.training.toys import tokenizer

SHORT, FACTOR, LAG = 32, 8, 7
LONG = SHORT * FACTOR


def rows(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Rows that repeat themselves every 7 tokens: who looks exactly so far back knows what comes."""
    pattern = torch.randint(1, 16, (count, LAG), generator=generator)
    return pattern.repeat(1, length // LAG + 1)[:, :length]


def learn(model: Any, steps: int, count: int, length: int, lr: float) -> None:
    generator = torch.Generator().manual_seed(length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        ids = rows(count, length, generator)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def far_out(model: Any) -> float:
    """Nats a token at the end of long rows, where the trained context is left four times over."""
    ids = rows(16, LONG, torch.Generator().manual_seed(99))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return float(nats[:, 4 * SHORT :].mean())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt rows of 32 tokens."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    shape = ModelShape(hidden=64, layers=2, heads=2, attention="mha").resolve(300, SHORT)
    model = build_model(shape, 1)
    learn(model, 250, 16, SHORT, 4e-3)
    torch.set_num_threads(before)
    folder = tmp_path_factory.mktemp("trained")
    save_model(model, tokenizer(), folder)
    return folder


def test_stretched_positions_beat_plain_extrapolation_before_and_after_tuning(trained: Path, tmp_path: Path) -> None:
    """At eight times the length. YaRN's bands are set for a context of 32 tokens: its own defaults are for thousands.

    Interpolation alone (PI) blurs the fast pairs, by which the model knows how far 7 tokens are: it needs the tuning.
    """
    torch.set_num_threads(1)
    bands = {"yarn": {"beta_fast": 2, "beta_slow": 0.25}}
    before, after = {"plain": far_out(load_model(trained))}, {}
    for method in ("linear", "ntk", "yarn"):
        scaling = RopeScaling(method=method, factor=FACTOR, **bands.get(method, {}))
        metrics = extend_folder(trained, tmp_path / method, scaling)
        assert (metrics["context_before"], metrics["context"]) == (SHORT, LONG)
        before[method] = far_out(load_model(tmp_path / method))
    assert max(before["ntk"], before["yarn"]) < before["plain"] - 0.3
    for method, steps in (("plain", 20), ("ntk", 20), ("yarn", 20), ("linear", 30)):
        model = load_model(trained if method == "plain" else tmp_path / method, trainable=True)
        learn(model, steps, 4, LONG, 1e-3 if steps == 20 else 3e-3)
        after[method] = far_out(model)
    assert max(after["ntk"], after["yarn"]) < after["plain"] - 0.2
    assert after["linear"] < before["linear"] - 0.3


def frequencies(folder: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


@pytest.mark.parametrize("method", ["linear", "ntk", "dynamic", "yarn", "llama3"])
def test_frequencies_are_those_of_the_papers(method: Any, trained: Path, tmp_path: Path) -> None:
    scaling = RopeScaling(method=method, factor=4)
    extend_folder(trained, tmp_path / method, scaling)
    width, base = 32, 10_000.0
    pairs = torch.arange(0, width, 2, dtype=torch.float64) / width
    plain = base**-pairs
    turns = SHORT * plain / (2 * math.pi)  # within the old context
    if method == "linear":
        expected = plain / 4
    elif method == "ntk":
        expected = (base * 4 ** (width / (width - 2))) ** -pairs
        assert expected[-1] == pytest.approx(float(plain[-1]) / 4) and expected[0] == 1
    elif method == "dynamic":
        expected = plain  # nothing is stretched before the text is longer than the old context
    elif method == "llama3":
        share = ((turns - 1) / (4 - 1)).clamp(0, 1)
        expected = (1 - share) * plain / 4 + share * plain
    else:  # YaRN's ramp goes over the index of the pair, between those that turn 32 times and once
        found = [width * math.log(SHORT / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1)]
        low, high = max(math.floor(found[0]), 0), min(math.ceil(found[1]), width - 1)
        kept = 1 - ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1)
        expected = plain / 4 * (1 - kept) + plain * kept
    torch.testing.assert_close(frequencies(tmp_path / method).double(), expected, rtol=1e-5, atol=0)
    assert context_of(load_model(tmp_path / method).config) == 4 * SHORT


def test_a_model_can_be_stretched_from_the_start() -> None:
    for method in ("linear", "ntk", "dynamic", "yarn", "llama3"):
        for family in ("llama", "glm"):
            shape = ModelShape(
                family=family,
                hidden=32,
                layers=1,
                heads=4,
                rope_scaling=RopeScaling(method=method, factor=4),
                context=64,
            ).resolve(50)
            model = build_model(shape, 0)
            assert context_of(model.config) == 64 and shape.parameters == model.num_parameters()
            assert model(torch.arange(50)[None]).logits.isfinite().all()


def test_the_rest_of_the_folder_is_copied(trained: Path, tmp_path: Path) -> None:
    extend_folder(trained, tmp_path / "out", RopeScaling(factor=2))
    assert set(files_of(tmp_path / "out")) == set(files_of(trained))
    for name in set(files_of(trained)) - {"config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs = copy.deepcopy(load_model(trained).config)
    theirs.rope_parameters = {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 2.0, "original_max_position_embeddings": SHORT,
    }  # fmt: skip
    reference = LlamaForCausalLM(theirs).eval()
    reference.load_state_dict(again.state_dict())
    ids = torch.arange(40)[None]
    torch.testing.assert_close(again.eval()(ids).logits, reference(ids).logits)


@pytest.mark.parametrize(
    ("family", "reason"), [("gpt2", "learned table"), ("bloom", "distance"), ("t5", "relative"), ("bert", "no rotary")]
)
def test_other_positions_are_refused_with_the_reason(family: str, reason: str, tmp_path: Path) -> None:
    shape = ModelShape(family=family, hidden=32, layers=1, heads=4).resolve(300, 32)
    save_model(build_model(shape, 0), tokenizer(), tmp_path / family)
    with pytest.raises(FledgeError, match=reason):
        extend_folder(tmp_path / family, tmp_path / "out", RopeScaling())


def test_what_is_stretched_already_and_adapters_are_refused(trained: Path, tmp_path: Path) -> None:
    extend_folder(trained, tmp_path / "once", RopeScaling(factor=2))
    with pytest.raises(FledgeError, match="stretched already: yarn"):
        extend_folder(tmp_path / "once", tmp_path / "twice", RopeScaling(factor=2))
    save_model(add_lora(load_model(trained), LoRA(rank=2), 0), tokenizer(), tmp_path / "adapter", base=trained)
    with pytest.raises(FledgeError, match=r"model\.merge"):
        extend_folder(tmp_path / "adapter", tmp_path / "out", RopeScaling())
    with pytest.raises(ValueError, match="beta_slow"):
        RopeScaling(beta_slow=40)
    with pytest.raises(ValueError, match="low_freq_factor"):
        RopeScaling(method="llama3", low_freq_factor=4)


@pytest.mark.parametrize("text", ["hello there you are here ", "你好人民法院。"])
def test_the_stage_measures_within_and_beyond_the_old_context(text: str, trained: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "texts", "documents") as shards:
        for repeats in (30, 60):
            shards.write(Document(text * repeats))
    for name in ("out", "work"):
        (tmp_path / name).mkdir()
    inputs = {"base": Model(trained), "texts": Documents(tmp_path / "texts")}

    def run(stage: ExtendContext) -> Model:
        return stage.run(
            Job(name="long", out=tmp_path / "out", work=tmp_path / "work", seed=0, execution=Execution(),
                events=Emitter("long", 0, lambda event: None), inputs=inputs)
        )  # fmt: skip

    made = run(ExtendContext(model="base", scaling={"method": "ntk", "factor": 2}, held_out="texts", rows=2))
    assert made.metrics["context"] == 2 * SHORT
    for name in ("nats_within_before", "nats_within", "nats_beyond_before", "nats_beyond"):
        assert 0 < made.metrics[name] < 20
    assert made.metrics["nats_within"] != made.metrics["nats_within_before"]
    with pytest.raises(FledgeError, match="shorter than one row"):
        run(ExtendContext(model="base", scaling={"factor": 1000}, held_out="texts"))
