"""A scaling ladder: loss as a power law of compute, and what it forecasts for more compute, with an interval.

`loss(C) = E + A * C ** -alpha`. E, the loss that no compute removes, is fitted from four sizes on; three
sizes cannot tell it from a smaller alpha, and it is 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from trivium.evals.statistics import CONFIDENCE, normal_quantile, t_quantile
from trivium.kit.errors import TriviumError

RESAMPLES = 400
OFFSETS = 60
SIZES_FOR_AN_OFFSET = 4


@dataclass(frozen=True)
class PowerLaw:
    """`loss(C) = floor + scale * C ** -power`."""

    floor: float
    scale: float
    power: float

    def at(self, flops: float) -> float:
        """The loss after so many FLOPs."""
        return float(self.floor + self.scale * flops**-self.power)


def fit(flops: ArrayLike, losses: ArrayLike) -> PowerLaw:
    """The law with the least squares in the loss, over a grid of floors."""
    spent, reached = np.log(np.asarray(flops)), np.asarray(losses)
    if np.ptp(spent) == 0:
        raise TriviumError(
            "all models of the ladder spent the same FLOPs; a forecast needs sizes that differ."
        )
    with_floor = len(np.unique(np.round(spent, 2))) >= SIZES_FOR_AN_OFFSET
    floors = np.linspace(0, 0.98, OFFSETS) * reached.min() if with_floor else np.zeros(1)
    best, least = None, np.inf
    for floor in floors:
        slope, start = np.polyfit(spent, np.log(reached - floor), 1)
        law = PowerLaw(float(floor), float(np.exp(start)), float(-slope))
        error = float(((law.floor + np.exp(start + slope * spent) - reached) ** 2).sum())
        if error < least:
            best, least = law, error
    assert best is not None
    return best


@dataclass(frozen=True)
class Forecast:
    """A law with what chance does to it: other laws as likely, and what it leaves of every run."""

    law: PowerLaw
    resampled: list[PowerLaw]
    left: list[float]
    wider: float = 1.0
    """By how much few runs widen the interval: Student's quantile over the normal one."""

    def interval(self, flops: float) -> tuple[float, float]:
        """Where a new run's loss lies with 95 % confidence."""
        # Every law meets every residual: no random numbers are needed to spread them.
        laws = np.array([law.at(flops) for law in self.resampled])
        spread = (laws[:, None] + np.asarray(self.left)[None, :]).ravel()
        ends = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        middle = self.law.at(flops)
        low, high = middle + self.wider * (ends - middle)
        return float(low), float(high)


def forecast(rungs: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> Forecast:
    """From the (FLOPs, loss) of every run of every size; what the law leaves of runs is dealt out again."""
    flops, losses = (
        np.array(column) for column in zip(*(run for rung in rungs for run in rung), strict=True)
    )
    law = fit(flops, losses)
    fitted = np.array([law.at(one) for one in flops])
    free = max(len(losses) - (3 if law.floor else 2), 1)
    # What a fit leaves is smaller than what chance does, by the numbers that were fitted.
    left = (losses - fitted) * np.sqrt(len(losses) / free)
    random = np.random.default_rng(seed)
    resampled = [fit(flops, fitted + random.choice(left, len(left))) for _ in range(RESAMPLES)]
    tail = (1 + CONFIDENCE) / 2
    return Forecast(law, resampled, left.tolist(), t_quantile(tail, free) / normal_quantile(tail))
