"""Two processes train as one does: one gradient, one order, and a stop under one resumes under two."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ports import free_port
from small import SmallBatches, small_model, small_trainer

from trivium.data.rows import collate
from trivium.kit import processes
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.kit.metrics import read_metrics
from trivium.learn.objective import Maximum, Measure, Minimum
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.parallel import measures_of_all, sum_gradients
from trivium.learn.trainer import Trainer


def meet(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )  # fmt: skip
    processes.start()


def run_until(trainer: Trainer, cut: int | None) -> bool:
    """Train on until so many steps are done, or to the end; returns whether it came to that."""
    if cut is None:
        trainer.run()
        return True
    trainer.stop_signal = 15
    trainer._agreed = lambda wish: trainer.step >= cut and wish  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    return False


def work(rank: int, size: int, port: int, folder: str, steps: int, cut: int | None) -> None:
    meet(rank, size, port)
    model = small_model()
    trainer = small_trainer(
        Path(folder),
        model=model,
        batches=SmallBatches(steps),
        optimiser="adamw",
        checkpoint={"every_steps": 3},
    )
    if run_until(trainer, cut) and rank == 0:
        save_tensors(Path(folder) / "end.safetensors", dict(model.named_parameters()))
    processes.stop()


def measure(rank: int, size: int, port: int, folder: str) -> None:
    meet(rank, size, port)
    mine: dict[str, Measure] = {
        "mean": (torch.tensor(1.0 + rank), 2.0),
        "min": Minimum(torch.tensor(3.0 - rank)),
        "max": Maximum(5 - rank),
    }
    if rank == 1:
        mine["alone"] = Minimum(7.0)
    write_json(Path(folder) / f"{rank}.json", measures_of_all(mine))
    processes.stop()


# What every process needs is imported once, in a server that forks them: a test's own process has threads by
# then, which a fork does not survive in good order.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch.distributed.fsdp", "torch.distributed.pipelining", "torch.distributed.tensor.parallel",
        "trivium.learn.pipeline_parallel", "trivium.learn.expert_parallel", "trivium.stages", "objectives",
    ]
)  # fmt: skip
FORK = multiprocessing.get_context("fork")
"""Whose processes write where the test's own does."""


def together(target: Callable[..., None], size: int, *arguments: object, start: Any = SERVER) -> None:
    port = free_port()
    members = [start.Process(target=target, args=(rank, size, port, *arguments)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join(120)
    late = [rank for rank, member in enumerate(members) if member.is_alive()]
    for rank in late:
        members[rank].kill()
        members[rank].join()
    assert not late, f"processes {late} did not end in time"
    assert [member.exitcode for member in members] == [0] * size


def crash(rank: int, size: int, port: int) -> None:
    meet(rank, size, port)
    if rank:
        os.kill(os.getpid(), signal.SIGSEGV)


def test_a_process_that_crashes_says_where_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        together(crash, 2, start=FORK)
    assert " in crash\n" in capfd.readouterr().err


LEAVING = """
import atexit
import torch.distributed as distributed
from trivium.kit import processes

atexit.register(lambda: print("left" if not distributed.is_initialized() else "still there"))
processes.start()
assert processes.all_reduce_sum(1.0) == 2.0
"""


@pytest.mark.slow
def test_the_processes_part_before_the_interpreter_ends() -> None:
    """A group that outlives it may abort a process whose results are all written."""
    port = str(free_port())
    started = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", LEAVING],
                env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    assert [process.communicate(timeout=120)[0].strip() for process in started] == ["left", "left"]
    assert [process.returncode for process in started] == [0, 0]


def test_a_mean_a_minimum_and_a_maximum_are_those_of_all_processes(tmp_path: Path) -> None:
    together(measure, 2, str(tmp_path))
    for rank in range(2):
        found = read_json(tmp_path / f"{rank}.json")
        assert found == {"alone": [7.0, 1.0], "max": [5.0, 1.0], "mean": [3.0, 4.0], "min": [2.0, 1.0]}


def whole_gradient(rank: int, size: int, port: int, folder: str) -> None:
    meet(rank, size, port)
    torch.manual_seed(rank)
    trainer = small_trainer(Path(folder) / f"{size}-{rank}")
    measures, norm = trainer._gradient(SmallBatches(rows=5).rows(0))
    gradients = {name: parameter.grad for name, parameter in trainer.named.items()}
    save_tensors(Path(folder) / f"{size}-{rank}.safetensors", gradients)
    write_json(Path(folder) / f"{size}-{rank}.json", {"measures": measures, "norm": norm})
    processes.stop()


def test_a_step_is_divided_by_the_weight_of_all_processes(tmp_path: Path) -> None:
    """L3: three rows here and two there give the sum over all valid tokens over their global weight."""
    together(whole_gradient, 2, str(tmp_path))
    model = small_model()
    result = NextToken().loss(model, collate(SmallBatches(rows=5).rows(0)))
    weight = sum(float(row.weights.sum()) for row in SmallBatches(rows=5).rows(0))
    (result.sum / weight).backward()
    norm = torch.linalg.vector_norm(torch.cat([one.grad.flatten() for one in model.parameters()]))
    for rank in range(2):
        gradients = load_tensors(tmp_path / f"2-{rank}.safetensors")
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
        found = read_json(tmp_path / f"2-{rank}.json")
        assert found["norm"] == pytest.approx(float(norm), rel=1e-5)
        assert found["measures"]["loss"] == pytest.approx([result.sum.item(), weight], rel=1e-5)
        assert found["measures"]["objective"][0] == pytest.approx(result.sum.item() / weight, rel=1e-5)


def unreached(rank: int, size: int, port: int, folder: str) -> None:
    meet(rank, size, port)
    both, first, none = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    both.grad = torch.full((2,), 1.0 + rank)
    first.grad = torch.ones(2) if rank == 0 else None
    sum_gradients([both, first, none])
    found = [None if one.grad is None else one.grad.tolist() for one in (both, first, none)]
    write_json(Path(folder) / f"{rank}.json", {"gradients": found})
    processes.stop()


def test_what_no_process_reached_has_no_gradient(tmp_path: Path) -> None:
    """L3: as in one process, where old momentum does not move what took no part."""
    together(unreached, 2, str(tmp_path))
    for rank in range(2):
        assert read_json(tmp_path / f"{rank}.json")["gradients"] == [[3.0, 3.0], [1.0, 1.0], None]


def losses(folder: Path) -> list[tuple[float, float, int]]:
    rows = read_metrics(folder / "metrics.jsonl")
    return [(row["loss"], row["grad_norm"], row["tokens"]) for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize("cut", [None, 3])
def test_two_processes_train_as_one_does(tmp_path: Path, cut: int | None) -> None:
    """L2 and L3; with a cut, the first three steps are made by one process and the rest by two."""
    together(work, 1, str(tmp_path / "one"), 6, None)
    if cut is not None:
        together(work, 1, str(tmp_path / "two"), 6, cut)
    together(work, 2, str(tmp_path / "two"), 6, None)
    for (loss, norm, tokens), (other, other_norm, other_tokens) in zip(
        losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True
    ):
        assert other == pytest.approx(loss, abs=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
        assert other_tokens == tokens
    one, two = (load_tensors(tmp_path / name / "end.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=0, msg=name)
