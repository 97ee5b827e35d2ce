"""Power laws of the loss: L(N, D) = E + A/N^α + B/D^β (Hoffmann et al., 2022, section 3.3, approach 3).

As there, the Huber loss (δ = 1e-3) of the residuals of log L is minimised over (e, a, α, b, β) with E = exp e,
A = exp a, B = exp b, from many starts. The minimiser is damped Gauss-Newton with Huber's weights (Levenberg, 1944;
Marquardt, 1963) where the paper has L-BFGS: the same minimum, for all starts and all bootstrap samples at once.
Intervals come from bootstrapping the residuals; that of a new run has a residual of its own on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fledge.core.errors import FledgeError, Problem
from fledge.core.language import t
from fledge.training.estimation.optimal import Law

Array = NDArray[np.float64]
DELTA = 1e-3
STEPS = 300
AT_FIRST, KEPT = 40, 8  # steps from every start, and how many of them go on
STILL, PATIENCE = 1e-7, 15  # relative gain below which a step counts as none, and how many such steps end it
NOTHING = -60.0  # log of a part that is not there


@dataclass(frozen=True)
class Point:
    """One run: N parameters, D tokens, and the loss it ended with (any unit that a power law can have)."""

    parameters: float
    tokens: float
    loss: float
    name: str = ""


@dataclass(frozen=True)
class Prediction:
    """The loss expected of a run, with the interval in which it should lie."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Fit:
    """A law, how far the points lie from it, and the laws of the bootstrap samples."""

    law: Law
    points: tuple[Point, ...]
    residuals: Array
    """log of measured over predicted, (points,)"""
    samples: tuple[Law, ...]
    seed: int
    level: float

    @property
    def error(self) -> float:
        """The typical relative distance of a point from the law, for the degrees of freedom that are left."""
        free = max(1, len(self.points) - coefficients(self.law))
        return float(np.sqrt((self.residuals**2).sum() / free))

    def interval(self, name: str) -> tuple[float, float]:
        """The interval of a coefficient, such as `size_power`."""
        return self._quantiles([getattr(law, name) for law in self.samples])

    def predict(self, parameters: float, tokens: float) -> Prediction:
        """The loss of another run: the law's uncertainty and the scatter of single runs together."""
        rng = np.random.default_rng(self.seed + 1)
        scatter = rng.choice(_inflated(self.residuals, coefficients(self.law)), len(self.samples))
        values = [law.loss(parameters, tokens) for law in self.samples] * np.exp(scatter)
        return Prediction(self.law.loss(parameters, tokens), *self._quantiles(values))

    def _quantiles(self, values: Sequence[float] | Array) -> tuple[float, float]:
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def coefficients(law: Law) -> int:
    """How many numbers of a law were fitted."""
    return 1 + 2 * bool(law.size_scale) + 2 * bool(law.data_scale)


def fit_law(points: Sequence[Point], samples: int = 400, level: float = 0.9, seed: int = 0) -> Fit:
    """The law nearest to the points. A part is fitted only where its variable moves by itself.

    Raises FledgeError where there are fewer points than a law has coefficients, and one more.
    """
    size, data, loss = (np.log([getattr(p, name) for p in points]) for name in ("parameters", "tokens", "loss"))
    parts = _parts(size, data)
    needed = 2 + 2 * sum(parts)
    if not any(parts) or len(points) < needed or not np.isfinite(loss).all():
        raise FledgeError(
            Problem(
                t("too few runs for a law"),
                found=t("{count} runs", count=len(points)),
                allowed=t("at least {count}, of different sizes or lengths", count=max(4, needed)),
            )
        )
    centre = float(size.mean()), float(data.mean())
    x = np.stack([size - centre[0], data - centre[1]])  # (2, m)
    starts = _starts(loss, parts)
    found, cost = _minimise(np.repeat(loss[None], len(starts), 0), x, starts, parts, AT_FIRST)
    found = found[np.argsort(cost, kind="stable")[:KEPT]]
    found, cost = _minimise(np.repeat(loss[None], len(found), 0), x, found, parts)
    best = found[int(np.argmin(cost))]
    residuals = loss - _predicted(best[None], x)[0]
    rng = np.random.default_rng(seed)
    spread = _inflated(residuals, 1 + 2 * sum(parts))
    again = (loss - residuals)[None] + rng.choice(spread, (samples, len(points)))
    drawn, _ = _minimise(again, x, np.repeat(best[None], samples, 0), parts)
    laws = tuple(_law(row, centre, parts) for row in drawn)
    return Fit(_law(best, centre, parts), tuple(points), residuals, laws, seed, level)


