"""Every family: built, trained for a step, saved, loaded by transformers alone, and compared. The table in the docs.

`FLEDGE_WRITE_DOCS=1` writes what is measured into docs/architectures.md and docs/zh/architectures.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSeq2SeqLM,
)

from fledge.core.events import Emitter
from fledge.models.build import build_model
from fledge.models.families import BOTH, DECODER, FAMILIES
from fledge.models.save import save_model
from fledge.models.shape import Architecture, ModelShape
from fledge.training.likelihood import head_of, hidden_states
from fledge.training.objective import Batch
from fledge.training.objectives.bidirectional import encoder_states, head_over_vocabulary, seq2seq_states
from fledge.training.objectives.causal_lm import CausalLM
from fledge.training.objectives.masked_lm import MaskedLM
from fledge.training.trainer import Trainer
from tests.training.toys import Packed, settings, tokenizer

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- measured: {name} -->", "<!-- /measured -->"
BOUND = 1e-5
LENGTH, STARTS = 24, (0, 9, 10, 17)

GIVEN: dict[str, dict[str, Any]] = {
    **{name: {"family": name} for name in FAMILIES},
    "mistral": {"family": "mistral", "window": 8},
    "baichuan (13B)": {"family": "baichuan", "positions": "alibi"},
    "electra (generator)": {"family": "electra"},
    "t5": {"family": "t5", "decoder_layers": 3},
}


def shape_of(
    name: str, vocab: int, hidden: int = 48, layers: int = 2, heads: int = 6, context: int = 64
) -> Architecture:
    given = dict(GIVEN[name])
    if hidden > 48:
        given.pop("decoder_layers", None)
    shape = ModelShape(hidden=hidden, layers=layers, heads=heads, **given).resolve(vocab, context, pad_id=3)
    return shape.generator(0.5) if name.endswith("(generator)") else shape


def build(name: str, names: Any) -> tuple[Architecture, Any]:
    shape = shape_of(name, len(names))
    return shape, build_model(shape, 5, names)


# -- one training step -------------------------------------------------------------------------------------------------
class Masked(Packed):
    """Packed rows of which every fourth token is masked."""

    def batch(self, step: int) -> dict[str, Any]:
        made = super().batch(step)
        at = (torch.arange(made["input_ids"].size) % 4 == 1).reshape(made["input_ids"].shape).numpy()
        made["labels"] = made["labels"].copy()
        made["labels"][~at], made["input_ids"][at] = -100, 4
        return made


def train(shape: Architecture, model: Any, events: Emitter) -> None:
    """A step of the Trainer; of transformers' own loss where the objective has batches of its own kind."""
    if shape.kind == DECODER or shape.head == "generator" or shape.about.model.endswith("ForMaskedLM"):
        objective = CausalLM() if shape.kind == DECODER else MaskedLM()
        source = Packed(length=LENGTH) if shape.kind == DECODER else Masked(length=LENGTH)
        metrics = Trainer(objective, {"model": model}, source, settings(warmup=0), 1, 7, events).fit()
        assert 2 < metrics["final_loss"] < 20
        return
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(5, 60, (4, LENGTH))
    labels = ids % 2 if shape.head == "discriminator" else ids
    model.train()(input_ids=ids, labels=labels).loss.backward()
    optimizer.step()
    model.eval()


# -- logits inside and outside -----------------------------------------------------------------------------------------
def inside(shape: Architecture, model: Any, batch: Batch) -> torch.Tensor:
    """The logits that the objectives see."""
    if shape.kind == DECODER:
        states, head = hidden_states(model, batch), head_of(model)
    elif shape.kind == BOTH:
        states, (_, head) = seq2seq_states(model, batch), head_over_vocabulary(model)
    elif shape.head == "discriminator":
        logits: torch.Tensor = model.discriminator_predictions(encoder_states(model, batch))
        return logits
    else:
        transform, head = head_over_vocabulary(model)
        states = transform(encoder_states(model, batch))
    logits = states @ head.weight.T
    return logits if head.bias is None else logits + head.bias


