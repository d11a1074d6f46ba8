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

from trivium.generate.engine import Engine
from trivium.kit.files import load_tensors
from trivium.kit.metrics import read_metrics

TIMED = (
    "tokens_per_second",
    "data_wait",
    "rollout_seconds",
    "generation_seconds",
    "scoring_seconds",
    "rollout_wait_share",
)


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
    return _compared(whole, folder)


def ends_identical_when_killed_while_sampling(
    until_the_end: Callable[[str, int], None], place: Path, second: int = 2
) -> list[dict[str, Any]]:
    """The same, where the kills come while answers are drawn: in the first rollout, then the second.

    `second` is the rollout of the second kill, the first that is made after a step.
    """
    context = multiprocessing.get_context("fork")
    whole, folder = place / "whole", place / "cut"
    for path, rollout, code in ((whole, 0, 0), (folder, 1, -9), (folder, second, -9), (folder, 0, 0)):
        known = len(read_metrics(folder / "metrics.jsonl"))
        process = context.Process(
            target=_with_a_kill, args=(until_the_end, str(path), 77 if known else 0, rollout)
        )
        process.start()
        process.join()
        assert process.exitcode == code
        if code:
            steps = len(read_metrics(folder / "metrics.jsonl"))
            assert (steps > 0) == (rollout == second), (
                "the first kill comes before any step, the second after some"
            )
    return _compared(whole, folder)


def _with_a_kill(until_the_end: Callable[[str, int], None], folder: str, seed: int, rollout: int) -> None:
    """Run to the end, or until some tokens of the given rollout are drawn."""
    generate, step = Engine.generate, Engine.step
    counts = {"rollouts": 0, "steps": 0}

    def counted_generate(self: Engine, *arguments: Any) -> Any:
        counts.update(rollouts=counts["rollouts"] + 1, steps=0)
        return generate(self, *arguments)

    def counted_step(self: Engine) -> bool:
        counts["steps"] += 1
        if counts["rollouts"] == rollout and counts["steps"] == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    Engine.generate, Engine.step = counted_generate, counted_step  # type: ignore[method-assign]
    until_the_end(folder, seed)


def _compared(whole: Path, folder: Path) -> list[dict[str, Any]]:
    """The log of both, once weights and logs are found to be identical."""
    assert_identical(load_tensors(whole / "end.safetensors"), load_tensors(folder / "end.safetensors"))
    logs = [read_metrics(path / "metrics.jsonl") for path in (whole, folder)]
    for one, other in zip(*logs, strict=True):
        for row in (one, other):
            for name in TIMED:
                row.pop(name, None)
        assert one == other
    return logs[0]
