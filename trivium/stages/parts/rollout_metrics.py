"""What a rollout came to, under the names that TRL's users know, and a few of its completions to read."""

import math
from collections.abc import Sequence

import numpy as np

from trivium.kit.metrics import MetricsLog
from trivium.learn.objectives.advantages import rewards_array, without_variance
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_worker import Rollout, RolloutGroup
from trivium.stages.parts.stage import Work

SHOWN = 4
"""How many completions of every rollout are written down for a person to read."""


def rollout_metrics(
    groups: Sequence[RolloutGroup],
    names: Sequence[str],
    threshold: float | None,
    held_out_scorer: int | None = None,
) -> dict[str, float]:
    """Rewards, lengths and pass rates over all completions of a rollout; what cannot be said is left out.

    `held_out_scorer` is the place of the scorer that nothing is learned from: where the reward rises and its
    score does not, the model has found a way to be rewarded for something else. Without a `threshold` scores
    know no right and wrong, and there are no pass rates.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    rewards = rewards_array([reward for group in groups for reward in group.rewards])
    lengths = np.array([len(rollout.tokens) for rollout in rollouts])
    ended = np.array([not rollout.truncated for rollout in rollouts])
    found = {
        "reward": _mean(rewards),
        "reward_std": _spread(rewards),
        "frac_reward_zero_std": float(np.mean([without_variance(group.rewards) for group in groups])),
        "completions/clipped_ratio": 1 - float(ended.mean()),
        "groups": float(len(groups)),
        # What two completions share is drawn once.
        "completions/drawn_tokens": float(sum(rollout.drawn for rollout in rollouts)),
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
    if held_out_scorer is not None:
        found["held_out_reward"] = found[f"rewards/{names[held_out_scorer]}/mean"]
    if threshold is not None:
        found |= _pass_rates(groups, threshold, held_out_scorer or 0)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def objective_metrics(
    rollouts: Sequence[Rollout], scores: np.ndarray, penalties: Sequence[float]
) -> dict[str, float]:
    """TRL's names for what is maximised where the KL is taken off the reward: the score less the penalty."""
    logprobs = [np.array(rollout.logprobs) for rollout in rollouts]
    kl = [(mine - one.reference).sum() for mine, one in zip(logprobs, rollouts, strict=True)]
    score, penalty = float(scores.mean()), float(np.mean([-one for one in penalties]))
    return {
        "objective/kl": float(np.mean(kl)),
        "objective/non_score_reward": penalty,
        "objective/scores": score,
        "objective/rlhf_reward": score + penalty,
        "objective/entropy": float(np.mean([-one.sum() for one in logprobs])),
        "val/num_eos_tokens": float(sum(not rollout.truncated for rollout in rollouts)),
    }


def write_completions(
    work: Work, rollout: int, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], names: Sequence[str]
) -> None:
    """The first and the last completion of a few groups, with every score, for a person to read."""
    log = MetricsLog(work.folder / "completions.jsonl")
    log.rewind(rollout)
    places = sorted({0, len(groups[0].rollouts) - 1})
    for group in groups[: SHOWN // len(places)]:
        for index in places:
            log.write(
                {
                    "step": rollout + 1,
                    "problem": prompts[group.prompt_index].id,
                    "prompt": prompts[group.prompt_index].content,
                    "completion": group.rollouts[index].completion,
                    "rewards": dict(zip(names, [part[index] for part in group.scores], strict=True)),
                    "reward": group.rewards[index],
                    "advantage": float(group.rollouts[index].advantages.mean()),
                }
            )


def _pass_rates(groups: Sequence[RolloutGroup], threshold: float, scorer: int) -> dict[str, float]:
    """The share of right completions, and of prompts with at least one, by one scorer."""
    solved = [
        [score >= threshold for score in group.scores[scorer] if score is not None]
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
