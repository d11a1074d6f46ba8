"""Rows made ahead by a thread, in the same order, and what a step used of its device."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of

from trivium.data.batches import PlannedBatches
from trivium.data.rows import PackedSequence
from trivium.kit.metrics import read_metrics
from trivium.learn import utilisation as used
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.rows_ahead import RowsAhead
from trivium.stages.parts.teachers import TaughtBatches


class Slow(SmallBatches):
    """Notes by which thread the rows of which step are made, and when."""

    def __init__(self, ahead: bool, **options: Any) -> None:
        super().__init__(**options)
        self.ahead = ahead
        self.made: list[tuple[int, bool]] = []
        self.asked = {step: threading.Event() for step in range(self.steps)}

    def rows(self, step: int) -> list[PackedSequence]:
        self.made.append((step, threading.current_thread() is threading.main_thread()))
        self.asked[step].set()
        return super().rows(step)


class Patient(NextToken):
    """Computes a step only when the rows of the next are being made."""

    def __init__(self, source: Slow) -> None:
        super().__init__()
        self.source, self.passes = source, 0

    def loss(self, *arguments: Any) -> Any:
        following = self.passes + 1
        if following in self.source.asked:
            assert self.source.asked[following].wait(30), "the next rows are not made"
        self.passes += 1
        return super().loss(*arguments)


def test_the_next_rows_are_made_while_a_step_computes(tmp_path: Path) -> None:
    weights = []
    for ahead in (True, False):
        model, source = small_model(), Slow(ahead, steps=5)
        objective = Patient(source) if ahead else NextToken()
        small_trainer(tmp_path / str(ahead), model=model, batches=source, objective=objective).run()
        assert [step for step, _ in source.made] == list(range(5)), "each once, in order"
        assert [main for _, main in source.made] == [True, *[not ahead] * 4]
        weights.append(weights_of(model))
        log = read_metrics(tmp_path / str(ahead) / "metrics.jsonl")
        assert all(0 <= row["data_wait"] <= 1 for row in log)
    assert_identical(*weights)


def test_what_fails_in_the_thread_fails_in_the_step() -> None:
    class Broken(Slow):
        def rows(self, step: int) -> list[PackedSequence]:
            if step == 1:
                raise OSError("the disk is gone")
            return super().rows(step)

    ahead = RowsAhead(Broken(True, steps=3))
    ahead.rows(0)
    ahead.settle()
    with pytest.raises(OSError, match="the disk is gone"):
        ahead.rows(1)


def test_another_step_than_expected_gets_its_own_rows() -> None:
    source = Slow(True, steps=9)
    ahead = RowsAhead(source)
    ahead.rows(0)
    expected = [row.tokens.tolist() for row in SmallBatches(steps=9).rows(5)]
    assert [row.tokens.tolist() for row in ahead.rows(5)] == expected


def test_planned_rows_are_made_ahead_and_those_of_a_teacher_are_not() -> None:
    assert PlannedBatches.ahead
    assert not TaughtBatches.ahead


def test_utilisation_says_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert used.utilisation(torch.device("cpu"), torch.float32, 1e9, 1.0) == {}
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    for name, share in (("NVIDIA H200", 0.5), ("NVIDIA H100 80GB HBM3", 0.5), ("Some other card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        found = used.utilisation(gpu, torch.bfloat16, 2 * 989e12, 4.0)
        assert found["memory_bytes"] == 5 * 2**30
        assert found.get("mfu") == share
        assert "mfu" not in used.utilisation(gpu, torch.float32, 1.0, 1.0), "of that the maker says less"
