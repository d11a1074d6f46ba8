"""Passes sized by trying small ones, with a meter that stands for a GPU's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.kit.metrics import read_metrics
from trivium.learn import pass_size
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.pass_size import SHARE, UNSIZED, first_budget, tokens_that_fit


def row(length: int) -> PackedSequence:
    return row_of_documents([np.arange(length) % 61])


class Meter:
    """A memory in which everything beside the passes takes `base`, and each token of one `each`."""

    def __init__(self, memory: float, base: float = 1000.0, each: float = 10.0) -> None:
        self.memory, self.base, self.each = memory, base, each
        self.tokens, self.tried = 0, []

    def limit(self) -> float:
        return self.memory

    def start(self) -> None:
        self.tokens = 0

    def peak(self) -> float:
        return self.base + self.each * self.tokens

    def attempt(self, rows: Sequence[PackedSequence]) -> bool:
        self.tokens = sum(map(len, rows))
        self.tried.append(self.tokens)
        return self.peak() <= self.memory


def test_the_size_follows_from_two_passes_that_fit() -> None:
    meter = Meter(memory=20_000)
    fits = tokens_that_fit([row(100)] * 64, meter.attempt, meter)
    assert fits == int((SHARE * 20_000 - 1000) / 10)
    assert meter.tried == [100, 200, 400, 800, 1600], "nothing larger than what fits is tried"


def test_what_ran_out_of_memory_is_not_taken() -> None:
    tight = Meter(memory=2_500)
    assert tokens_that_fit([row(100)] * 8, tight.attempt, tight) == 100, "two rows ran out"
    full = Meter(memory=1_500)
    assert tokens_that_fit([row(100)] * 8, full.attempt, full) == 100, "a row is the least there is"


def test_a_step_that_fits_whole_is_one_pass() -> None:
    meter = Meter(memory=1e9)
    assert tokens_that_fit([row(7), row(30)], meter.attempt, meter) > 1e6
    assert meter.tried == [30, 37], "the longest row first"
    assert tokens_that_fit([], meter.attempt, meter) == UNSIZED - 1


def test_a_processor_takes_what_its_cache_likes() -> None:
    assert first_budget("auto", torch.device("cpu")) == 2048
    assert first_budget("auto", torch.device("cuda")) == UNSIZED
    assert first_budget(512, torch.device("cuda")) == 512
    assert pass_size.meter_of(torch.device("cpu")) is None


class Watched(NextToken):
    """Tells the meter how large a pass is, and draws a random number in each."""

    def __init__(self, meter: Meter) -> None:
        super().__init__(noise=1.0)
        self.meter, self.passes = meter, []

    def loss(self, model: Any, batch: Any) -> Any:
        self.meter.tokens = len(batch.tokens)
        self.passes.append(len(batch.tokens))
        return super().loss(model, batch)


def test_a_training_sizes_its_passes_once_and_learns_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter(memory=2_000)
    monkeypatch.setattr(pass_size, "meter_of", lambda device: meter)
    objective, model = Watched(meter), small_model()
    trainer = small_trainer(tmp_path / "sized", model=model, objective=objective, batches=SmallBatches(3, 8))
    trainer.budget = UNSIZED
    trainer.run()
    assert trainer.budget == 80
    assert trainer._facts()[0]["budget"] == 80, "a run that goes on tries nothing"
    given, same = Watched(meter), small_model()
    small_trainer(
        tmp_path / "given", model=same, objective=given, batches=SmallBatches(3, 8), micro_batch=80
    ).run()
    tries = len(objective.passes) - len(given.passes)
    assert tries > 1
    assert objective.passes[tries:] == given.passes
    assert max(given.passes) <= 80
    assert_identical(weights_of(model), weights_of(same))
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("sized", "given")]
    found = [[(row["loss"], row["flops"]) for row in log] for log in logs]
    assert found[0] == found[1]
