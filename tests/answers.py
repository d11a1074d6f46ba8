"""The answers of a rollout's rows one by one, each as a whole document under plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.learn.objectives.policy_losses import Aggregation, loss_weights
from trivium.model.attention import Documents
from trivium.model.transformer import Transformer

LONGEST = 8
COLUMNS = ("advantage", "old_logprob", "sampled_logprob", "correction", "reference", "value", "return")


@dataclass(frozen=True)
class Answer:
    """One document of a row behind the prompt that it shares."""

    tokens: torch.Tensor
    """[prompt and answer]"""
    asked: torch.Tensor
    """[drawn], the places whose next token the model drew."""
    columns: dict[str, torch.Tensor]
    """Per drawn token: [drawn]."""

    @property
    def drawn(self) -> torch.Tensor:
        """The tokens that the model drew: [drawn]."""
        return self.tokens[self.asked + 1]

    def states(self, model: Transformer) -> torch.Tensor:
        """The hidden states from which the tokens were drawn: [drawn, width]."""
        return model(self.tokens, Documents([len(self.tokens)]))[self.asked]

    def scores(self, model: Transformer, temperature: float = 1.0) -> torch.Tensor:
        """The log-probabilities of the whole vocabulary there: [drawn, vocabulary]."""
        return (model.logits(self.states(model)) / temperature).log_softmax(-1)

    def logprobs(self, model: Transformer, temperature: float = 1.0) -> torch.Tensor:
        """The log-probabilities of the drawn tokens: [drawn]."""
        return self.scores(model, temperature).gather(1, self.drawn[:, None])[:, 0]


def answers_of(row: PackedSequence) -> Iterator[Answer]:
    """Every document of a row in which something was drawn."""
    starts = np.cumsum(row.lengths) - row.lengths
    shared = row.tokens[: row.lengths[0]] if row.facts["back"][-1] else row.tokens[:0]
    for start, length in zip(starts, row.lengths, strict=True):
        piece = slice(start, start + length)
        places = np.flatnonzero(row.weights[piece])
        if len(places):
            yield Answer(
                torch.tensor(np.concatenate((shared, row.tokens[piece]))),
                torch.tensor(places + len(shared)),
                {name: torch.tensor(column[piece][places]) for name, column in row.columns.items()},
            )


def rows_of_answers(
    vocabulary: int,
    groups: Sequence[Sequence[int]],
    *,
    share: bool,
    seed: int = 0,
    aggregation: Aggregation = "token",
) -> list[PackedSequence]:
    """One row for each group of answers with these lengths, their columns drawn from the seed."""
    random = np.random.default_rng(seed)
    rows = []
    for group in groups:
        prompt = random.integers(0, vocabulary, 5)
        beginning = prompt[-1:] if share else prompt
        documents = [prompt[:-1]] if share else []
        documents += [np.concatenate((beginning, random.integers(0, vocabulary, length))) for length in group]
        parts = [loss_weights(length, aggregation, LONGEST) for length in group]
        learned = [(np.arange(len(one)) >= len(beginning)).astype(float) for one in documents]
        if share:
            learned[0][:] = 0
        for mask, (weight, _) in zip(learned[len(documents) - len(group) :], parts, strict=True):
            mask *= weight
        columns = {
            name: [random.normal(0, 1, len(one)).astype(np.float32) for one in documents] for name in COLUMNS
        }
        first = len(documents) - len(group)
        facts = {
            "back": list(range(len(documents))) if share else [0] * len(documents),
            "divisor": [0.0] * first + [divisor for _, divisor in parts],
            "fresh": [False for _ in documents],
        }
        ids = [f"{len(rows)}/{place}" for place in range(len(documents))]
        rows.append(row_of_documents(documents, learned=learned, columns=columns, facts=facts, ids=ids))
    return rows


def near(model: Transformer, rows: Sequence[PackedSequence], spread: float, temperature: float = 1.0) -> None:
    """Put the columns' log-probabilities near the model's, so that some ratios are clipped, some not."""
    random = np.random.default_rng(7)
    for row in rows:
        with torch.no_grad():
            found = torch.cat([one.logprobs(model, temperature) for one in answers_of(row)]).numpy()
        places = np.flatnonzero(row.weights)
        for name in ("old_logprob", "sampled_logprob", "reference"):
            row.columns[name][places] = found + random.normal(0, spread, len(found))
        for name in ("value", "return"):
            row.columns[name][places] *= spread
