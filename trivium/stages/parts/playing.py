"""How the model answers: once, on the trainer's own weights; and what an answer and its group are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling, filtered_log_probabilities
from trivium.learn.objectives.policy import Filtered
from trivium.stages.parts.prompts import Problem


@dataclass
class Answer:
    """One sampled answer; tokens the model did not choose itself (a tool's words) are not learned."""

    tokens: list[int]
    logprobs: list[float]
    learned: list[bool]
    truncated: bool
    completion: Any
    """Text, or the messages after the prompt: what the graders read."""
    extra: float | None = None
    """A reward the environment gave."""


@dataclass
class Group:
    """All answers to one problem, with what became of them."""

    problem: int
    answers: list[Answer]
    parts: list[list[float | None]] = field(default_factory=list)
    """For each reward, one number per answer."""
    rewards: list[float | None] = field(default_factory=list)
    advantages: np.ndarray = field(default_factory=lambda: np.zeros(0))


class Player(Protocol):
    """Whatever lets the model answer: the engine once, or in turns with an environment."""

    def play(self, problems: Sequence[Problem], group: int, seeds: Sequence[int]) -> list[list[Answer]]:
        """For each problem, its answers."""
        ...


class Engined:
    """Every problem answered in one go by the engine, on the trainer's own weights."""

    def __init__(self, engine: Engine, sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling

    def play(self, problems: Sequence[Problem], group: int, seeds: Sequence[int]) -> list[list[Answer]]:
        """For each problem, its answers."""
        # The optimiser's last step may have changed the weights without a trace that the engine can see.
        self.engine.refresh()
        requests = [
            Request(problem.ids, replace(self.sampling, seed=seed, logprobs=True), n=group)
            for problem, seed in zip(problems, seeds, strict=True)
        ]
        return [
            [
                Answer(
                    tokens=one.tokens,
                    logprobs=one.logprobs,
                    learned=[True] * len(one.tokens),
                    truncated=one.finish_reason != "stop",
                    completion=[{"role": "assistant", "content": one.text}] if problem.is_chat else one.text,
                )
                for one in completions
            ]
            for problem, completions in zip(problems, self.engine.generate(requests), strict=True)
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
