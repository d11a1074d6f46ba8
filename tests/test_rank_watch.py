"""A process that no longer answers, or is slow, is named: no collective waits for ever."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from buckets import until
from ports import free_port
from small import SmallBatches, small_trainer, tiny_recipe

from trivium.kit.errors import TriviumError
from trivium.kit.progress import Progress
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.rank_watch import slower


class Faulty(SmallBatches):
    """At its fourth step one process stops, or waits for ever."""

    def __init__(self, steps: int, how: str, rank: int) -> None:
        super().__init__(steps)
        self.how, self.rank = how, rank

    def rows(self, step: int) -> list:
        if step == 3 and int(os.environ["RANK"]) == self.rank:
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.how == "waiting":
                time.sleep(600)
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return super().rows(step)


class Slow(NextToken):
    """One process takes longer for its own rows."""

    def loss(self, *words: object):
        if os.environ["RANK"] == "1":
            time.sleep(0.05)
        return super().loss(*words)


def work(folder: Path, how: str, rank: int) -> None:
    from trivium.kit import processes

    processes.start()
    objective = Slow() if how == "slow" else None
    steps = 60 if how == "slow" else 8
    try:
        trainer = small_trainer(
            folder, batches=Faulty(steps, how, rank), objective=objective, optimiser="adamw"
        )
        trainer.watch.say = Progress("test", sys.stderr).say
        trainer.run()
    except TriviumError as error:
        print(f"trivium: {error}", file=sys.stderr)


def member(place: int, folder: Path, how: str, rank: int, environment: dict[str, str]) -> None:
    """One of two processes, in a copy of this one; what it says goes to a file."""
    os.environ.update(environment, RANK=str(place), LOCAL_RANK=str(place))
    torch.set_num_threads(1)
    sys.stderr = open(folder / f"{place}.txt", "w", buffering=1)  # noqa: SIM115
    work(folder, how, rank)


def pair(folder: Path, how: str, rank: int, **limits: str) -> list[Any]:
    """Two processes of a training."""
    environment = {
        "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "TRIVIUM_LOGS": str(folder), **limits,
    }  # fmt: skip
    context = multiprocessing.get_context("fork")
    members = [
        context.Process(target=member, args=(place, folder, how, rank, environment)) for place in range(2)
    ]
    for one in members:
        one.start()
    return members


def ended(folder: Path, members: list[Any], place: int, how: str = "") -> str:
    try:
        members[place].join(100)
        if how == "waiting":
            members[1 - place].join(30)
        return (folder / f"{place}.txt").read_text()
    finally:
        for one in members:
            one.kill()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [1, 0])
def test_a_stopped_process_is_named_and_the_other_ends(tmp_path, stopped):
    """A stopped first process takes the rendezvous' store with it, which lies in it without torchrun."""
    members = pair(tmp_path, "stopped", stopped, TRIVIUM_SILENT_SECONDS="2")
    said = ended(tmp_path, members, 1 - stopped)
    assert members[1 - stopped].exitcode == 70, said
    line = next(line for line in said.splitlines() if line.startswith("trivium: "))
    assert f"rank {stopped}" in line
    assert "step" in line
    folder = tmp_path / "flight-recorder"
    assert f"are in {folder}" in line
    recorded = json.loads((folder / f"rank-{1 - stopped:05d}.gloo.json").read_text())
    assert recorded["entries"][-1]["profiling_name"].startswith("gloo:")
    assert "in all_reduce" in (folder / f"rank-{1 - stopped:05d}.stacks.txt").read_text()


@pytest.mark.slow
def test_the_process_for_which_all_others_wait_is_named(tmp_path):
    members = pair(tmp_path, "waiting", 1, TRIVIUM_STALLED_SECONDS="2")
    said = ended(tmp_path, members, 0, "waiting")
    assert [one.exitcode for one in members] == [70, 70]
    line = next(line for line in said.splitlines() if line.startswith("trivium: "))
    assert "no process has moved for 2 s: rank 1 (" in line
    assert "at step 4 (reading rows), while rank 0 is at step 4 (adding up weights)" in line


