"""On-policy distillation: the student answers the data's prompts, and the teacher judges every token of it.

GKD (2306.13649) and its kin learn on what the student itself writes, so that it meets in training the
mistakes it makes when it is used. No gradient goes through the sampling.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, Field

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.generate.engine import Engine
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.kit.metrics import MetricsLog
from trivium.kit.numbers import Count
from trivium.kit.processes import world
from trivium.kit.settings import Settings
from trivium.learn.objectives.distillation import SAMPLED
from trivium.model.transformer import Transformer
from trivium.stages.parts.shared_generation import SharedRequests, answered_by_all, may_steal
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer

SHOWN = 2
"""How many answers of a step are written down for a person to read."""


class OnPolicy(Settings):
    """What the student writes itself and learns from, as the teacher judges it."""

    share: float = Field(default=1.0, gt=0, le=1)
    """The share of steps whose answers the student writes; the others learn from the data's."""
    max_new_tokens: Count = Field(default=128, ge=1)
    """The longest answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """The temperature at which it is sampled."""
    max_rows: Count = Field(default=64, ge=1)
    """How many answers are sampled at once."""


def _share(value: Any) -> Any:
    """`true` is all steps, and a bare number the share of them."""
    if value is False:
        return None
    return {"share": value} if isinstance(value, (bool, int, float)) else value


Sampled = Annotated[
    OnPolicy | None, BeforeValidator(_share, json_schema_input_type=bool | float | OnPolicy | None)
]


@dataclass(frozen=True)
class Asked:
    """The prompt of one document of a row, and what became of its weight."""

    row: int
    tokens: list[int]
    id: str
    source: int
    weight: float


@dataclass
class StudentAnswers:
    """Puts the student's own answers in the place of the data's, at the steps that are on-policy."""

    work: Work
    model: Transformer
    tokenizer: Tokenizer
    settings: OnPolicy
    measures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = Engine(self.model, self.tokenizer, max_rows=self.settings.max_rows)

    def is_on_policy(self, step: int) -> bool:
        """Steps are spread evenly, so that any stretch of the training has its share of them."""
        share = self.settings.share
        return int((step + 1) * share + 1e-9) > int(step * share + 1e-9)

    def __call__(self, step: int, rows: list[PackedSequence]) -> list[PackedSequence]:
        """The rows of a step: those of the data, or as many with the student's answers to their prompts."""
        self.measures.clear()
        self.measures["on_policy"] = 0.0
        asked = self._asked(rows) if self.is_on_policy(step) else []
        if not asked:
            return rows
        answers = self._answers(step, asked)
        lengths = [len(one.tokens) for one in answers]
        self.measures |= {
            "on_policy": 1.0,
            "completions/mean_length": float(np.mean(lengths)),
            "completions/clipped_ratio": float(np.mean([one.finish_reason != "stop" for one in answers])),
        }
        self._write(step, asked, answers)
        return _rows(asked, answers)

    def _asked(self, rows: Sequence[PackedSequence]) -> list[Asked]:
        """What comes before the last answer of every document, or half of one that is no conversation."""
        found = []
        for number, row in enumerate(rows):
            start = 0
            for length, identity, source in zip(row.lengths, row.ids, row.sources, strict=True):
                piece = slice(start, start + length)
                start = piece.stop
                size = _prompt_size(row.weights[piece] != 0)
                if 0 < size < self.model.config.reach:
                    weight = float(row.weights[piece].max())
                    tokens = row.tokens[piece][:size].tolist()
                    found.append(Asked(number, tokens, identity, source, weight))
        return found

    def _answers(self, step: int, asked: Sequence[Asked]) -> list[Completion]:
        """One answer to each; every process writes its share of them and receives all."""
        # The optimiser's last step may have changed the weights without a trace that the engine can see.
        self.engine.refresh()
        wish = self.settings
        requests = [
            Request(
                one.tokens,
                Sampling(
                    temperature=wish.temperature,
                    max_new_tokens=min(wish.max_new_tokens, self.model.config.reach - len(one.tokens)),
                    seed=seed_of_sample(self.work.seed, 1 + step * 65536 + number),
                ),
            )
            for number, one in enumerate(asked)
        ]
        if world().size == 1:
            return [one for (one,) in self.engine.generate(requests)]
        lengths = [len(one.tokens) for one in asked]
        steals = may_steal(self.engine.exactness, self.model)

        def answer(shared: SharedRequests) -> dict[int, list[Completion]]:
            return shared.answered_by(self.engine, requests)

        return [one for (one,) in answered_by_all(lengths, answer, steals=steals)[0]]

    def _write(self, step: int, asked: Sequence[Asked], answers: Sequence[Completion]) -> None:
        if not world().leads:
            return
        log = MetricsLog(self.work.folder / "completions.jsonl")
        log.rewind(step)
        for one, answer in list(zip(asked, answers, strict=True))[:SHOWN]:
            prompt = self.tokenizer.decode(one.tokens)
            log.write({"step": step + 1, "id": one.id, "prompt": prompt, "completion": answer.text})


def _prompt_size(learned: np.ndarray) -> int:
    """How many tokens of a document come before the last stretch that is learned; 0 if nothing is."""
    places = learned.nonzero()[0]
    if not len(places):
        return 0
    # What is learned at a place is the token after it.
    breaks = (np.diff(places) > 1).nonzero()[0]
    first = places[breaks[-1] + 1] if len(breaks) else places[0]
    return int(first) + 1 if first > 0 else max(1, len(learned) // 2)


def _rows(asked: Sequence[Asked], answers: Sequence[Completion]) -> list[PackedSequence]:
    """A row for each that was, with the answers in their places."""
    by_row: dict[int, list[tuple[Asked, Completion]]] = {}
    for one, answer in zip(asked, answers, strict=True):
        by_row.setdefault(one.row, []).append((one, answer))
    found = []
    for pairs in by_row.values():
        documents = [np.array([*one.tokens, *answer.tokens]) for one, answer in pairs]
        learned = [
            np.where(np.arange(len(document)) >= len(one.tokens), one.weight, 0.0)
            for document, (one, _) in zip(documents, pairs, strict=True)
        ]
        found.append(
            row_of_documents(
                documents, learned=learned, facts={SAMPLED: [True] * len(pairs)},
                ids=[one.id for one, _ in pairs], sources=[one.source for one, _ in pairs],
            )
        )  # fmt: skip
    return found