def _parts(size: Array, data: Array) -> tuple[bool, bool]:
    """Whether the size's and the data's part can be told: both only where they do not move together."""
    moves = bool(np.ptp(size) > 0.1), bool(np.ptp(data) > 0.1)
    if all(moves) and abs(np.corrcoef(size, data)[0, 1]) > 0.99:
        return True, False  # one law of both: D grows with N
    return moves


def _inflated(residuals: Array, fitted: int) -> Array:
    """Residuals as wide as those of points that were not fitted to, with mean 0."""
    centred = residuals - residuals.mean()
    return np.asarray(centred * np.sqrt(len(residuals) / max(1, len(residuals) - fitted)))


def _starts(loss: Array, parts: tuple[bool, bool]) -> Array:
    """(starts, 5): shares of the loss for E, A and B at the centre, and powers."""
    powers = (0.1, 0.3, 0.5, 0.9)
    rows = [
        (np.log(share) + loss.min(),
         np.log((1 - share) / 2) + loss.mean() if parts[0] else NOTHING, a if parts[0] else 0.0,
         np.log((1 - share) / 2) + loss.mean() if parts[1] else NOTHING, b if parts[1] else 0.0)
        for share in (0.1, 0.4, 0.7, 0.95)
        for a in (powers if parts[0] else powers[:1])
        for b in (powers if parts[1] else powers[:1])
    ]  # fmt: skip
    return np.array(rows)


def _predicted(theta: Array, x: Array) -> Array:
    """log L̂ of every problem and point: (k, 5), (2, m) → (k, m)."""
    return np.asarray(np.logaddexp.reduce(_exponents(theta, x), axis=1))


def _exponents(theta: Array, x: Array) -> Array:
    """The logs of the three parts: (k, 3, m)."""
    e, a, alpha, b, beta = (theta[:, i, None] for i in range(5))
    return np.stack([e + 0 * x[0], a - alpha * x[0], b - beta * x[1]], axis=1)


def _minimise(
    log_loss: Array, x: Array, theta: Array, parts: tuple[bool, bool], most: int = STEPS
) -> tuple[Array, Array]:
    """Damped Gauss-Newton on Huber's loss, for k problems at once: (k, m) losses and (k, 5) starts → θ and its cost."""
    free = np.array([True, parts[0], parts[0], parts[1], parts[1]])
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    residual = _predicted(theta, x) - log_loss
    cost = _huber(residual)
    still = 0
    for _ in range(most):
        shares = np.exp(_exponents(theta, x) - (residual + log_loss)[:, None])  # (k, 3, m), of L̂
        jacobian = np.stack(
            [shares[:, 0], shares[:, 1], -shares[:, 1] * x[0], shares[:, 2], -shares[:, 2] * x[1]], axis=2
        )[:, :, free]  # (k, m, p)
        weights = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))[:, :, None]
        normal = jacobian.transpose(0, 2, 1) @ (weights * jacobian)
        gradient = (jacobian * weights * residual[:, :, None]).sum(axis=1)
        diagonal = np.einsum("kii->ki", normal)
        damped = normal + np.eye(normal.shape[1]) * (damping[:, None] * (diagonal + 1e-12))[:, None]
        step = np.zeros_like(theta)
        step[:, free] = -np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
        tried = theta + np.clip(step, -2, 2)
        tried[:, [2, 4]] = np.clip(tried[:, [2, 4]], 0.0, 4.0)  # a power below 0 would be a law of growth
        new_residual = _predicted(tried, x) - log_loss
        new_cost = _huber(new_residual)
        better = new_cost < cost
        theta = np.where(better[:, None], tried, theta)
        residual = np.where(better[:, None], new_residual, residual)
        gained = np.where(better, cost - new_cost, 0.0)
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 4), 1e-12, 1e12)
        still = still + 1 if (gained <= STILL * cost).all() else 0
        if still == PATIENCE:
            break
    return theta, cost


def _huber(residual: Array) -> Array:
    size = np.abs(residual)
    return np.asarray(np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA)).sum(axis=1))


def _law(theta: Array, centre: tuple[float, float], parts: tuple[bool, bool]) -> Law:
    """Coefficients of the uncentred variables."""
    e, a, alpha, b, beta = (float(value) for value in theta)
    return Law(
        float(np.exp(e)),
        float(np.exp(a + alpha * centre[0])) if parts[0] else 0.0,
        alpha,
        float(np.exp(b + beta * centre[1])) if parts[1] else 0.0,
        beta,
    )
