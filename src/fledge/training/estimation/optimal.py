"""How large a model and how many tokens for a budget of operations (Hoffmann et al., 2022, "Chinchilla").

Approaches 1 and 2 of the paper come to D ≈ 20·N, so that C = 6·N·D = 120·N². Its approach 3 fits

    L(N, D) = E + A / N^α + B / D^β

whose constants in the paper do not follow from its own data; Besiroglu et al. (2024) fitted them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TOKENS_PER_PARAMETER = 20.0


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A/N^α + B/D^β in nats a token; a part that was not fitted is 0."""

    irreducible: float
    size_scale: float
    size_power: float
    data_scale: float
    data_power: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats a token of a model of N parameters after D tokens."""
        size = self.size_scale * parameters**-self.size_power if self.size_scale else 0.0
        data = self.data_scale * tokens**-self.data_power if self.data_scale else 0.0
        return self.irreducible + size + data

    def optimal(self, flops: float) -> tuple[float, float]:
        """(N, D) with the least loss among all with 6·N·D = `flops` (Hoffmann et al., 2022, equation 4)."""
        a, b = self.size_power, self.data_power
        scale = (a * self.size_scale / (b * self.data_scale)) ** (1 / (a + b))
        size = scale * (flops / 6) ** (b / (a + b))
        return size, flops / 6 / size


HOFFMANN = Law(1.69, 406.4, 0.34, 410.7, 0.28)
"""As printed in Hoffmann et al. (2022), section 3.3."""
BESIROGLU = Law(1.8172, 482.01, 0.3478, 2085.43, 0.3658)
"""The same data fitted again: Besiroglu et al. (2024), "Chinchilla Scaling: A replication attempt"."""


def by_ratio(flops: float, ratio: float = TOKENS_PER_PARAMETER) -> tuple[float, float]:
    """(N, D) for a budget: N = √(C / (6 · ratio)), which is √(C/120) at 20 tokens a parameter."""
    size = math.sqrt(flops / (6 * ratio))
    return size, ratio * size