@pytest.mark.slow
def test_the_loss_of_another_process_is_one_sentence(tmp_path):
    members = pair(tmp_path, "killed", 1)
    said = ended(tmp_path, members, 0)
    line = next(line for line in said.splitlines() if line.startswith("trivium: "))
    assert "rank 0 of 2 lost another process at step 4 (adding up weights)" in line
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_slow_process_is_named_with_its_factor(tmp_path):
    members = pair(tmp_path, "slow", 1, TRIVIUM_COMPARED_SECONDS="1")
    said = ended(tmp_path, members, 0)
    line = next(line for line in said.splitlines() if "slower than the median" in line)
    assert line.startswith("rank 1 (")
    assert said.count("slower than the median") == 1


def test_slower_than_the_median():
    assert slower({0: 1.0, 1: 1.1, 2: 1.0, 3: 1.6}) == [(3, 1.6, 1.0)]
    # Of two, the faster one is the measure.
    assert slower({0: 2.0, 1: 1.0}) == [(0, 2.0, 1.0)]
    assert slower({0: 0.0, 1: 0.0}) == []


def launched(recipe: Path, runs: Path, **limits: str) -> subprocess.Popen[str]:
    """What `trivium launch --on torchrun` starts, with two processes."""
    from trivium.pipeline.launch import script

    text = script(str(recipe), "torchrun", runs, processes=2, cpus=1, gpus=False)
    path = recipe.parent / f"{runs.name}.sh"
    path.write_text(text.replace("exec python", f"exec {sys.executable}"))
    return subprocess.Popen(
        ["bash", str(path)], env={**os.environ, **limits}, stderr=subprocess.STDOUT,
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def whole(process: subprocess.Popen[str]) -> str:
    """What a launched run says until it ends; it is bounded."""
    try:
        said, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return said


def ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, in the order of their ranks."""
    found = [one for one in psutil.Process(process.pid).children(recursive=True) if "RANK" in one.environ()]
    return sorted(found, key=lambda one: int(one.environ()["RANK"]))


def saved(runs: Path) -> list[Path]:
    return sorted(runs.glob("store/base-*/checkpoints/step-*"))


def weights(runs: Path) -> bytes:
    return (runs / "tiny/base/model/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The same recipe on two processes, left alone."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tiny.yaml").write_text(tiny_recipe(steps=60, every=10))
    process = launched(folder / "tiny.yaml", folder / "runs")
    said = whole(process)
    assert process.returncode == 0, said
    logs = folder / "runs/tiny/.logs"
    assert len(list(logs.rglob("stderr.log"))) == 2
    assert "all-reduce among all 2 processes" in said
    return folder


@pytest.mark.slow
def test_torchrun_starts_again_and_the_end_is_equal_bit_for_bit(alone, tmp_path):
    runs = tmp_path / "runs"
    process = launched(alone / "tiny.yaml", runs)
    until(lambda: len(saved(runs)) > 0)
    ranks(process)[1].kill()
    said = whole(process)
    assert process.returncode == 0, said
    assert "Going on after step" in said
    assert weights(runs) == weights(alone / "runs")


@pytest.mark.slow
def test_sigterm_with_a_grace_of_20_s_saves_and_the_end_is_equal(alone, tmp_path):
    runs = tmp_path / "runs"
    process = launched(alone / "tiny.yaml", runs)
    until(lambda: len(saved(runs)) > 0)
    process.send_signal(signal.SIGTERM)
    # A scheduler kills what is still there then.
    said = process.communicate(timeout=20)[0]
    assert "Stopped after step" in said
    again = launched(alone / "tiny.yaml", runs)
    said = whole(again)
    assert again.returncode == 0, said
    assert "Going on after step" in said
    assert weights(runs) == weights(alone / "runs")
