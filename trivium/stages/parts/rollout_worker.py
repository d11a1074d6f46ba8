"""Who samples completions, and what a sampled completion and its group are."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling, filtered_log_probabilities
from trivium.kit.processes import world
from trivium.learn.objectives.policy import Filtered
from trivium.model.transformer import Transformer
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_engine import RolloutEngine
from trivium.stages.parts.shared_generation import SharedRequests, answered_by_all, may_steal


@dataclass
class Rollout:
    """One sampled completion with its log-probabilities.

    Tokens that the model did not choose itself (a tool's words) are read and not learned. The arrays are
    filled in when advantages are computed, one number per token, so that any method may tell tokens apart.
    """

    tokens: list[int]
    logprobs: list[float]
    learned: list[bool]
    truncated: bool
    completion: Any
    """Text, or the messages after the prompt: what the graders read."""
    environment_reward: float | None = None
    trunk: int | None = None
    """Which completions of the group share its beginning: those with the same number."""
    fork: int = 0
    """How many of its tokens they share."""
    weight: float = 1.0
    """How much it counts as a sample; less than one where it shares a beginning."""

    drawn: int = field(init=False)
    """How many of its tokens were drawn for it alone."""
    step_ends: list[list[int]] = field(init=False, default_factory=list)
    """For each process reward model, the last token of every step."""
    step_scores: list[list[float]] = field(init=False, default_factory=list)
    """For each process reward model, the score of every step."""
    reference: np.ndarray = field(init=False)
    """Log-probabilities under the reference: [tokens]; the policy's own where it was not asked."""
    values: np.ndarray = field(init=False)
    """The critic's values V_t: [tokens]."""
    rewards: np.ndarray = field(init=False)
    """r_t: [tokens]."""
    advantages: np.ndarray = field(init=False)
    """A_t: [tokens]."""
    returns: np.ndarray = field(init=False)
    """What the critic learns: [tokens]."""

    def __post_init__(self) -> None:
        self.drawn = len(self.tokens)
        self.reference = np.array(self.logprobs, dtype=np.float64)
        self.values = self.rewards = self.advantages = self.returns = np.zeros(len(self.tokens))


@dataclass
class RolloutGroup:
    """All completions of one prompt, with their scores and rewards."""

    prompt_index: int
    rollouts: list[Rollout]
    scores: list[list[float | None]] = field(default_factory=list)
    """For each scorer, one number per completion."""
    rewards: list[float | None] = field(default_factory=list)
    """One per completion, None where no scorer applied."""


class RolloutWorker(Protocol):
    """Anything that returns token ids with their log-probabilities: the engine, or an environment's turns."""

    def generate(self, prompts: Sequence[Prompt], count: int, seeds: Sequence[int]) -> list[list[Rollout]]:
        """For each prompt, `count` completions."""
        ...


class EngineWorker:
    """Samples all completions at once in the engine, on the trainer's own weights."""

    def __init__(self, engine: RolloutEngine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling

    def generate(self, prompts: Sequence[Prompt], count: int, seeds: Sequence[int]) -> list[list[Rollout]]:
        # The optimiser's last step may have changed the weights without a trace that the engine can see.
        self.engine.refresh()
        requests = [self._request(prompt, count, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        found = self.engine.generate(requests)
        return [_rollouts(prompt, some) for prompt, some in zip(prompts, found, strict=True)]

    def generate_shared(
        self, shared: SharedRequests, prompts: Sequence[Prompt], count: int, seeds: Sequence[int]
    ) -> dict[int, list[Rollout]]:
        """The completions of the prompts that this process takes, by their numbers."""
        self.engine.refresh()
        requests = [self._request(prompt, count, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        # Another engine than ours samples for one process alone.
        found = shared.answered_by(cast(Engine, self.engine), requests)
        return {number: _rollouts(prompts[number], some) for number, some in found.items()}

    def _request(self, prompt: Prompt, count: int, seed: int) -> Request:
        return Request(prompt.ids, replace(self.sampling, seed=seed, logprobs=True), n=count)


def generated_by_all(
    worker: RolloutWorker, model: Transformer, prompts: Sequence[Prompt], count: int, seeds: Sequence[int]
) -> tuple[list[list[Rollout]], float]:
    """The rollouts of all prompts, whichever processes sample them, and how long these waited."""
    if world().size == 1:
        return worker.generate(prompts, count, seeds), 0.0
    used = getattr(worker, "engine", None)
    engine = used if isinstance(used, Engine) else None
    steals = may_steal(None if engine is None else engine.exactness, model)

    def answer(shared: SharedRequests) -> dict[int, list[Rollout]]:
        if isinstance(worker, EngineWorker):
            return worker.generate_shared(shared, prompts, count, seeds)
        found: dict[int, list[Rollout]] = {}
        numbers, rows = iter(shared), count * len(prompts) if engine is None else engine.max_rows
        while some := list(islice(numbers, max(1, shared.at_once(count, rows) // count))):
            generated = worker.generate([prompts[i] for i in some], count, [seeds[i] for i in some])
            found |= zip(some, generated, strict=True)
        return found

    return answered_by_all([len(prompt.ids) for prompt in prompts], answer, steals=steals)


def _rollouts(prompt: Prompt, completions: Sequence[Completion]) -> list[Rollout]:
    return [
        Rollout(
            tokens=one.tokens,
            logprobs=one.logprobs,
            learned=[True] * len(one.tokens),
            truncated=one.finish_reason != "stop",
            completion=[{"role": "assistant", "content": one.text}] if prompt.is_chat else one.text,
        )
        for one in completions
    ]


def under_filters(sampling: Sampling) -> Filtered | None:
    """The trainer's log-probabilities under the engine's filters (L7); None where it filters nothing.

    What was drawn stays possible while the weights move, or its ratio would have no gradient.
    """
    if not sampling.filtered:
        return None

    def filtered(logits: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        possible = filtered_log_probabilities(logits.detach(), sampling).isfinite()
        possible.scatter_(1, drawn[:, None], True)
        scores = (logits.float() / sampling.temperature).masked_fill(~possible, float("-inf"))
        logprobs = torch.log_softmax(scores, -1)
        entropy = -(logprobs.exp() * logprobs.masked_fill(~possible, 0.0)).sum(-1)
        return logprobs.gather(1, drawn[:, None])[:, 0], entropy

    return filtered
