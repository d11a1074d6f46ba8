"""A scaling ladder: loss as a power law of compute, and what it forecasts for more compute, with an interval.

`loss(C) = E + A * C ** -alpha`. E, the loss that no compute removes, is fitted from four sizes on; three
sizes cannot tell it from a smaller alpha, and it is 0.

Seeds say what chance does to a run, and nothing of a law that bends. So every size that has two before it is
forecast from those, and the interval is widened by these errors, and more with the distance ahead, as they
would grow if the law had a bend.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

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
    spent: Sequence[float] = ()
    """The FLOPs of the sizes."""
    missed: Sequence[float] = ()
    """The error of each size's forecast from those before it, from the third size on."""

    def interval(self, flops: float) -> tuple[float, float]:
        """Where a new run's loss lies with 95 % confidence."""
        # Every law meets every residual: no random numbers are needed to spread them.
        laws = np.array([law.at(flops) for law in self.resampled])
        spread = (laws[:, None] + np.asarray(self.left)[None, :]).ravel()
        ends = np.quantile(spread, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        middle = self.law.at(flops)
        low, high = middle + self.wider * (ends - middle)
        more = self._bend() * _off_line(self.spent, flops) if self.missed and flops > self.spent[-1] else 0.0
        return float(low - more), float(high + more)

    def _bend(self) -> float:
        """The bend that would have caused these errors: their root mean square over that of a unit bend."""
        tried = range(len(self.spent) - len(self.missed), len(self.spent))
        unit = [_off_line(self.spent[:size], self.spent[size]) for size in tried]
        return float(np.sqrt(np.mean(np.square(np.divide(self.missed, unit)))))


def _off_line(spent: Sequence[float], flops: float) -> float:
    """How far the square of log FLOPs lies from the straight line that fits it best."""
    sizes, ahead = np.log(spent), math.log(flops)
    return abs(ahead**2 - float(np.polyval(np.polyfit(sizes, sizes**2, 1), ahead)))


def forecast(rungs: Sequence[Sequence[tuple[float, float]]], seed: int = 0) -> Forecast:
    """From the (FLOPs, loss) of every run of every size, the smallest size first."""
    spent, losses = zip(*(np.mean(rung, axis=0).tolist() for rung in rungs), strict=True)
    if any(larger <= smaller for smaller, larger in pairwise(spent)):
        raise TriviumError("a forecast needs sizes that differ, each with more FLOPs than the one before it.")
    before = [fit(*_runs(rungs[:size])) for size in range(2, len(rungs))]
    missed = [
        abs(loss - law.at(flops)) for law, flops, loss in zip(before, spent[2:], losses[2:], strict=True)
    ]
    return replace(_by_chance(rungs, seed), spent=spent, missed=missed)


def _runs(rungs: Sequence[Sequence[tuple[float, float]]]) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs and losses of the runs of all sizes, [runs] each."""
    flops, losses = zip(*(run for rung in rungs for run in rung), strict=True)
    return np.array(flops), np.array(losses)


def _by_chance(rungs: Sequence[Sequence[tuple[float, float]]], seed: int) -> Forecast:
    """A law and what chance does to it: what it leaves of runs is dealt out again."""
    flops, losses = _runs(rungs)
    law = fit(flops, losses)
    fitted = np.array([law.at(one) for one in flops])
    free = max(len(losses) - (3 if law.floor else 2), 1)
    # What a fit leaves is smaller than what chance does, by the numbers that were fitted.
    left = (losses - fitted) * np.sqrt(len(losses) / free)
    random = np.random.default_rng(seed)
    resampled = [fit(flops, fitted + random.choice(left, len(left))) for _ in range(RESAMPLES)]
    tail = (1 + CONFIDENCE) / 2
    return Forecast(law, resampled, left.tolist(), t_quantile(tail, free) / normal_quantile(tail))
