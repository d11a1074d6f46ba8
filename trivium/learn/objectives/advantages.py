"""From rewards to advantages: how much better than expected a completion, or each of its tokens, was.

Symbols are those of the papers. Every token t of a completion has a reward r_t: what it pays for moving away
from the reference, and at the last token the score R of the whole completion. Two families follow:

    group-relative (GRPO 2402.03300, RLOO 2402.14740)   G_i = sum_t r_t,   A_it = f(G_1 .. G_n) for all t
    token by token (PPO 1707.06347 with GAE 1506.02438)  d_t = r_t + gamma V_t+1 - V_t,
                                                         A_t = sum_k (gamma lambda)^k d_t+k
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trivium.learn.objectives.policy_losses import GroupEstimator, KlEstimator

GROUP_STABILITY = 1e-4
"""What TRL adds to a group's standard deviation."""
STABILITY = 1e-8


@dataclass(frozen=True)
class AdvantageSettings:
    """How the scores of completions become rewards of tokens, and those become advantages."""

    kl: KlEstimator = "k1"
    """The estimator of the KL where it is taken off the reward; k1's gradient there is the reverse KL's."""
    discount: float = 1.0
    """gamma."""
    decay: float = 0.95
    """lambda."""
    whiten_advantages: bool = True
    """Only of advantages that differ from token to token."""
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    normalise: Literal["none", "batch", "running"] = "none"
    clip_score: float | None = None


# rewards


def combined(rewards: np.ndarray, weights: Sequence[float], *, normalise_first: bool = False) -> np.ndarray:
    """One reward per completion from several scorers: [completions, scorers] -> [completions].

    NaN where no scorer applied. What weighs nothing is only looked at. With `normalise_first` (GDPO,
    2601.05242) each scorer is standardised within the group, so that none dominates by its scale alone.
    """
    scores = rewards.astype(float)
    if normalise_first:
        with np.errstate(all="ignore"):
            counts = (~np.isnan(scores)).sum(0)
            centre = np.nansum(scores, 0) / np.maximum(counts, 1)
            spread = np.sqrt(np.nansum((scores - centre) ** 2, 0) / np.maximum(counts - 1, 1))
        scores = (scores - centre) / (spread + GROUP_STABILITY)
    applies = ~np.isnan(scores) & (np.asarray(weights) != 0)
    total = np.where(applies, scores * np.asarray(weights), 0.0).sum(1)
    return np.where(applies.any(1), total, np.nan)


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """DAPO's soft punishment (2503.14476): 0 while there is room, then down to -1 at the limit."""
    if length <= longest - buffer:
        return 0.0
    if length < longest:
        return ((longest - buffer) - length) / buffer
    return -1.0


def token_rewards(penalties: np.ndarray, score: float) -> np.ndarray:
    """r_t: every token pays its penalty, and the score arrives with the last one. [tokens] -> [tokens]"""
    rewards = -penalties.astype(np.float64)
    rewards[-1] += score
    return rewards


@dataclass
class KlController:
    """The coefficient beta of the penalty: fixed, or steered to a target KL (Ziegler et al., 1909.08593)."""

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, kl: float, completions: int) -> None:
        """After a rollout of so many completions with this mean KL."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * completions / self.horizon


@dataclass
class RunningScale:
    """The mean and spread of all scores so far (Chan et al., 1979), to bring them to a common scale."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def accumulate(self, scores: np.ndarray) -> None:
        """Count these scores as well."""
        if not len(scores):
            return
        total, difference = self.count + len(scores), float(scores.mean()) - self.mean
        self.squares += float(((scores - scores.mean()) ** 2).sum())
        self.squares += difference**2 * self.count * len(scores) / total
        self.mean += difference * len(scores) / total
        self.count = total

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Scores less the mean, over the spread."""
        spread = np.sqrt(self.squares / max(self.count - 1, 1.0))
        return (scores - self.mean) / (spread + STABILITY)


# advantages of whole completions


def rewards_array(rewards: Sequence[float | None]) -> np.ndarray:
    """Rewards with None (not applicable) as NaN."""
    return np.array([math.nan if reward is None else reward for reward in rewards], dtype=float)


def group_advantages(
    rewards: Sequence[float | None],
    estimator: GroupEstimator,
    *,
    baseline: float = 0.0,
    threshold: float = 1.0,
) -> np.ndarray:
    """A of every completion of a group: [completions].

    A completion without a reward has the advantage 0, and does not count for the others.
    """
    values = rewards_array(rewards)
    graded = ~np.isnan(values)
    advantages = np.zeros(len(values))
    known = values[graded]
    if estimator == "accept":
        advantages[graded] = (known >= threshold).astype(float)
    elif estimator == "baseline":
        advantages[graded] = known - baseline
    elif len(known) >= 2 and np.ptp(known) > 0:
        centred = known - known.mean()
        if estimator == "group":
            centred = centred / (known.std(ddof=1) + GROUP_STABILITY)
        elif estimator == "leave_one_out":
            centred = centred * len(known) / (len(known) - 1)
        advantages[graded] = centred
    # A group of one, or of equals, says nothing about which completion was better: exactly zero, no rounding.
    return advantages


def without_variance(rewards: Sequence[float | None]) -> bool:
    """Whether a group's rewards are all the same, so that a comparison learns nothing from it."""
    values = rewards_array(rewards)
    known = values[~np.isnan(values)]
    return len(known) < 2 or float(np.ptp(known)) == 0.0


# advantages of tokens


def discounted(rewards: np.ndarray, discount: float) -> np.ndarray:
    """sum_k gamma^k r_t+k of every token: [tokens] -> [tokens]"""
    found, later = np.empty_like(rewards), 0.0
    for place in range(len(rewards) - 1, -1, -1):
        later = rewards[place] + discount * later
        found[place] = later
    return found


def gae(rewards: np.ndarray, values: np.ndarray, discount: float, decay: float) -> np.ndarray:
    """Generalised advantages (1506.02438) of one completion, after whose end V is 0: [tokens] -> [tokens]"""
    td_errors = rewards + discount * np.append(values[1:], 0.0) - values
    return discounted(td_errors, discount * decay)


def whitened(parts: Sequence[np.ndarray], *, centre: bool = True) -> list[np.ndarray]:
    """All values of a rollout with a deviation of one, and a mean of zero unless it is to stay."""
    values = np.concatenate(parts)
    if len(values) >= 2:
        scaled = (values - values.mean()) / np.sqrt(values.var(ddof=1) + STABILITY)
        values = scaled if centre else scaled + values.mean()
    return np.split(values, np.cumsum([len(part) for part in parts])[:-1])
