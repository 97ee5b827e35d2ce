"""Whether a model can be divided as a layout says, known from its numbers alone, before anything loads.

Imports nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.core.stage import Execution, Layout
from fledge.training.layout.families import FAMILIES

if TYPE_CHECKING:
    from fledge.models.architecture import Architecture

WHERE = "execution.layout"
GROWING = ("dynamic", "longrope")
"""Kinds of scaling of rotary positions that look at the longest text at hand."""
CONTEXT_DEVICES = {"cuda", "auto"}
"""Kinds of devices on which the tokens of a row are divided; `auto` is asked again when it is known."""


@dataclass(frozen=True)
class Facts:
    """What a layout has to know of a model."""

    family: str
    """`model_type` of config.json"""
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    quantized: bool = False
    growing: bool = False
    """whether rotary positions depend on the longest text at hand"""

    @classmethod
    def of_shape(cls, shape: Architecture) -> Facts:
        """Those of a model that is to be built."""
        growing = (shape.rope_scaling or {}).get("rope_type") in GROWING
        return cls(shape.family, shape.layers, shape.heads, shape.kv_heads, shape.intermediate, growing=growing)

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Facts:
        """Those in a config.json, in whichever words its family uses."""

        def first(*names: str, default: int = 0) -> int:
            return next((int(config[name]) for name in names if config.get(name)), default)

        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        heads, hidden = first("num_attention_heads", "n_head"), first("hidden_size", "n_embd", "d_model")
        return cls(
            str(config.get("model_type", "")), first("num_hidden_layers", "n_layer", "num_layers"), heads,
            first("num_key_value_heads", default=heads), first("intermediate_size", "n_inner", default=4 * hidden),
            "quantization_config" in config, rope.get("rope_type", rope.get("type")) in GROWING,
        )  # fmt: skip


def check_layout(
    facts: Facts | None, layout: Layout, processes: int, device: str = "auto", optimizer: str = "adamw"
) -> Iterator[Problem]:
    """Everything that speaks against training a model of these numbers (None: not known yet) under a layout."""
    try:
        layout = layout.resolve(processes)
    except FledgeError as error:
        yield from error.problems
        return
    yield from check_device(layout, device)
    if layout.context > 1 and layout.tensor * layout.pipeline > 1:
        yield Problem(
            t("the tokens of a row are divided by context, or a layer by tensor or pipeline, not both"),
            where=f"{WHERE}.context",
            found=f"tensor: {layout.tensor}, pipeline: {layout.pipeline}",
            fix=t("tensor divides the sequence between the matrices as well; shard and replicate go with context"),
        )
    divided = layout.shard * layout.context * layout.tensor > 1
    if optimizer == "adafactor" and divided:
        yield Problem(
            t("adafactor's rows and columns cannot be divided among processes"),
            where=WHERE,
            fix=t("take adamw or muon, or divide by replicate and pipeline only"),
        )
    if optimizer.endswith("8bit") and divided:
        yield Problem(
            t("8-bit states are kept in blocks, which a division of matrices cuts"),
            where=WHERE,
            fix=t("take adamw or muon, or divide by replicate and pipeline only"),
        )
    if facts is None:
        return
    if facts.quantized and (divided or layout.pipeline > 1):
        yield Problem(t("quantised weights cannot be divided"), where=WHERE, fix=t("take layout: ddp"))
    if layout.tensor > 1:
        yield from _tensor(facts, layout.tensor)
    if layout.pipeline > 1:
        yield from _pipeline(facts, layout)
    if layout.context > 1:
        yield from _context(facts)


def require_layout(folder: Path, execution: Execution, processes: int, optimizer: str = "adamw") -> None:
    """Refuse to train the model in `folder` (an adapter's base) under a layout that it cannot take."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        named = Path(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
        folder = next((p for p in (folder / named, folder.parent / named.name) if p.is_dir()), folder)
    if not (folder / "config.json").is_file():
        return  # what is wrong with the folder is told by whoever loads it
    facts = Facts.of_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    problems = list(check_layout(facts, execution.layout, processes, execution.device, optimizer))
    if problems:
        raise FledgeError(*problems)


def check_device(layout: Layout, device: str) -> Iterator[Problem]:
    """What speaks against a layout on a device (`cpu`, `cuda:0`; `auto`: not known yet)."""
    if layout.context > 1 and device.partition(":")[0] not in CONTEXT_DEVICES:
        yield Problem(
            t("the tokens of a row are divided on graphics cards only"),
            where=f"{WHERE}.context",
            found=f"device: {device}",
            fix=t(
                "attention on processors is made for whole rows: divide by shard, or by tensor, which divides the"
                " sequence outside attention"
            ),
        )


def _tensor(facts: Facts, processes: int) -> Iterator[Problem]:
    if facts.family not in FAMILIES:
        yield _unknown(facts.family, "tensor")
        return
    for what, number in (
        (t("attention heads"), facts.heads),
        (t("key and value heads"), facts.kv_heads),
        (t("the feed-forward layer's width"), facts.intermediate),
    ):
        if number % processes:
            yield Problem(
                t("{what} cannot be divided evenly", what=what),
                where=f"{WHERE}.tensor",
                found=t("{number} among {processes} processes", number=number, processes=processes),
                allowed=listing([str(n) for n in range(1, number + 1) if _divides(n, facts)]),
                fix=t("divide by shard for the rest: every process then has all heads"),
            )


def _pipeline(facts: Facts, layout: Layout) -> Iterator[Problem]:
    if facts.family not in FAMILIES:
        yield _unknown(facts.family, "pipeline")
        return
    stages = layout.pipeline * (2 if layout.schedule in ("interleaved", "zero_bubble") else 1)
    if facts.layers < stages:
        yield Problem(
            t("there are fewer layers than stages of the pipeline"),
            where=f"{WHERE}.pipeline",
            found=t("{layers} layers, {stages} stages", layers=facts.layers, stages=stages),
            fix=t("take fewer stages; interleaved and zero_bubble give each process two"),
        )


def _context(facts: Facts) -> Iterator[Problem]:
    if facts.family not in FAMILIES:
        yield _unknown(facts.family, "context")
    elif facts.growing:
        yield Problem(
            t("these rotary positions depend on the longest text at hand, which no part of a row knows"),
            where=f"{WHERE}.context",
            found=listing(list(GROWING)),
            fix=t("divide by shard, or extend the context with yarn or linear"),
        )


def _divides(processes: int, facts: Facts) -> bool:
    return not any(number % processes for number in (facts.heads, facts.kv_heads, facts.intermediate))


def _unknown(family: str, key: str) -> Problem:
    return Problem(
        t("models of this family cannot be divided so"),
        where=f"{WHERE}.{key}",
        found=family,
        allowed=listing(sorted(FAMILIES)),
        fix=t("divide by shard, which takes every model"),
    )
