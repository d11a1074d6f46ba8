"""The scorer that was learned: a reward model asked about an answer to its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trivium.data.conversations import Encoder
from trivium.data.shapes import Example
from trivium.grade.process import ProcessScorer
from trivium.grade.scorer import Score
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.scalar_head import load_reward_model, scores_at_ends, step_separator
from trivium.tokens.tokenizer import Tokenizer

PASS_TOKENS = 8192
"""Tokens per pass: answers of like length are scored together."""


def learned_scorer(
    model: str | Path, called: str = "learned", aggregate: str | None = None
) -> LearnedScorer | ProcessScorer:
    """The scorer of a reward model: of whole answers, or of steps, whose scores are aggregated to one."""
    if step_separator(Path(model)) is not None:
        return ProcessScorer(model, called, aggregate or "min")
    if aggregate is not None:
        raise TriviumError(f"{called} scores whole answers, so `aggregate` changes nothing; leave it out.")
    return LearnedScorer(model, called)


class LearnedScorer:
    """A reward model's number for an answer, read where the reward stage learned to put it."""

    def __init__(self, model: str | Path, called: str = "learned") -> None:
        folder = Path(model)
        self.name = called
        self.model, self.head = load_reward_model(folder, dtype=torch.float32, device=machine.device())
        self.model.eval()
        self.tokenizer = Tokenizer.load(folder)
        self.encoder = Encoder(self.tokenizer, self.model.config.context)

    def __call__(self, completion: str, **columns: Any) -> Score:
        if columns.get("prompt") is None:
            raise TriviumError("A reward model reads the prompt as well; give it as the column `prompt`.")
        return self.many([columns["prompt"]], [completion])[0]

    @torch.no_grad()
    def many(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Score]:
        documents = [self._ids(*pair) for pair in zip(prompts, completions, strict=True)]
        found: list[Score | None] = [None] * len(documents)
        longest = self.model.config.context
        waiting = sorted(range(len(documents)), key=lambda place: len(documents[place]))
        while waiting:
            size = max(1, PASS_TOKENS // len(documents[waiting[0]]))
            some = waiting[:size]
            waiting = waiting[size:]
            fitting = [place for place in some if len(documents[place]) <= longest]
            for place in set(some) - set(fitting):
                why = f"{len(documents[place])} tokens are more than the reward model reads ({longest})"
                found[place] = Score(None, why, "fault")
            if not fitting:
                continue
            tokens = torch.tensor([one for place in fitting for one in documents[place]])
            lengths = [len(documents[place]) for place in fitting]
            scores = scores_at_ends(self.model, self.head, tokens.to(self.model.device), lengths)
            for place, value in zip(fitting, scores.tolist(), strict=True):
                found[place] = Score(value, f"{self.name} scored {value:.4g}", "ok")
        return [one for one in found if one is not None]

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        """The tokens as the reward stage has seen its pairs: through the template, or as one text."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return self.encoder.whole(Example(prompt=prompt, completion=completion)).tokens
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return self.encoder.whole(Example(messages=(*asked, *said), given=len(asked))).tokens
