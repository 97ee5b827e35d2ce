"""Whether a run fits into memory, and if not, the cheapest changes that make it fit. Every change is checked again by
the same estimate before it is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fledge.core.errors import Problem
from fledge.core.language import t
from fledge.core.stage import Layout
from fledge.core.units import show_bytes
from fledge.training.estimation.memory import Surroundings, memory_of, optimizer_bytes
from fledge.training.estimation.plan import Plan, sharded

TOLERANCE = 0.15
"""How far the estimate may be off: refused is what would not fit even so."""


ROWS = "execution.micro_batch"
WHOLE = ("adafactor", "adamw8bit")
"""Optimizers that need whole matrices: moments in blocks of 256, or by row and column."""


@dataclass(frozen=True)
class Change:
    """Something to change, and the bytes a device that the run takes then."""

    what: str
    plan: Plan
    memory: float


def too_large(
    plan: Plan, around: Surroundings, available: float, *, adapters: bool = False, devices: int = 1, rows: str = ROWS
) -> Problem | None:
    """The problem with a run that cannot fit into `available` bytes a device; None where it may fit."""
    memory = memory_of(plan, around)
    if not available or memory.total * (1 - TOLERANCE) <= available:
        return None
    parts = sorted(memory.parts(), key=lambda part: -part[1])[:4]
    changes = list(changes_that_fit(plan, around, available, adapters=adapters, devices=devices, rows=rows))
    advice = "; ".join(
        t("{change} ({memory})", change=change.what, memory=show_bytes(change.memory)) for change in changes
    )
    return Problem(
        t("the training does not fit into memory"),
        found=t("about {memory} a device", memory=show_bytes(memory.total))
        + ": " + ", ".join(f"{t(name)} {show_bytes(size)}" for name, size in parts),
        allowed=show_bytes(available),
        fix=t("what makes it fit: {changes}", changes=advice) if changes
        else t("a smaller model, or a machine with more memory; nothing else makes it fit"),
    )  # fmt: skip


def changes_that_fit(
    plan: Plan, around: Surroundings, available: float, *, adapters: bool = False, devices: int = 1, most: int = 3,
    rows: str = ROWS,
) -> Iterator[Change]:  # fmt: skip
    """The cheapest changes with which the run fits, at most `most`: one alone where that is enough, else together.

    `adapters`: whether the stage can train an adapter; `devices`: how many there are on which to divide it (0: as many
    as it takes); `rows`: the key that says how many rows there are at once.
    """
    steps = list(_levers(plan, adapters, rows))
    found = [change for what, changed in steps if (change := _tried(what, changed, around, available))]
    if not found:
        found = list(_together(plan, steps, around, available, rows))[:1]
    found += _divided(plan, around, available, devices)
    yield from found[:most]


def _levers(plan: Plan, adapters: bool, rows: str) -> Iterator[tuple[str, Plan]]:
    """Changes from the cheapest to the dearest: the first leave the result as it is."""
    fewer = plan.micro_batch
    while fewer > 1:
        fewer = fewer // 2
        yield f"{rows}: {fewer}", replace(plan, micro_batch=fewer, accumulated=True)
    if not plan.checkpointing:
        name = "execution.activation_checkpointing: on"
        yield name + t(" (a third more time)"), replace(plan, checkpointing=True)
        if plan.micro_batch > 1:
            small = replace(plan, checkpointing=True, micro_batch=1, accumulated=True)
            yield f"{name}, {rows}: 1", small
    whole = sharded(plan.layout) == plan.layout.tensor == 1
    for name in ("adamw8bit", "adafactor") if whole and not plan.lora_rank else ():
        changed = replace(plan, optimizer=name)
        if optimizer_bytes(changed) < optimizer_bytes(plan):
            yield f"train.optimizer: {name}", changed
    if adapters and not plan.lora_rank:
        yield "lora: {rank: 16}", replace(plan, lora_rank=16)


def _tried(what: str, plan: Plan, around: Surroundings, available: float) -> Change | None:
    memory = memory_of(plan, around).total
    return Change(what, plan, memory) if memory * (1 + TOLERANCE) <= available else None


def _together(
    plan: Plan, steps: Sequence[tuple[str, Plan]], around: Surroundings, available: float, rows: str
) -> Iterator[Change]:
    """The least memory of each kind of change, one on top of the other, until it fits."""
    names: list[str] = []
    now = plan
    if plan.micro_batch > 1:
        names, now = [f"{rows}: 1"], replace(now, micro_batch=1, accumulated=True)
    if not plan.checkpointing:
        names, now = [*names, "execution.activation_checkpointing: on"], replace(now, checkpointing=True)
    for what, changed in steps:
        if changed.optimizer != plan.optimizer or changed.lora_rank != plan.lora_rank:
            combined = replace(now, optimizer=changed.optimizer, lora_rank=changed.lora_rank)
            if change := _tried(", ".join([*names, what]), combined, around, available):
                yield change


def _divided(plan: Plan, around: Surroundings, available: float, devices: int) -> list[Change]:
    """The smallest number of devices, a power of two, among which ZeRO-3 divides it so that it fits."""
    if plan.optimizer in WHOLE:
        return []
    number = 2
    while number <= (devices or 65_536):
        layout = Layout(replicate=1, shard=0).resolve(number)
        name = f"--processes {number}, execution.layout: zero3"
        if change := _tried(name, replace(plan, layout=layout), around, available):
            return [change]
        number *= 2
    return []
