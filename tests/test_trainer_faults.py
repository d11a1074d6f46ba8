"""What goes wrong outside the arithmetic: full disks, no state left, memory held by a failed pass."""

from __future__ import annotations

import errno
import weakref
from pathlib import Path

import pytest
import torch
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of

from trivium.kit import files
from trivium.kit.errors import TriviumError
from trivium.learn.objectives.next_token import NextToken


def test_a_full_disk_stops_the_run_with_a_message_and_the_state_before_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L11, in the thread that writes while the training goes on."""
    straight = small_model()
    small_trainer(tmp_path / "straight", model=straight).run()
    real = files.sync
    full = []

    def sync(path: Path | str) -> None:
        if full and "step-" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path)

    class Fills(SmallBatches):
        def rows(self, step: int) -> list:
            if step == 4:
                full.append(step)
            return super().rows(step)

    monkeypatch.setattr(files, "sync", sync)
    cut = small_trainer(tmp_path / "cut", batches=Fills(), checkpoint={"every_steps": 1, "keep": 2})
    with pytest.raises(TriviumError, match="The disk is full"):
        cut.run()
    cut.checkpoints.finish()
    left = cut.checkpoints.steps()
    assert len(left) == 2, "what was saved before is all there"
    assert left[-1] in (3, 4)
    assert not list(cut.checkpoints.folder.glob(".*.part"))
    full.clear()
    again = small_model(seed=9)
    small_trainer(tmp_path / "cut", model=again, checkpoint={"every_steps": 1}).run()
    assert_identical(weights_of(straight), weights_of(again))


def test_when_every_state_is_damaged_it_says_so_and_starts_anew(tmp_path: Path, capsys) -> None:
    straight = small_model()
    trainer = small_trainer(tmp_path, model=straight, checkpoint={"every_steps": 7})
    trainer.run()
    (only,) = trainer.checkpoints.steps()
    (trainer.checkpoints.path(only) / "tensors.safetensors").unlink()
    again = small_model()
    small_trainer(tmp_path, model=again).run()
    assert "No state is left before it" in capsys.readouterr().err
    assert_identical(weights_of(straight), weights_of(again))


def test_a_torn_description_of_a_state_is_named_too(tmp_path: Path, capsys) -> None:
    trainer = small_trainer(tmp_path, checkpoint={"every_steps": 3})
    trainer.run()
    torn = trainer.checkpoints.path(6) / "state.json"
    torn.write_text(torn.read_text()[:40])
    small_trainer(tmp_path).run()
    spoken = capsys.readouterr().err
    assert str(torn) in spoken
    assert "Going on after step 3" in spoken


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory"),
        (MemoryError, ""),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_what_a_failed_pass_held_is_free_when_the_cache_is_emptied(
    tmp_path: Path, kind: type[Exception], message: str
) -> None:
    """An error that is still being handled keeps every activation of the pass that failed alive."""
    held: list[weakref.ref] = []
    alive_at_halving: list[bool] = []

    class Greedy(NextToken):
        def loss(self, model, batch):
            if not held:
                activations = torch.ones(1000)
                held.append(weakref.ref(activations))
                raise kind(message)
            return super().loss(model, batch)

    trainer = small_trainer(tmp_path, objective=Greedy(), micro_batch=100_000)
    halve = trainer._halve
    trainer._halve = lambda mine: (alive_at_halving.append(held[0]() is not None), halve(mine))  # type: ignore[method-assign]
    trainer.run()
    assert alive_at_halving == [False]


def test_whether_to_compile_does_not_depend_on_where_the_run_goes_on(tmp_path: Path) -> None:
    """L1: compiled and plain passes round differently, so one run uses one of them throughout."""
    long = small_trainer(tmp_path / "long", batches=SmallBatches(steps=10**9))
    fresh = long._seconds_expected()
    long.step = 10**9 - 1
    assert long._seconds_expected() == fresh
    assert fresh > 400
    assert small_trainer(tmp_path / "short")._seconds_expected() < 1
