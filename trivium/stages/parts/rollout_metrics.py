"""What a rollout came to, under the names that TRL's users know."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from trivium.learn.objectives.advantages import rewards_array, without_variance
from trivium.stages.parts.rollout_worker import RolloutGroup


def rollout_metrics(
    groups: Sequence[RolloutGroup], names: Sequence[str], threshold: float, truth: int | None = None
) -> dict[str, float]:
    """Rewards, lengths and pass rates over all answers of a rollout; what cannot be said is left out.

    `truth` is the place of the scorer that is only looked at: where the reward rises and it does not, the
    model has found a way to be rewarded for something else.
    """
    answers = [answer for group in groups for answer in group.rollouts]
    rewards = rewards_array([reward for group in groups for reward in group.rewards])
    lengths = np.array([len(answer.tokens) for answer in answers])
    ended = np.array([not answer.truncated for answer in answers])
    found = {
        "reward": _mean(rewards),
        "reward_std": _spread(rewards),
        "frac_reward_zero_std": float(np.mean([without_variance(group.rewards) for group in groups])),
        "completions/clipped_ratio": 1 - float(ended.mean()),
        "groups": float(len(groups)),
    }
    for name, some in (("length", lengths), ("terminated_length", lengths[ended])):
        if len(some):
            found |= {
                f"completions/mean_{name}": float(some.mean()),
                f"completions/min_{name}": float(some.min()),
                f"completions/max_{name}": float(some.max()),
            }
    for place, name in enumerate(names):
        values = rewards_array([value for group in groups for value in group.scores[place]])
        found[f"rewards/{name}/mean"] = _mean(values)
        found[f"rewards/{name}/std"] = _spread(values)
    if truth is not None:
        found["held_out_reward"] = found[f"rewards/{names[truth]}/mean"]
    found |= _passes(groups, threshold, truth or 0)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def _passes(groups: Sequence[RolloutGroup], threshold: float, judge: int) -> dict[str, float]:
    """The share of right answers, and of prompts with at least one, by the truth or the first reward."""
    solved = [
        [value >= threshold for value in group.scores[judge] if value is not None]
        for group in groups
        if group.scores
    ]
    solved = [some for some in solved if some]
    if not solved:
        return {}
    return {
        "pass@1": float(np.mean([np.mean(some) for some in solved])),
        f"pass@{max(map(len, solved))}": float(np.mean([any(some) for some in solved])),
    }


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def _spread(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1)) if len(known) > 1 else math.nan
