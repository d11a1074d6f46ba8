"""From scores of steps to advantages of tokens, within a group of completions of one prompt.

A process reward model gives step j of completion i the probability p_ij that it is right.

    sum        DeepSeekMath 4.1.3 (2402.03300): r_ij = (p_ij - mean(R)) / std(R) over all step scores R of the
               group, and a token's advantage is the sum of r_ij over its own step and those after it. More
               steps of more than the mean score add up, so longer answers can farm it.
    potential  F_ij = V_ij - V_i,j-1 with the potential V_ij = aggregate(p_i1 .. p_ij) (Ng et al., 1999). From
               a token of step j on they add up to V_i,end - V_i,j-1, whatever lies between: no number of
               steps earns more. V_i0 is what a completion is worth in the mean over the group, so the first
               step has GRPO's advantage, and the step that loses the value has it all.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from trivium.learn.objectives.advantages import GROUP_STABILITY

StepRewards = Literal["sum", "potential"]


def summed(scores: Sequence[np.ndarray], *, scale: bool) -> list[np.ndarray]:
    """The advantage of each step of each completion, [steps] each, as sums of normalised later scores."""
    known = np.concatenate([*scores, np.zeros(0)])
    if len(known) < 2 or np.ptp(known) == 0:
        return [np.zeros(len(one)) for one in scores]
    spread = known.std(ddof=1) + GROUP_STABILITY if scale else 1.0
    return [np.cumsum(((one - known.mean()) / spread)[::-1])[::-1] for one in scores]


def potential(values: Sequence[np.ndarray], *, scale: bool) -> list[np.ndarray]:
    """The same from potentials V_i1 .. V_i,end: [steps] each."""
    ends = [one[-1] for one in values if len(one)]
    if not ends:
        return [np.zeros(0) for _ in values]
    start = float(np.mean(ends))
    gains = [one[-1] - np.array([start, *one[:-1]]) if len(one) else np.zeros(0) for one in values]
    if not scale:
        return gains
    # Around zero, which is what a step is expected to gain.
    spread = float(np.sqrt(np.mean(np.concatenate(gains) ** 2))) + GROUP_STABILITY
    return [one / spread for one in gains]


def over_tokens(steps: np.ndarray, ends: Sequence[int], tokens: int) -> np.ndarray:
    """What each token's step has: [steps] with the steps' last tokens -> [tokens]; 0 after the last."""
    found = np.zeros(tokens)
    start = 0
    for value, end in zip(steps, ends, strict=True):
        found[start : end + 1] = value
        start = end + 1
    return found


def tree_advantages(
    rewards: np.ndarray, trunks: Sequence[int], forks: Sequence[int], lengths: Sequence[int], *, scale: bool
) -> list[np.ndarray]:
    """Advantages of completions that share beginnings: one number per token, [tokens] each.

    Completions with the same trunk are the same up to their fork, and weigh 1 / (completions of the trunk)
    each, so that a trunk counts as one sample whatever grows on it. Up to the fork a token is compared with
    the group's mean; after it with the other completions of its trunk, which went on from the same place.
    """
    own = np.array(trunks)
    counts = {trunk: int((own == trunk).sum()) for trunk in set(trunks)}
    weights = np.array([1 / counts[trunk] for trunk in trunks])
    mean = float((weights * rewards).sum() / weights.sum())
    found = []
    samples = len(counts)
    spread = float(np.sqrt((weights * (rewards - mean) ** 2).sum() / max(samples - 1, 1)))
    unit = spread + GROUP_STABILITY if scale else 1.0
    for reward, trunk, fork, length in zip(rewards, trunks, forks, lengths, strict=True):
        advantages = np.full(length, (reward - mean) / unit if spread else 0.0)
        count = counts[trunk]
        if count > 1:
            siblings = float(rewards[own == trunk].sum() - reward) / (count - 1)
            advantages[fork:] = (reward - siblings) / unit if spread else 0.0
        found.append(advantages)
    return found
