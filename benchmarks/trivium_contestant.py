"""Trivium's own trainer as a contestant of the pre-training benchmarks: the very loop a recipe runs."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import Training
from trivium.learn.trainer import Trainer
from trivium.model.initialise import new_model
from trivium.model.preset import preset


class GivenRows:
    """A batch source whose every batch is set from outside."""

    fingerprint = "given"
    steps = 1_000_000

    def __init__(self) -> None:
        self.given: list[PackedSequence] = []

    def rows(self, step: int) -> list[PackedSequence]:
        """The rows that were set last."""
        return self.given

    def metrics(self, step: int) -> dict[str, float]:
        """Nothing is worth a line in the log."""
        return {}

    def state(self) -> tuple[dict, dict]:
        """Nothing: a benchmark is never resumed."""
        return {}, {}

    def restore(self, json: dict, tensors: dict) -> None:
        """Nothing to take up again."""


def rows_of(windows: np.ndarray, byte_lengths: np.ndarray | None = None) -> list[PackedSequence]:
    """Rows of windows whose last target lies outside them, as the peers predict it too."""
    rows = []
    for window in windows:
        columns = {} if byte_lengths is None else {"bytes": [byte_lengths[window[1:]].astype(np.float32)]}
        row = row_of_documents([window[:-1]], columns=columns)
        row.targets[-1], row.weights[-1] = window[-1], 1.0
        rows.append(row)
    return rows


def trainer_of(
    shape: dict,
    batches: GivenRows,
    settings: Training,
    rates: LearningRates | None = None,
    family: str | None = None,
) -> Trainer:
    """A trainer over a new model of the shared shape, in the default family unless one is named."""
    derived = preset(
        shape["layers"], shape["vocabulary"], shape["context"], width=shape["width"], heads=shape["heads"],
        key_value_heads=shape["heads"], inner_width=shape["inner"],
    )  # fmt: skip
    config = derived.config
    if family == "llama":
        config = replace(config, family="llama", query_key_norm="none")
    model = new_model(config, seed=0, device="cpu")
    folder = Path(tempfile.mkdtemp())
    defaults = LearningRates(**derived.learning_rates, weight_decay=derived.values["weight_decay"])
    return Trainer(
        model=model,
        objective=NextToken(),
        batches=batches,
        settings=settings,
        rates=rates or defaults,
        folder=folder,
        log=MetricsLog(folder / "metrics.jsonl"),
        progress=Progress("", io.StringIO()),
    )


def trainer_step(
    shape: dict,
    compiled: bool,
    optimiser: str,
    learning_rate: float,
    weight_decay: float,
    random_tokens: Callable[[dict, int, int], torch.Tensor],
) -> Callable[[int, int], None]:
    """One step of the trainer on the rows every contestant gets."""
    batches = GivenRows()
    settings = Training(
        steps=batches.steps, optimiser=optimiser, compile="on" if compiled else "off",
        learning_rate={"decay": "constant"},
    )  # fmt: skip
    rates = LearningRates(*[learning_rate] * 4, weight_decay=weight_decay) if optimiser == "adamw" else None
    # The same work as the peers do is their Llama; the default adds norms of queries and keys.
    trainer = trainer_of(shape, batches, settings, rates, family="llama" if optimiser == "adamw" else None)
    trainer.make_ready()

    def step(index: int, micro: int) -> None:
        batches.given = rows_of(random_tokens(shape, shape["rows"], index).numpy())
        trainer.budget = micro * shape["context"]
        trainer._after_step(trainer._one_step(), 0)

    return step
