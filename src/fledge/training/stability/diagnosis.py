"""What a curve says early in a run, in words: symptoms, and what usually cures them.

It only speaks: nothing here changes a result. A symptom is told once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t

STEPS = 200
"""How many steps in a row are looked at."""
_PART = STEPS // 4
VANISHING, MOVED, RISEN, CLIPPED = 1e-6, 5e-3, 1.1, 10.0


def symptoms(losses: Sequence[float], norms: Sequence[float], rate: float, bound: float) -> Iterator[tuple[str, str]]:
    """(name, sentence) of what is wrong with the last `STEPS` steps; nothing where there are fewer.

    `losses` and `norms` of the gradient before clipping, a step each; `rate` of learning; `bound` of clipping, or 0.
    """
    if len(losses) < STEPS:
        return
    before, after = statistics.median(losses[-STEPS : -STEPS + _PART]), statistics.median(losses[-_PART:])
    norm = statistics.median(norms[-STEPS:])
    if after > RISEN * before:
        yield "rising", t(
            "the loss has risen from {before} to {after} in {steps} steps: lower the learning rate ({rate}) or lengthen"
            " the warm-up",
            before=f"{before:.3g}", after=f"{after:.3g}", steps=STEPS, rate=f"{rate:.2g}",
        )  # fmt: skip
    elif abs(before - after) < MOVED * abs(before):
        if norm < VANISHING:
            yield "vanishing", t(
                "the loss has not moved for {steps} steps and the gradient norm is {norm}: nothing reaches the weights;"
                " look for frozen parts, labels that are all ignored, or a loss that is scaled down",
                steps=STEPS, norm=f"{norm:.1g}",
            )  # fmt: skip
        else:
            yield "still", t(
                "the loss has not moved for {steps} steps and the gradient norm is {norm}: raise the learning rate"
                " ({rate}), or see whether the labels can be learned at all",
                steps=STEPS, norm=f"{norm:.2g}", rate=f"{rate:.2g}",
            )  # fmt: skip
    elif bound and norm > CLIPPED * bound:
        yield "clipped", t(
            "the gradient norm is {norm}, {times} times what it is clipped to: lower the learning rate, or raise"
            " grad_clip if the loss falls all the same",
            norm=f"{norm:.2g}", times=round(norm / bound),
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


def out_of_memory(error: BaseException, rows: int) -> FledgeError | None:
    """The error to show when a step of `rows` rows did not fit into memory; None for any other error."""
    said = str(error)
    memory = ("out of memory", "can't allocate memory", "not enough memory")
    if not isinstance(error, MemoryError) and not any(words in said for words in memory):
        return None
    return FledgeError(
        Problem(
            t("a step does not fit into memory"),
            found=said.splitlines()[0][:200] if said else type(error).__name__,
            fix=t(
                "take fewer rows at once with --micro-batch {rows} (the result stays the same), shorten the rows, or"
                " train an adapter",
                rows=max(1, rows // 2),
            ),
        )
    )
