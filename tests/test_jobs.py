"""Stages side by side: the same results as one after the other, stopped as one, and none lost for another."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from buckets import made, until
from forked import copied, forked
from toys import own_kinds

from trivium.cli import main
from trivium.kit.errors import TriviumError
from trivium.kit.seals import COMPLETE
from trivium.kit.stopping import without_requests
from trivium.pipeline import worker
from trivium.pipeline.jobs import crew, shares, threads
from trivium.pipeline.launch import script
from trivium.pipeline.run import run

RECIPE = """\
name: toy
seed: 7
stages:
  words: {kind: toys.py:ToyWords, data: ./texts.txt}
  base:  {kind: toys.py:ToyTrain, words: words, steps: 4}
  left:  {kind: toys.py:ToyTrain, from: base, steps: 2, gate: GATE}
  right: {kind: toys.py:ToyTrain, from: base, steps: 3, gate: GATE}
  last:  {kind: toys.py:ToyTrain, from: left, steps: 1}
"""


SUMS = """\
from typing import Literal
from pydantic import Field
from trivium.stages.parts.stage import Reference, Stage


class Sums(Stage):
    kind: Literal["sums"]
    produces = "model"
    start: str = Field(alias="from")
    steps: int = 1

    def references(self):
        return [Reference("from", self.start, ("model",))]

    def run(self, work):
        return {"share": 1 / 0}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Kinds from a file: a worker is a process of its own, which knows what the recipe names."""
    own_kinds(tmp_path)
    (tmp_path / "texts.txt").write_text("some words\n")
    (tmp_path / "toy.yaml").write_text(RECIPE.replace("GATE", str(tmp_path / "gate")))
    return tmp_path / "toy.yaml"


@pytest.fixture
def copies(monkeypatch) -> None:
    """Workers are copies of this process, which need not import torch again; what they do is the same."""

    def begun(jobs: int) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        env = {**without_requests(dict(os.environ)), "OMP_NUM_THREADS": str(threads(jobs))}
        return copied(worker.main, ["worker"], start_new_session=True, env=env, **pipes)

    monkeypatch.setattr("trivium.pipeline.jobs._begun", begun)


def command(recipe: Path, runs: Path, *more: str) -> subprocess.Popen[str]:
    into = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return forked("run", recipe, "--runs", runs, "--jobs", "2", *more, **into)


def at_work(runs: Path) -> set[str]:
    """The stages that a process holds and has begun to write."""
    held = (lock.parent for lock in (runs / "store").glob("*/LOCK"))
    return {entry.name.partition("-")[0] for entry in held if (entry / "metrics.jsonl").is_file()}


def finished(runs: Path) -> set[str]:
    return {done.parent.name.partition("-")[0] for done in (runs / "store").glob(f"*/{COMPLETE}")}


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_two_stages_are_made_at_a_time_and_come_to_the_same(recipe, tmp_path, copies):
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    running = command(recipe, runs)
    # Both wait for the gate, so both were begun before either is done.
    until(lambda: {"left", "right"} <= at_work(runs))
    gate.touch()
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert said.count("base: own_train") == 1
    alone = run(recipe, tmp_path / "alone")
    assert made(runs, "toy") == made(tmp_path / "alone", "toy")
    assert set(run(recipe, runs, jobs=2).became.values()) == {"reused"}
    assert list(run(recipe, runs, jobs=2).became) == list(alone.became)


def test_ctrl_c_stops_all_and_the_same_command_goes_on(recipe, tmp_path, copies):
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    running = command(recipe, runs)
    until(lambda: {"left", "right"} <= at_work(runs))
    workers = descendants(running)
    running.send_signal(signal.SIGINT)
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 130, said
    assert "the same command goes on from here" in said
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert finished(runs) == {"words", "base"}
    gate.touch()
    again = run(recipe, runs, jobs=2)
    assert again.became == {
        "words": "reused", "base": "reused", "left": "resumed", "right": "resumed", "last": "ran"
    }  # fmt: skip


def test_workers_stop_when_the_process_that_leads_them_is_killed(recipe, tmp_path, copies):
    runs = tmp_path / "runs"
    running = command(recipe, runs)
    until(lambda: {"left", "right"} <= at_work(runs))
    workers = descendants(running)
    running.kill()
    running.communicate()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert at_work(runs) == set()


def test_one_that_fails_loses_no_other(recipe, tmp_path, capsys, copies):
    (tmp_path / "gate").touch()
    runs = tmp_path / "runs"
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(recipe), "--runs", str(runs), "--jobs", "2", "--set", "left.die_at=1"])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "left failed: the process that made it ended with status 9" in said
    assert "not run, because they need it: last" in said
    assert finished(runs) == {"words", "base", "right"}
    prepared = run(recipe, runs, jobs=2)
    assert prepared.became["right"] == "reused"
    assert prepared.became["left"] == "resumed"
    assert prepared.became["last"] == "ran"


def test_what_a_stage_says_of_its_failure_is_told_and_the_others_go_on(recipe, tmp_path, copies):
    (tmp_path / "gate").touch()
    text = recipe.read_text().replace(
        "last:  {kind: toys.py:ToyTrain, from: left", "last:  {kind: sums.py:Sums, from: left"
    )
    recipe.write_text(text)
    (tmp_path / "sums.py").write_text(SUMS)
    with pytest.raises(TriviumError, match="last failed: ZeroDivisionError: division by zero"):
        run(recipe, tmp_path / "runs", jobs=2)
    assert finished(tmp_path / "runs") == {"words", "base", "left", "right"}


def test_runs_that_share_a_folder_share_the_work(recipe, tmp_path, copies):
    """What an array of SLURM does: the same command several times, on one file system."""
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    both = [command(recipe, runs), command(recipe, runs)]
    until(lambda: {"left", "right"} <= at_work(runs))
    gate.touch()
    said = [one.communicate(timeout=120)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    for stage in ("words: own_words", *(f"{name}: own_train" for name in ("base", "left", "right", "last"))):
        assert sum(one.count(stage) for one in said) == 1, said


def test_each_job_has_its_part_of_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("trivium.kit.machine.cores", lambda: 8)
    assert shares(3) == [{}] * 3
    assert [threads(jobs) for jobs in (1, 3, 16)] == [8, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert threads(2) == 1
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares(2)] == ["5", "7"]
    with pytest.raises(TriviumError, match="--jobs 3 needs so many GPUs; there are 2, write --jobs 2"):
        shares(3)


def test_processes_that_nobody_needs_end_with_the_command(recipe, tmp_path):
    """They start before the recipe is read, which may be wrong."""
    with crew(2) as processes:
        taken = processes.pop()
        assert taken.poll() is None
    assert [one.poll() for one in processes] == [-signal.SIGKILL]
    _, said = taken.communicate(timeout=60)
    assert taken.returncode == 0, said
    recipe.write_text(recipe.read_text().replace("steps: 4", "steps: four"))
    running = command(recipe, tmp_path / "runs")
    until(lambda: len(descendants(running)) == 2 or running.poll() is not None)
    workers = descendants(running) if running.poll() is None else []
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 2, said
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


def test_an_array_is_written_for_slurm(recipe, tmp_path):
    text = script(str(recipe), "slurm", "runs", nodes=1, processes=2, jobs=4)
    assert "#SBATCH --array=0-3\n" in text
    assert f"python -m trivium.cli run {recipe} --runs runs --jobs 2 &\n" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    with pytest.raises(TriviumError, match="--jobs makes an array of SLURM"):
        script(str(recipe), "torchrun", "runs", nodes=1, processes=2, jobs=4)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Path:
    """What a job finds on a node: `scontrol` notes what it is asked, `srun` starts what it is given."""
    commands, asked = tmp_path / "bin", tmp_path / "asked"
    commands.mkdir()
    for name, line in {"scontrol": f'echo "$@" >> {asked}', "srun": "exec sleep 60"}.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
        (commands / name).chmod(0o755)
    (commands / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    for name, value in {"JOB_ID": "77", "JOB_NODELIST": "one"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return asked


@pytest.mark.slow
def test_a_task_whose_time_is_up_saves_and_asks_to_be_queued_again(recipe, tmp_path, slurm, monkeypatch):
    runs, gate = tmp_path / "runs", tmp_path / "gate"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "76")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    job = tmp_path / "job.sh"
    job.write_text(script(str(recipe), "slurm", runs, nodes=1, processes=2, jobs=4))
    task = subprocess.Popen(["bash", str(job)], stderr=subprocess.PIPE, text=True)
    until(lambda: {"left", "right"} <= at_work(runs))
    workers = descendants(task)
    task.send_signal(signal.SIGTERM)
    _, said = task.communicate(timeout=120)
    assert (task.returncode, slurm.read_text()) == (0, "requeue 76_3\n"), said
    assert not [one for one in workers if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    gate.touch()
    done = subprocess.run(["bash", str(job)], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "left: going on where it was cut off" in done.stderr
    assert slurm.read_text() == "requeue 76_3\n"


def test_a_job_on_several_machines_asks_to_be_queued_again(recipe, tmp_path, slurm):
    job = tmp_path / "job.sh"
    job.write_text(script(str(recipe), "slurm", tmp_path / "runs", nodes=2, processes=2))
    task = subprocess.Popen(["bash", str(job)])
    until(lambda: any(one.name() == "sleep" for one in descendants(task)))
    task.send_signal(signal.SIGTERM)
    assert task.wait(timeout=60) == 0
    assert "requeue 77" in slurm.read_text().splitlines()


EXPERIMENT = """\
name: seeds
stages:
  words: {kind: tokenizer, data: [{path: world:prose, limit: 60}], vocabulary: 300}
  corpus: {kind: corpus, data: [{path: world:prose, limit: 60}], tokenizer: words, validation: 0.1}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32, head_width: 16, heads: 2}, context: 64,
         batch: 256, steps: 6}
experiment:
  seeds: 2
  arms: {slow: {base: {learning_rate: 0.001}}, fast: {}}
  measure: {loss: {stage: base, take: loss}}
  claims: [{says: Fast is better, on: loss, arm: fast, against: slow, below: 0, control: slow}]
"""


@pytest.mark.slow
def test_an_experiment_side_by_side_is_the_same_bit_for_bit(tmp_path, copies):
    path = tmp_path / "seeds.yaml"
    path.write_text(EXPERIMENT)
    serial, beside = run(path, tmp_path / "serial"), run(path, tmp_path / "beside", jobs=2)
    assert made(tmp_path / "beside", "seeds") == made(tmp_path / "serial", "seeds")
    assert len(beside.became) == 6
    assert beside.concluded["claims"] == serial.concluded["claims"]
    assert beside.concluded["measures"] == serial.concluded["measures"]
