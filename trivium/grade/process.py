"""Scoring step by step: a process reward model's probability that each step of a solution is right."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from trivium.data.steps import prompt_ids, split_steps, step_ids
from trivium.grade.scorer import Score
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.scalar_head import load_reward_model, scores_at, step_separator
from trivium.tokens.tokenizer import Tokenizer

Aggregation = Literal["last", "min", "product", "mean"]
PASS_TOKENS = 8192
"""Tokens per pass: solutions of like length are scored together."""


def aggregate(scores: Sequence[float], how: Aggregation = "min") -> float:
    """One number for a solution from those of its steps; a solution without a step is worth 0.

    `min` is Math-Shepherd's, `product` PRM800K's, `last` that of search-and-learn.
    """
    if not len(scores):
        return 0.0
    if how == "last":
        return float(scores[-1])
    if how == "min":
        return float(min(scores))
    return float(math.prod(scores)) if how == "product" else float(np.mean(scores))


class RewardModel:
    """A reward model asked about answers to their prompts, those of like length together."""

    def __init__(self, folder: Path, called: str) -> None:
        self.name = called
        self.model, self.head = load_reward_model(folder, dtype=torch.float32, device=machine.device())
        self.model.eval()
        self.tokenizer = Tokenizer.load(folder)

    @property
    def longest(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self.model.config.context

    def __call__(self, completion: str, **columns: Any) -> Score:
        """The score of one completion to the column `prompt`."""
        if columns.get("prompt") is None:
            raise TriviumError("A reward model reads the prompt as well; give it as the column `prompt`.")
        return self.many([columns["prompt"]], [completion])[0]

    def many(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Score]:
        """The scores of several completions, a text or messages each, to their prompts."""
        raise NotImplementedError

    def passes(self, documents: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
        """The numbers of the documents that are read together; those that are too long are left out."""
        waiting = [place for place, one in documents.items() if len(one) <= self.longest]
        waiting.sort(key=lambda place: len(documents[place]))
        while waiting:
            size = max(1, PASS_TOKENS // len(documents[waiting[0]]))
            yield waiting[:size]
            waiting = waiting[size:]


class ProcessScorer(RewardModel):
    """A process reward model: `step_scores` gives a number per step, and a call one per solution."""

    def __init__(self, model: str | Path, called: str = "learned", aggregate: str = "min") -> None:
        separator = step_separator(Path(model))
        if separator is None:
            raise TriviumError(f"{model} scores whole answers, not steps; train it with `steps: true`.")
        if aggregate not in get_args(Aggregation):
            raise TriviumError(
                f"`aggregate` is one of {', '.join(get_args(Aggregation))}, not {aggregate!r}."
            )
        super().__init__(Path(model), called)
        self.separator = separator
        self.how: Aggregation = aggregate  # type: ignore[assignment]
        self.tokens = 0
        """How many tokens have been read."""
        self._last: tuple[Any, list[list[float] | None]] = (None, [])

    def many(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Score]:
        texts = [_text(one) for one in completions]
        found = []
        for scores in self.step_scores(prompts, [split_steps(text, self.separator) for text in texts]):
            if scores is None:
                why = f"the solution has more tokens than the process reward model reads ({self.longest})"
                found.append(Score(None, why, "fault"))
                continue
            value = aggregate(scores, self.how)
            shown = " ".join(f"{one:.2f}" for one in scores)
            found.append(
                Score(value, f"{self.name} scored {value:.4g} ({self.how} of {shown or 'none'})", "ok")
            )
        return found

    @torch.no_grad()
    def step_scores(
        self, prompts: Sequence[Any], solutions: Sequence[Sequence[str]]
    ) -> list[list[float] | None]:
        """The probability that each step is right, solution by solution; None where it is too long."""
        # The same solutions are asked about as a whole and step by step, one after the other.
        asked = [list(prompts), [list(steps) for steps in solutions]]
        if self._last[0] == asked:
            return self._last[1]
        self._last = (asked, self._step_scores(prompts, solutions))
        return self._last[1]

    def _step_scores(
        self, prompts: Sequence[Any], solutions: Sequence[Sequence[str]]
    ) -> list[list[float] | None]:
        documents, ends = [], []
        for prompt, steps in zip(prompts, solutions, strict=True):
            before = prompt_ids(prompt, self.tokenizer)
            tokens, places = step_ids(steps, self.separator, self.tokenizer)
            documents.append([*before, *tokens])
            ends.append([len(before) + place for place in places])
        found: list[list[float] | None] = [
            [] if len(document) <= self.longest and not places else None
            for document, places in zip(documents, ends, strict=True)
        ]
        for some in self.passes({place: one for place, one in enumerate(documents) if ends[place]}):
            for place, scores in zip(some, self._scored(documents, ends, some), strict=True):
                found[place] = scores
        return found

    def _scored(
        self, documents: Sequence[list[int]], ends: Sequence[list[int]], some: Sequence[int]
    ) -> list[list[float]]:
        lengths = [len(documents[place]) for place in some]
        starts = np.cumsum([0, *lengths[:-1]])
        places = [start + end for start, place in zip(starts, some, strict=True) for end in ends[place]]
        tokens = torch.tensor([one for place in some for one in documents[place]])
        device = self.model.device
        self.tokens += len(tokens)
        scores = scores_at(
            self.model, self.head, tokens.to(device), Documents(lengths, device),
            torch.tensor(places, device=device),
        )  # fmt: skip
        counts = [len(ends[place]) for place in some]
        return [part.tolist() for part in torch.sigmoid(scores).cpu().split(counts)]


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(str(one.get("content", "")) for one in completion if one.get("role") == "assistant")