def outside(shape: Architecture, theirs: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the class that transformers loads, for one text a row."""
    extra: dict[str, Any] = {"decoder_input_ids": ids} if shape.kind == BOTH else {}
    extra |= {"use_cache": False} if shape.kind != "encoder" else {}
    found: torch.Tensor = theirs(input_ids=ids, **extra).logits
    return found


def as_batch(shape: Architecture, ids: torch.Tensor, starts: tuple[int, ...]) -> Batch:
    """Rows in which documents begin at `starts`."""
    positions = torch.arange(LENGTH).repeat(len(ids), 1)
    for start in starts:
        positions[:, start:] = torch.arange(LENGTH - start)
    documents = (positions == 0).cumsum(dim=-1)
    if shape.kind == BOTH:
        return {"input_ids": ids, "decoder_input_ids": ids, "documents": documents, "decoder_documents": documents}
    return {"input_ids": ids, "position_ids": positions}


def auto(shape: Architecture) -> Any:
    if shape.head == "discriminator":
        return AutoModelForPreTraining
    return {"decoder": AutoModelForCausalLM, "encoder": AutoModelForMaskedLM, BOTH: AutoModelForSeq2SeqLM}[shape.kind]


# -- the measurement ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Measured:
    shape: Architecture
    built: int
    loaded: str
    alone: float
    """largest difference of a logit between the Trainer's path and the reloaded model, one text a row"""
    packed: float
    """the same with several texts in a row, each compared with the text alone"""


@cache
def measured(name: str, folder: Path) -> Measured:
    torch.set_num_threads(1)
    names = tokenizer()
    shape, model = build(name, names)
    built = sum(p.numel() for p in model.parameters())
    train(shape, model, Emitter("test", 0, lambda event: None))
    save_model(model, names, folder / name)
    theirs = auto(shape).from_pretrained(folder / name, dtype=torch.float32).eval()
    ids = torch.randint(5, 290, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        alone = inside(shape, model, as_batch(shape, ids, (0,))) - outside(shape, theirs, ids)
        together = inside(shape, model, as_batch(shape, ids, STARTS))
        packed = max(
            float((together[:, a:b] - outside(shape, theirs, ids[:, a:b])).abs().max())
            for a, b in zip(STARTS, [*STARTS[1:], LENGTH], strict=True)
        )
    return Measured(shape, built, type(theirs).__name__, float(alone.abs().max()), packed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_a_family_is_what_transformers_loads(name: str, folder: Path) -> None:
    found = measured(name, folder)
    assert found.built == found.shape.parameters
    assert found.loaded == found.shape.about.model or found.shape.head == "generator"
    assert found.alone < BOUND
    assert found.packed < BOUND


def test_the_same_seed_gives_the_same_weights_in_every_family() -> None:
    names = tokenizer()
    for name in GIVEN:
        torch.manual_seed(5)
        expected = torch.rand(1)
        torch.manual_seed(5)
        (_, first), (_, second) = build(name, names), build(name, names)
        assert torch.equal(torch.rand(1), expected)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# -- the docs ----------------------------------------------------------------------------------------------------------
HEADINGS = {
    "": ("family", "class in transformers", "attention", "positions", "parameters", "same logits", "texts share a row"),
    "zh": ("系列", "transformers 中的类", "注意力", "位置", "参数量", "logits 一致", "多篇文本同处一行"),
}
KINDS = {
    "": {"decoder": "Decoders", "encoder": "Encoders", BOTH: "Encoder-decoders"},
    "zh": {"decoder": "仅解码器", "encoder": "仅编码器", BOTH: "编码器-解码器"},
}
ANSWERS = {"": ("yes", "no"), "zh": ("是", "否")}
WINDOW = {"": "window", "zh": "窗口"}
PARTS = {"": ("family", "parts → keys of the config"), "zh": ("系列", "部位 → 配置项")}


def families_table(language: str, folder: Path) -> str:
    """Parameters are at 12 layers of 768 and 12 heads, 32,000 tokens, 1,024 positions."""
    yes, no = ANSWERS[language]
    lines = [_line(HEADINGS[language]), _line(["---"] * len(HEADINGS[language]))]
    for kind, title in KINDS[language].items():
        lines.append(_line([f"**{title}**", *[""] * (len(HEADINGS[language]) - 1)]))
        for name in GIVEN:
            found = measured(name, folder)
            if found.shape.kind != kind:
                continue
            at = shape_of(name, 32_000, 768, 12, 12, 1024)
            family = FAMILIES[found.shape.family]
            ways = [way for way in ("mha", "gqa", "mqa") if way in family.attention]
            attention = ", ".join([*ways, *([WINDOW[language]] if family.window else [])])
            lines.append(
                _line([
                    name, f"`{found.loaded}`", attention, found.shape.positions, f"{at.parameters / 1e6:.1f} M",
                    yes if found.alone < BOUND else no, yes if found.packed < BOUND else no,
                ])
            )  # fmt: skip
    return "\n".join(lines)


def dropout_table(language: str, folder: Path) -> str:
    lines = [_line(PARTS[language]), _line(["---"] * 2)]
    for name, family in FAMILIES.items():
        parts = [f"{part} → {', '.join(f'`{key}`' for key in keys)}" for part, keys in family.dropout.items()]
        lines.append(_line([name, "; ".join(parts)]))
    return "\n".join(lines)


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


TABLES: dict[str, Callable[[str, Path], str]] = {"families": families_table, "dropout": dropout_table}


@pytest.mark.parametrize("language", ["", "zh"])
def test_the_docs_say_what_is_measured(language: str, folder: Path) -> None:
    page = ROOT / "docs" / language / "architectures.md"
    text = page.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        begin = BEGIN.format(name=name)
        before, _, rest = text.partition(begin)
        old, _, after = rest.partition(END)
        assert rest and after, f"{page} has no place for the table of {name}"
        new = f"\n{table(language, folder)}\n"
        if os.environ.get("FLEDGE_WRITE_DOCS"):
            text = before + begin + new + END + after
            page.write_text(text, encoding="utf-8")
        else:
            assert old == new, f"{page} is not what was measured: run this test with FLEDGE_WRITE_DOCS=1"
