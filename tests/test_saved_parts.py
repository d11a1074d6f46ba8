"""Saved states of a divided model: each process writes its own parts, and any layout goes on from them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ports import free_port
from small import SmallBatches, assert_identical, small_model, small_trainer
from test_damage import flip
from test_parallel import losses, meet, together

from trivium.kit import files, processes
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import load_tensors, save_tensors
from trivium.learn.checkpoints import read_state
from trivium.learn.holders import gathered
from trivium.learn.pieces import SavedTensors, check_parts, file_of, write_parts
from trivium.learn.trainer import Trainer

STEPS = 6


def trainer_of(folder: Path, layout: Any, seed: int = 0) -> Trainer:
    """Muon, AdamW and a running mean; a state after every second step."""
    wish = layout if isinstance(layout, dict) else {"shard": layout}
    return small_trainer(
        folder, model=small_model(seed), batches=SmallBatches(STEPS, 3), parallel=wish, ema=0.5,
        optimiser="muon", micro_batch=10_000, checkpoint={"every_steps": 2, "keep": 2},
    )  # fmt: skip


def whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights, moments and running mean, gathered by all processes together."""
    return {name: gathered(tensor).detach().clone() for name, tensor in trainer._facts()[1].items()}


def stop_after_two(rank: int, size: int, port: int, folder: str, shard: Any) -> None:
    """What each process does: two steps, a state, and what it should hold."""
    meet(rank, size, port)
    trainer = trainer_of(Path(folder), shard)
    trainer.stop_signal = signal.SIGTERM
    trainer._agreed = lambda wish: trainer.step == 2 and wish  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    whole = whole_state(trainer)
    if rank == 0:
        save_tensors(Path(folder) / "saved.safetensors", whole)
    processes.stop()


def take_up(rank: int, size: int, port: int, folder: str, shard: Any) -> None:
    """What each process does: begin with other weights, and take the state over."""
    meet(rank, size, port)
    trainer = trainer_of(Path(folder), shard, seed=9)
    trainer._resume()
    assert trainer.step == 2
    found, expected = whole_state(trainer), load_tensors(Path(folder) / "saved.safetensors")
    assert_identical(found, expected)
    own = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    for name, weight in own.items():
        assert torch.equal(weight, expected[f"weights.{name}"]), name
    processes.stop()


def assert_taken_up(folder: Path, saved: tuple[int, Any], then: list[tuple[int, Any]]) -> None:
    """A state of one layout holds the same bits under each of the others."""
    together(stop_after_two, saved[0], str(folder), saved[1])
    for size, shard in then:
        together(take_up, size, str(folder), shard)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "then"),
    [((2, "all"), [(1, 1), (2, 1), (2, "all")]), ((2, 1), [(2, "all")]), ((1, 1), [(2, "all")])],
    ids=["divided", "replicated", "one process"],
)
def test_another_layout_holds_the_same_bits(
    tmp_path: Path, saved: tuple[int, Any], then: list[tuple[int, Any]]
) -> None:
    """L1 and L2: weights, moments and the running mean of a state are the same under any layout."""
    assert_taken_up(tmp_path, saved, then)


TENSOR = {"tensor": 2, "shard": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("saved", "then"),
    [
        ("all", [(1, 1), (2, "all"), (2, TENSOR)]),
        (2, [(1, 1), (4, "all")]),
        # Two groups that hold the same parts, of which one writes.
        (TENSOR, [(1, 1), (2, TENSOR)]),
        ({"tensor": 2, "shard": 2}, [(1, 1), (4, 2)]),
    ],
    ids=["four parts", "two pairs", "tensor", "tensor and shard"],
)
def test_four_processes_and_fewer_hold_the_same_bits(
    tmp_path: Path, saved: Any, then: list[tuple[int, Any]]
) -> None:
    assert_taken_up(tmp_path, (4, saved), then)


@pytest.mark.slow
def test_each_process_writes_its_own_parts_and_the_library_reads_them(tmp_path: Path) -> None:
    """No part is written twice, nothing is pickled, and torch.distributed.checkpoint finds every number."""
    together(stop_after_two, 2, str(tmp_path), "all")
    state = tmp_path / "checkpoints" / "step-000000002"
    assert sorted(one.name for one in state.iterdir()) == ["state.json", file_of(0, 2), file_of(1, 2)]
    expected = load_tensors(tmp_path / "saved.safetensors")
    parts = [load_tensors(state / file_of(rank, 2)) for rank in range(2)]
    assert sum(one.numel() for part in parts for one in part.values()) == sum(
        one.numel() for one in expected.values()
    )
    rows = [part["weights.layers.0.mlp.up.weight"].shape[0] for part in parts]
    assert rows == [len(expected["weights.layers.0.mlp.up.weight"]) // 2] * 2
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(state)), no_dist=True)
    assert_identical(found, expected)


