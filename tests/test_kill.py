"""A training killed again and again, also while it writes, ends as one that was left alone (L1)."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from designs import ToyPolicy, ToyRollouts
from small import SmallBatches, assert_identical, small_model, small_trainer

from trivium.kit.files import load_tensors, save_tensors
from trivium.kit.metrics import read_metrics

STEPS = 60
KILLS = 24


def train(design: str, folder: str, seed: int) -> None:
    """What the process that gets killed does; another seed shows that nothing of it survives a resume."""
    torch.set_num_threads(1)
    model = small_model(seed)
    batches, objective = (
        (SmallBatches(STEPS), None) if design == "text" else (ToyRollouts(model, STEPS), ToyPolicy())
    )
    trainer = small_trainer(
        Path(folder),
        model=model,
        batches=batches,
        objective=objective,
        ema=0.9,
        checkpoint={"every_steps": 1},
    )
    trainer.run()
    save_tensors(Path(folder) / "end.safetensors", dict(model.named_parameters()))


def start(design: str, folder: Path, seed: int) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=train, args=(design, str(folder), seed))
    process.start()
    return process


def is_writing(folder: Path) -> bool:
    return any((folder / "checkpoints").glob(".*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("design", ["text", "rollouts"])
def test_killed_at_random_moments_it_ends_bit_identical(tmp_path: Path, design: str) -> None:
    undisturbed = start(design, tmp_path / "undisturbed", 0)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    chance = random.Random(7)
    folder = tmp_path / "killed"
    kills = while_writing = attempts = 0
    while not (folder / "end.safetensors").exists():
        attempts += 1
        # The first start decides the weights; later ones begin from others and must not show it.
        resumes = any((folder / "checkpoints").glob("step-*"))
        process = start(design, folder, 99 if resumes else 0)
        if kills < KILLS:
            seen = len(read_metrics(folder / "metrics.jsonl"))
            # Let it make a little way, or the run would never end; then strike while it writes, or anywhere.
            wanted = min(seen + chance.randint(1, 3), STEPS - 2)
            deadline = time.monotonic() + 60
            while len(read_metrics(folder / "metrics.jsonl")) < wanted and time.monotonic() < deadline:
                time.sleep(0.002)
            if kills % 2:
                while process.is_alive() and not is_writing(folder) and time.monotonic() < deadline:
                    pass
            else:
                time.sleep(chance.random() * 0.05)
            caught = is_writing(folder)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                while_writing += caught
        process.join()
        assert attempts < 4 * KILLS
    assert kills >= 20
    assert while_writing >= 3
    assert_identical(
        load_tensors(tmp_path / "undisturbed" / "end.safetensors"), load_tensors(folder / "end.safetensors")
    )
    logs = [read_metrics(path / "metrics.jsonl") for path in (tmp_path / "undisturbed", folder)]
    for one, other in zip(*logs, strict=True):
        for name in ("tokens_per_second", "data_wait"):
            one.pop(name)
            other.pop(name)
        assert one == other
