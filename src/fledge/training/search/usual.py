"""What is usual: the range of learning rates by method and size, and of β, with where it comes from.

A rate outside its range is not wrong, it is worth a second look: `fledge plan` and `fledge run` say so and go on.
Each source is a (parameters, rate) that was published; between two sizes the rate is interpolated in logarithms, and
the range is a factor around it. Where only adapters are trained, rates are about ten times those of all weights
(Schulman et al., "LoRA Without Regret", 2025; 2e-4 in QLoRA, Dettmers et al., 2023).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fledge.core.language import t

if TYPE_CHECKING:
    from fledge.training.settings import TrainSettings

LORA = 10.0
"""How much higher the rates of adapters are than those of all weights."""


@dataclass(frozen=True)
class Usual:
    """Rates that were published, by size, and how far around them others have been used with success."""

    points: tuple[tuple[float, float], ...]
    below: float
    above: float
    source: str

    def rate(self, parameters: float) -> float:
        """The rate at a size, interpolated in logarithms; beyond the ends that of the end."""
        sizes, size = [n for n, _ in self.points], min(max(parameters, self.points[0][0]), self.points[-1][0])
        upper = next(i for i, n in enumerate(sizes) if n >= size)
        (small, high), (large, low) = self.points[max(0, upper - 1)], self.points[upper]
        share = math.log(size / small) / math.log(large / small) if large > small else 0.0
        return high ** (1 - share) * low**share

    def range(self, parameters: float, lora: bool = False) -> tuple[float, float]:
        """The lowest and the highest usual rate."""
        middle = self.rate(parameters) * (LORA if lora else 1)
        return middle / self.below, middle * self.above


USUAL: dict[str, Usual] = {
    "pretrain": Usual(
        # below 100 M: fledge's own runs from nothing, docs/decisions.md
        ((2.4e6, 3e-3), (125e6, 6e-4), (1.3e9, 2e-4), (13e9, 1e-4), (175e9, 6e-5)), 4, 5, "GPT-3, table 2.1"
    ),
    "continue": Usual(
        ((2.4e6, 1e-3), (125e6, 3e-4), (1.3e9, 1e-4), (7e9, 3e-5), (70e9, 1e-5)), 20, 5,
        "Gururangan et al., 2020; Ibrahim et al., 2024",
    ),
    "sft": Usual(
        ((2.4e6, 1e-3), (135e6, 3e-4), (1.7e9, 5e-5), (7e9, 1e-5), (70e9, 2e-6)), 30, 5,
        "SmolLM2; Tülu 3; Llama 2; Alpaca",
    ),
    "reward": Usual(((2.4e6, 1e-3), (135e6, 5e-5), (6e9, 9e-6), (70e9, 3e-6)), 50, 10, "InstructGPT, C.2; Tülu 3"),
    "dpo": Usual(
        ((2.4e6, 2e-4), (135e6, 5e-6), (7e9, 5e-7), (70e9, 2e-7)), 20, 10, "Rafailov et al., 2023, B; Zephyr; Tülu 3"
    ),
    "classify": Usual(
        ((2.4e6, 5e-4), (14e6, 3e-4), (110e6, 3e-5), (340e6, 2e-5), (7e9, 1e-5)), 10, 10,
        "BERT, A.3; RoBERTa, table 10; ELECTRA, B",
    ),
    "tag": Usual(
        ((2.4e6, 5e-4), (14e6, 3e-4), (110e6, 5e-5), (340e6, 2e-5), (7e9, 1e-5)), 10, 10, "BERT, A.3; ELECTRA, B"
    ),
    "embed": Usual(((2.4e6, 5e-4), (110e6, 3e-5), (340e6, 1e-5), (7e9, 1e-5)), 10, 10, "SimCSE, appendix A; E5"),
    "meta": Usual(((1.0, 0.5),), 10, 2, "Nichol et al., 2018, appendix A"),
}  # fmt: skip
MUON = (0.002, 0.05)  # Jordan (2024), 0.02; Liu et al. (2025)
BETA = (0.01, 0.5)
"""DPO's β: Rafailov et al. (2023) 0.1 to 0.5, Zephyr 0.1, Tülu 3 (length-normalised) 5."""


def advice(
    method: str, train: TrainSettings, parameters: float, lora: bool = False, beta: float | None = None
) -> Iterator[str]:
    """A sentence for everything that lies outside what is usual for `method` on a model of so many parameters.

    Nothing is said of a rate where the size is not known.
    """
    if train.optimizer == "muon":
        if not MUON[0] <= train.muon_lr <= MUON[1]:
            yield _outside("train.muon_lr", train.muon_lr, MUON, "Jordan, 2024")
    elif parameters and method in USUAL and train.optimizer != "adafactor":
        low, high = USUAL[method].range(parameters, lora)
        if not low <= train.lr <= high:
            yield _outside("train.lr", train.lr, (low, high), USUAL[method].source)
    if beta is not None and not BETA[0] <= beta <= BETA[1]:
        yield _outside("beta", beta, BETA, "Rafailov et al., 2023")


def _outside(key: str, value: float, usual: tuple[float, float], source: str) -> str:
    return t(
        "{key} is {value}; usual here is {low} to {high} ({source})",
        key=key, value=f"{value:.2g}", low=f"{usual[0]:.1g}", high=f"{usual[1]:.1g}", source=source,
    )  # fmt: skip
