"""What ails a run, early and in words: symptoms, and what usually cures them.

It only speaks: nothing here changes a result. A symptom is told once, with the switch that cures it.

| symptom | seen in | usual remedy |
|---|---|---|
| rising, still, clipped, exploding | the curves of loss and gradient norm | the learning rate, warm-up, clipping |
| vanishing, underflow, overflow | gradient norms, the loss scale | frozen parts; bfloat16 instead of fp16 |
| unlabelled | steps on which nothing is to be learned | max_length, the chat template |
| starved | the share of time spent waiting for batches | more workers, packed tokens, local files |
| dead, silent | activations and gradients by layer | a lower rate, another activation, a smaller start |
| over-fits, forgets | the loss on held-out rows | patience, fewer epochs, an adapter, replay |
| out of memory | the error itself | a smaller micro-batch, checkpointing, an adapter |
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fledge.core.errors import FledgeError, Problem, listing
from fledge.core.language import t
from fledge.core.units import show_bytes
from fledge.training.settings import TrainSettings

if TYPE_CHECKING:
    from fledge.training.trainer import Trainer

STEPS = 200
"""How many steps in a row are looked at; half of a shorter run, but no fewer than `FEWEST`."""
FEWEST = 50
VANISHING, MOVED, RISEN, CLIPPED, GROWN = 1e-6, 5e-3, 1.1, 10.0, 10.0
UNLABELLED = 3  # steps in a row without a label
STARVED, INTERVALS, SHORT = 0.2, 4, 0.01  # share of the time, over so many points of the curves; seconds a step
DEAD, UNDERFLOWN, SMALL_SCALE = 0.9, 0.5, 2.0**3
LOOKS = (20, 100)
"""Steps (from 1) on which the layers are looked at, statistics or not."""


class Diagnosis:
    """Hears what a run measures and says what ails it. `say(name, sentence)` is called once for each name, or more."""

    def __init__(self, settings: TrainSettings, steps: int, say: Callable[[str, str], None]) -> None:
        self.settings, self.steps, self.say = settings, steps, say
        self.on = settings.diagnose == "words"
        self.window = min(STEPS, max(FEWEST, steps // 2))
        self.curve: deque[tuple[float, float]] = deque(maxlen=self.window)
        self.unlabelled = 0
        self.waits: deque[float] = deque(maxlen=INTERVALS)
        self.first_held_out = float("nan")

    @property
    def looks(self) -> tuple[int, ...]:
        """The steps on which it wants to see the layers."""
        return LOOKS if self.on else ()

    def step(self, step: int, loss: float, norm: float, rate: float, labelled: bool = True) -> None:
        """A sound step: its loss, the norm of the gradient before clipping, the rate of learning."""
        if not self.on:
            return
        self.unlabelled = 0 if labelled else self.unlabelled + 1
        if self.unlabelled == UNLABELLED:
            self.say("unlabelled", nothing_to_learn(self.settings.max_length))
        self.curve.append((loss, norm))
        # later, a loss that stands still may be a success
        if (step + 1) % FEWEST or step >= max(self.window, 0.4 * self.steps):
            return
        losses, norms = zip(*self.curve, strict=True)
        for name, sentence in symptoms(
            losses, norms, rate, self.settings.grad_clip, self.window, self.settings.dtype == "float16"
        ):
            self.say(name, sentence)

    def waited(self, share: float, seconds: float, done: int) -> None:
        """What the run waited for batches since the last point: a share of the time, and seconds a step."""
        self.waits.append(share if seconds > SHORT else 0.0)
        enough = len(self.waits) == INTERVALS and done >= LOOKS[0]
        if self.on and enough and (typical := statistics.median(self.waits)) > STARVED:
            self.say("starved", starved(typical))

    def scaled(self, scale: float) -> None:
        """The loss scale of fp16 after an overflow."""
        if self.on and scale <= SMALL_SCALE:
            self.say("overflow", overflow(scale))

    def layers(self, found: Mapping[str, float]) -> None:
        """Statistics of one step (`monitoring.statistics`)."""
        if self.on:
            for name, sentence in troubled_layers(found, self.settings.dtype == "float16"):
                self.say(name, sentence)

    def held_out(self, value: float, best: float, trained: float, waited: int, improved: bool) -> None:
        """A loss on held-out rows, the best one before it and the training's; how many measurements the best one is
        old, and whether it was better than the first."""
        if self.first_held_out != self.first_held_out:
            self.first_held_out = value
        if not self.on or not waited or not value > best or not trained < best:
            return
        if improved:
            self.say("over-fits", over_fits(best, value, trained))
        else:
            self.say("forgets", forgets(self.first_held_out, value, trained))


def symptoms(
    losses: Sequence[float], norms: Sequence[float], rate: float, bound: float, steps: int = STEPS, half: bool = False
) -> Iterator[tuple[str, str]]:
    """(name, sentence) of what is wrong with the last `steps` steps; nothing where there are fewer.

    `losses` and `norms` of the gradient before clipping, a step each; `rate` of learning; `bound` of clipping, or 0;
    `half`: the arithmetic is fp16.
    """
    if len(losses) < steps:
        return
    part = max(1, steps // 4)
    before, after = statistics.median(losses[-steps : -steps + part]), statistics.median(losses[-part:])
    norm = statistics.median(norms[-steps:])
    first, last = statistics.median(norms[-steps : -steps + part]), statistics.median(norms[-part:])
    if last > GROWN * first > 0:
        yield "exploding", t(
            "the gradient norm has grown from {before} to {after} in {steps} steps: lower the learning rate ({rate}),"
            " clip at 1 (grad_clip) or leave jumps out (spike_sigmas: 6)",
            before=f"{first:.2g}", after=f"{last:.2g}", steps=steps, rate=f"{rate:.2g}",
        )  # fmt: skip
    if after > RISEN * before:
        yield "rising", t(
            "the loss has risen from {before} to {after} in {steps} steps: lower the learning rate ({rate}) or lengthen"
            " the warm-up",
            before=f"{before:.3g}", after=f"{after:.3g}", steps=steps, rate=f"{rate:.2g}",
        )  # fmt: skip
    elif abs(before - after) < (MOVED if norm > VANISHING else 10 * MOVED) * abs(before):
        if norm < VANISHING and half:
            yield "underflow", t(
                "the loss has not moved for {steps} steps and the gradient norm is {norm}: fp16 rounds the gradients to"
                " zero; set dtype to bfloat16",
                steps=steps, norm=f"{norm:.1g}",
            )  # fmt: skip
        elif norm < VANISHING:
            yield "vanishing", t(
                "the loss has not moved for {steps} steps and the gradient norm is {norm}: nothing reaches the weights;"
                " look for frozen parts, labels that are all ignored, or a loss that is scaled down",
                steps=steps, norm=f"{norm:.1g}",
            )  # fmt: skip
        else:
            yield "still", t(
                "the loss has not moved for {steps} steps and the gradient norm is {norm}: raise the learning rate"
                " ({rate}), or see whether the labels can be learned at all",
                steps=steps, norm=f"{norm:.2g}", rate=f"{rate:.2g}",
            )  # fmt: skip
    elif bound and norm > CLIPPED * bound:
        yield "clipped", t(
            "the gradient norm is {norm}, {times} times what it is clipped to: lower the learning rate, or raise"
            " grad_clip if the loss falls all the same",
            norm=f"{norm:.2g}", times=round(norm / bound),
        )  # fmt: skip


def troubled_layers(found: Mapping[str, float], half: bool) -> Iterator[tuple[str, str]]:
    """What the statistics of one step say of single layers; `half`: the arithmetic is fp16."""
    by_name: dict[str, dict[str, float]] = {}
    for key, value in found.items():
        name, _, group = key.partition("/")
        by_name.setdefault(name, {})[group] = value
    dead = {layer: share for layer, share in by_name.get("dead", {}).items() if share > DEAD}
    if dead:
        layer, share = max(dead.items(), key=lambda item: item[1])
        yield "dead", t(
            "{share} % of the units of layer {layer} are zero for every token ({count} such layers): they learn nothing"
            " any more; lower the learning rate or lengthen the warm-up, or take an activation that does not cut off"
            " (gelu, silu)",
            share=round(100 * share), layer=layer, count=len(dead),
        )  # fmt: skip
    zeros = by_name.get("grad_zeros", {})
    share = statistics.median(zeros.values()) if zeros else 0.0
    norms = by_name.get("grad_norm", {})
    silent = [layer for layer, norm in norms.items() if norm == 0.0]
    if half and share > UNDERFLOWN and not dead:
        yield "underflow", t(
            "{share} % of the gradients are zero in fp16, too small for it: set dtype to bfloat16",
            share=round(100 * share),
        )  # fmt: skip
    elif silent and len(silent) < len(norms):
        yield "silent", t(
            "no gradient reaches {layers}: look for a part between them and the loss that lets none through, or an"
            " output that the loss does not use",
            layers=listing(silent, 6),
        )  # fmt: skip
    near = {layer: share for layer, share in by_name.get("near_limit", {}).items() if share > 0}
    if near:
        yield (
            "overflow",
            t(
                "activations of layer {layer} come near the largest number of fp16: set dtype to bfloat16",
                layer=min(near),
            ),
        )


def nothing_to_learn(max_length: int) -> str:
    """What to say when step after step has no label."""
    return t(
        "{count} steps in a row had nothing to learn, all labels are ignored: raise max_length ({length}) if the"
        " answers are cut off, and see that the chat template marks what the assistant says",
        count=UNLABELLED, length=max_length,
    )  # fmt: skip


def starved(share: float) -> str:
    """What to say when training waits for its data."""
    return t(
        "{share} % of the time goes into waiting for batches: pack the tokens beforehand (data.pack), keep the data on"
        " a local disk, or make the batches ahead of time",
        share=round(100 * share),
    )


def overflow(scale: float) -> str:
    """What to say when fp16 overflows however little the loss is scaled up."""
    return t(
        "the gradients overflow fp16 even with a loss scale of {scale}: set dtype to bfloat16, or lower the learning"
        " rate",
        scale=f"{scale:g}",
    )


def over_fits(best: float, value: float, trained: float) -> str:
    """The loss on held-out rows fell, and rises again."""
    return t(
        "the loss on held-out rows has risen again from {before} to {after} while the training's is {trained}: the"
        " model over-fits; keep the best weights (patience), train for fewer epochs, or on more varied rows",
        before=f"{best:.3f}", after=f"{value:.3f}", trained=f"{trained:.3f}",
    )  # fmt: skip


def forgets(first: float, value: float, trained: float) -> str:
    """The loss on held-out rows has only risen."""
    return t(
        "the loss on held-out rows has only risen, from {before} to {after}, while the training's is {trained}: what"
        " the model knew is being forgotten, or these rows have little in common with the training's; lower the"
        " learning rate, train an adapter, or mix earlier data in",
        before=f"{first:.3f}", after=f"{value:.3f}", trained=f"{trained:.3f}",
    )  # fmt: skip


def worse_on_held_out(before: float, after: float, trained: float) -> str:
    """What to say when training made held-out rows less likely; "" where it did not. Losses in nats."""
    if not after > before:
        return ""
    return t(
        "the loss on held-out rows has risen from {before} to {after} while the training's is {trained}: the model"
        " over-fits or forgets; train for fewer epochs, with a lower rate or an adapter, or on more varied rows",
        before=f"{before:.3f}", after=f"{after:.3f}", trained=f"{trained:.3f}",
    )  # fmt: skip


def out_of_memory(
    error: BaseException,
    rows: int,
    checkpointed: bool = True,
    adapter: bool = True,
    estimated: Callable[[], Sequence[str]] = tuple,
) -> FledgeError | None:
    """The error to show when a step of `rows` rows did not fit into memory; None for any other error.

    The cheapest changes stand first: those that leave the result as it is, then those that do not. `estimated` gives
    changes with what the run would take then.
    """
    said = str(error)
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if not isinstance(error, MemoryError) and not any(words in said for words in memory):
        return None
    ways = []
    if rows > 1:
        ways.append(t("take fewer rows at once with --micro-batch {rows} (the result stays the same)", rows=rows // 2))
    if not checkpointed:
        ways.append(t("compute activations twice with --activation-checkpointing on (a third more time)"))
    ways.append(t("shorten the rows"))
    if not adapter:
        ways.append(t("train an adapter (lora)"))
    advice = t("the cheapest first: {ways}", ways="; ".join(ways))
    if known := list(estimated()):
        advice += "\n    " + t("by the estimate: {changes}", changes="; ".join(known))
    return FledgeError(
        Problem(
            t("a step does not fit into memory"),
            found=said.splitlines()[0][:200] if said else type(error).__name__,
            fix=advice,
        )
    )


def smaller(trainer: Trainer, batch: Mapping[str, Any]) -> list[str]:
    """Changes that take at least a fifth off the estimated memory, the cheapest first, each with what it leaves."""
    from fledge.training.estimation.fit import TOLERANCE, changes_that_fit
    from fledge.training.estimation.forecast import plan_of
    from fledge.training.estimation.memory import NOTHING, memory_of

    plan, around = plan_of(trainer, batch), NOTHING
    if plan is None:
        return []
    now = memory_of(plan, around).total
    changes = changes_that_fit(plan, around, 0.8 * (1 + TOLERANCE) * now)
    return [
        t("{change} ({memory} instead of {now})", change=c.what, memory=show_bytes(c.memory), now=show_bytes(now))
        for c in changes
    ]
