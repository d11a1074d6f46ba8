"""The scorer that was learned: a reward model asked about an answer to its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trivium.data.conversations import Encoder
from trivium.data.shapes import Example
from trivium.grade.process import ProcessScorer, RewardModel
from trivium.grade.scorer import Score
from trivium.kit.errors import TriviumError
from trivium.model.scalar_head import scores_at_ends, step_separator


def learned_scorer(
    model: str | Path, called: str = "learned", aggregate: str | None = None
) -> LearnedScorer | ProcessScorer:
    """The scorer of a reward model: of whole answers, or of steps, whose scores are aggregated to one."""
    if step_separator(Path(model)) is not None:
        return ProcessScorer(model, called, aggregate or "min")
    if aggregate is not None:
        raise TriviumError(f"{called} scores whole answers, so `aggregate` changes nothing; leave it out.")
    return LearnedScorer(model, called)


class LearnedScorer(RewardModel):
    """A reward model's number for an answer, read where the reward stage learned to put it."""

    def __init__(self, model: str | Path, called: str = "learned") -> None:
        super().__init__(Path(model), called)
        self.encoder = Encoder(self.tokenizer, self.longest)

    @torch.no_grad()
    def many(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[Score]:
        documents = [self._ids(*pair) for pair in zip(prompts, completions, strict=True)]
        found = [
            Score(None, f"{len(one)} tokens are more than the reward model reads ({self.longest})", "fault")
            for one in documents
        ]
        for some in self.passes(dict(enumerate(documents))):
            tokens = torch.tensor([one for place in some for one in documents[place]])
            lengths = [len(documents[place]) for place in some]
            scores = scores_at_ends(self.model, self.head, tokens.to(self.model.device), lengths)
            for place, value in zip(some, scores.tolist(), strict=True):
                found[place] = Score(value, f"{self.name} scored {value:.4g}", "ok")
        return found

    def _ids(self, prompt: Any, completion: Any) -> list[int]:
        """The tokens as the reward stage has seen its pairs: through the template, or as one text."""
        if isinstance(prompt, str) and isinstance(completion, str):
            return self.encoder.whole(Example(prompt=prompt, completion=completion)).tokens
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        said = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        return self.encoder.whole(Example(messages=(*asked, *said), given=len(asked))).tokens
