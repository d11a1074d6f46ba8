"""From the rewards of a group of answers to how much better than expected each was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

Kind = Literal["group", "centred", "leave_one_out", "baseline", "accept"]
STABILITY = 1e-4
"""What TRL adds to a group's standard deviation."""


def rewards_array(rewards: Sequence[float | None]) -> np.ndarray:
    """Rewards with None (not applicable) as NaN."""
    return np.array([math.nan if reward is None else reward for reward in rewards], dtype=float)


def group_advantages(
    rewards: Sequence[float | None], kind: Kind, *, baseline: float = 0.0, threshold: float = 1.0
) -> np.ndarray:
    """The advantages of one group; an answer without a reward has none and does not count for the others."""
    values = rewards_array(rewards)
    graded = ~np.isnan(values)
    advantages = np.zeros(len(values))
    known = values[graded]
    if kind == "accept":
        advantages[graded] = (known >= threshold).astype(float)
    elif kind == "baseline":
        advantages[graded] = known - baseline
    elif len(known) >= 2 and np.ptp(known) > 0:
        centred = known - known.mean()
        if kind == "group":
            centred = centred / (known.std(ddof=1) + STABILITY)
        elif kind == "leave_one_out":
            centred = centred * len(known) / (len(known) - 1)
        advantages[graded] = centred
    # A group of one, or of equals, says nothing about which answer was better: exactly zero, no rounding.
    return advantages


def without_variance(rewards: Sequence[float | None]) -> bool:
    """Whether a group's rewards are all the same, so that it can teach a comparison nothing."""
    values = rewards_array(rewards)
    known = values[~np.isnan(values)]
    return len(known) < 2 or float(np.ptp(known)) == 0.0


def combined(rewards: np.ndarray, weights: Sequence[float], *, normalise_first: bool = False) -> np.ndarray:
    """One reward per answer from several scorers: [answers, scorers] -> [answers], NaN where none applied.

    What weighs nothing is only looked at. With `normalise_first` (GDPO, 2601.05242) each scorer is
    standardised within the group, so that none dominates by its scale alone.
    """
    scores = rewards.astype(float)
    if normalise_first:
        with np.errstate(all="ignore"):
            counts = (~np.isnan(scores)).sum(0)
            centre = np.where(counts > 0, np.nansum(scores, 0) / np.maximum(counts, 1), 0.0)
            spread = np.sqrt(np.nansum((scores - centre) ** 2, 0) / np.maximum(counts - 1, 1))
        scores = (scores - centre) / (spread + STABILITY)
    applies = ~np.isnan(scores) & (np.asarray(weights) != 0)
    total = np.where(applies, scores * np.asarray(weights), 0.0).sum(1)
    return np.where(applies.any(1), total, np.nan)


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """DAPO's soft punishment (2503.14476): none while there is room, then down to -1 at the limit."""
    if length <= longest - buffer:
        return 0.0
    if length < longest:
        return ((longest - buffer) - length) / buffer
    return -1.0
