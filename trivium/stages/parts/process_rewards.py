"""Process rewards in reinforcement learning: which tokens are which step, and what each step earns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trivium.data.steps import step_ends
from trivium.grade.process import Aggregation, ProcessScorer, aggregate
from trivium.grade.rewards import Combined, ScorerReward, text_of
from trivium.learn.objectives.step_advantages import StepRewards, over_tokens, potential, summed
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_worker import Rollout
from trivium.tokens.tokenizer import Tokenizer


@dataclass
class ProcessRewards:
    """The process reward models among the rewards, and how their scores become advantages."""

    scorers: list[ProcessScorer]
    weights: list[float]
    how: StepRewards
    tokenizer: Tokenizer

    def grade(self, pairs: Sequence[tuple[Prompt, Rollout]]) -> None:
        """Give every completion, for each model, the scores of its steps and the last token of each."""
        for _, rollout in pairs:
            rollout.step_scores, rollout.step_ends = [], []
        for scorer in self.scorers:
            texts = [text_of(rollout.completion) for _, rollout in pairs]
            found = [step_ends(text, scorer.separator) for text in texts]
            scores = scorer.step_scores(
                [prompt.content for prompt, _ in pairs], [[step for step, _ in one] for one in found]
            )
            for (_, rollout), ends, mine in zip(pairs, found, scores, strict=True):
                # Models may divide a solution at separators of their own.
                rollout.step_ends.append(self._last_tokens(rollout, [end for _, end in ends]))
                # A solution that the model cannot read says nothing of its steps.
                rollout.step_scores.append(mine or [])

    def _last_tokens(self, rollout: Rollout, ends: Sequence[int]) -> list[int]:
        """The last token of every step; the first has all that came before it, the last all that follows."""
        start = 0
        if not isinstance(rollout.completion, str):
            # Messages: the steps are those of the last one, whose tokens are the last that the model chose.
            chosen = np.flatnonzero(rollout.learned)
            breaks = np.flatnonzero(np.diff(chosen) > 1)
            start = int(chosen[breaks[-1] + 1]) if len(breaks) else 0
        found, low = [], start
        for end in ends:
            high = len(rollout.tokens) - 1
            while low < high:
                middle = (low + high) // 2
                if len(self.tokenizer.decode(rollout.tokens[start : middle + 1])) < end:
                    low = middle + 1
                else:
                    high = middle
            found.append(low)
        return [*found[:-1], len(rollout.tokens) - 1] if found else []

    def advantages(self, rollouts: Sequence[Rollout], *, scale: bool) -> list[np.ndarray]:
        """What the steps of a group's completions add to the advantages of their tokens: [tokens] each."""
        total = [np.zeros(len(one.tokens)) for one in rollouts]
        for number, (scorer, weight) in enumerate(zip(self.scorers, self.weights, strict=True)):
            scores = [np.array(one.step_scores[number]) for one in rollouts]
            if self.how == "sum":
                steps = summed(scores, scale=scale)
            else:
                steps = potential([running(one, scorer.how) for one in scores], scale=scale)
            for place, (one, mine) in enumerate(zip(rollouts, steps, strict=True)):
                if len(mine):
                    total[place] += weight * over_tokens(mine, one.step_ends[number], len(one.tokens))
        return total


def running(scores: np.ndarray, how: Aggregation) -> np.ndarray:
    """The value of a solution after each of its steps: [steps]"""
    return np.array([aggregate(scores[: place + 1].tolist(), how) for place in range(len(scores))])


def process_rewards_of(
    reward: Combined, how: StepRewards | None, tokenizer: Tokenizer
) -> ProcessRewards | None:
    """The process reward models of a list, which then no longer count as rewards of whole answers."""
    found = [
        (place, part.scorer)
        for place, part in enumerate(reward.rewards)
        if isinstance(part, ScorerReward) and isinstance(part.scorer, ProcessScorer) and reward.weights[place]
    ]
    if how is None or not found:
        return None
    made = ProcessRewards(
        [scorer for _, scorer in found], [reward.weights[place] for place, _ in found], how, tokenizer
    )
    for place, _ in found:
        reward.weights[place] = 0.0
    return made
