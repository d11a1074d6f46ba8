"""A training process that is killed twice and started again, beside one that is left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small import assert_identical

from trivium.kit.files import load_tensors
from trivium.kit.metrics import read_metrics

TIMED = ("tokens_per_second", "rollout_seconds")


def ends_identical_when_killed(
    until_the_end: Callable[[str, int], None], place: Path
) -> list[dict[str, Any]]:
    """Check that both write the same `end.safetensors` and the same log, which is given."""
    context = multiprocessing.get_context("fork")
    whole, folder = place / "whole", place / "cut"
    alone = context.Process(target=until_the_end, args=(str(whole), 0))
    alone.start()
    alone.join()
    kills = 0
    for wanted in (3, 6, None):
        # Only the first start decides the weights; a later one begins from others and must not show it.
        process = context.Process(target=until_the_end, args=(str(folder), 77 if kills else 0))
        process.start()
        while wanted is not None and process.is_alive():
            saved = folder / "checkpoints" / f"step-{wanted:09d}"
            if saved.exists() or len(read_metrics(folder / "metrics.jsonl")) > wanted:
                os.kill(process.pid or 0, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.001)
        process.join()
    assert kills == 2
    assert_identical(load_tensors(whole / "end.safetensors"), load_tensors(folder / "end.safetensors"))
    logs = [read_metrics(path / "metrics.jsonl") for path in (whole, folder)]
    for one, other in zip(*logs, strict=True):
        for row in (one, other):
            for name in TIMED:
                row.pop(name)
        assert one == other
    return logs[0]