def train(rank: int, size: int, port: int, folder: str, trouble: Callable[[int], None] | None) -> None:
    """What each process does: train to the end, with trouble where state 4 is written."""
    meet(rank, size, port)
    trainer = trainer_of(Path(folder), "all")
    real = files.sync

    def sync(path: Path | str) -> None:
        if trouble is not None and "step-000000004" in str(path):
            trouble(rank)
        real(path)

    files.sync = sync  # type: ignore[assignment]
    try:
        trainer.run()
    except TriviumError as error:
        (Path(folder) / f"said-{rank}").write_text(str(error))
        # As a process ends that has said what is wrong: it waits for no other.
        os._exit(2)
    whole = whole_state(trainer)
    if rank == 0:
        save_tensors(Path(folder) / "end.safetensors", whole)
    processes.stop()


def killed(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def full(rank: int) -> None:
    if rank == 1:
        raise OSError(errno.ENOSPC, "No space left on device")


def ends_of(folder: Path, trouble: Callable[[int], None]) -> list[int | None]:
    """How two processes end, one of them in trouble; neither outlasts a minute."""
    port, context = free_port(), multiprocessing.get_context("fork")
    members = [context.Process(target=train, args=(rank, 2, port, str(folder), trouble)) for rank in range(2)]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
    return [member.exitcode for member in members]


@pytest.mark.slow
@pytest.mark.parametrize("trouble", [killed, full])
def test_a_process_in_trouble_while_it_writes_costs_one_state(
    tmp_path: Path, trouble: Callable[[int], None]
) -> None:
    """L1 and L11: all stop, the state before is found, and the run ends as one that was left alone."""
    together(train, 2, str(tmp_path / "straight"), None)
    cut = tmp_path / "cut"
    ends = ends_of(cut, trouble)
    if trouble is full:
        assert ends == [2, 2]
        said = {(cut / f"said-{rank}").read_text() for rank in range(2)}
        assert len(said) == 1
        assert "The disk is full" in said.pop()
    else:
        assert ends[0] not in (0, None), "it does not wait for the dead"
        assert ends[1] == -signal.SIGKILL
    assert [one.name for one in (cut / "checkpoints").glob("step-*")] == ["step-000000002"]
    together(train, 2, str(cut), None)
    assert losses(cut) == losses(tmp_path / "straight")
    assert not list((cut / "checkpoints").glob(".*"))
    assert_identical(
        load_tensors(cut / "end.safetensors"), load_tensors(tmp_path / "straight" / "end.safetensors")
    )


def go_on(rank: int, size: int, port: int, folder: str) -> None:
    meet(rank, size, port)
    trainer = trainer_of(Path(folder), "all")
    trainer._resume()
    assert trainer.step == 2
    processes.stop()


@pytest.mark.slow
def test_a_damaged_part_of_any_process_is_named_in_all(tmp_path: Path) -> None:
    together(train, 2, str(tmp_path), None)
    path = tmp_path / "checkpoints" / "step-000000004" / file_of(1, 2)
    flip(path, path.stat().st_size // 2)
    together(go_on, 2, str(tmp_path))
    assert not path.parent.exists()


def two_files(folder: Path, whole: torch.Tensor) -> list[Path]:
    """A matrix [5, 4] in the files of two processes: its upper right quarter and the rest."""
    corner, left, lower = whole[:2, 2:], whole[:2, :2], whole[2:]
    paths = [folder / file_of(rank, 3) for rank in range(3)]
    for path, part, offset in zip(paths, (corner, left, lower), ([0, 2], [0, 0], [2, 0]), strict=True):
        write_parts(path, {"a": part}, {"a": offset})
    return paths


def test_any_region_is_read_from_the_files_that_hold_it(tmp_path: Path) -> None:
    whole = torch.arange(20.0).reshape(5, 4)
    saved = SavedTensors(two_files(tmp_path, whole))
    assert torch.equal(saved["a"], whole)
    for top, left, rows, columns in ((0, 0, 1, 4), (1, 1, 3, 2), (2, 0, 3, 4), (4, 3, 1, 1), (0, 2, 2, 2)):
        expected = whole[top : top + rows, left : left + columns]
        assert torch.equal(saved.region("a", (top, left), (rows, columns)), expected)


def test_a_tensor_of_which_a_part_is_missing_is_no_tensor(tmp_path: Path) -> None:
    paths = two_files(tmp_path, torch.arange(20.0).reshape(5, 4))
    saved = SavedTensors([paths[0], paths[2]])
    with pytest.raises(DamagedError, match="holds a in part"):
        saved["a"]


@pytest.mark.parametrize(
    ("old", "new"), [(b"[6]", b"[7]"), (b"\x00\x00\x80?", b"\x00\x00\x81?")], ids=["place", "number"]
)
def test_numbers_and_where_they_belong_are_under_one_checksum(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / file_of(0, 1)
    found = write_parts(path, {"a": torch.ones(6)}, {"a": [6]})
    check_parts(path, found)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(DamagedError, match="is damaged"):
        check_parts(path, found)


def test_a_state_of_one_process_is_one_file(tmp_path: Path) -> None:
    trainer_of(tmp_path, "all").run()
    state = tmp_path / "checkpoints" / "step-000000004"
    assert sorted(one.name for one in state.iterdir()) == ["state.json", "tensors.safetensors"]
    assert torch.equal(read_state(state).tensors["optimiser.steps"], torch.tensor(4))
