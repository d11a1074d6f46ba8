"""Disks that are not honest and clocks that jump: power cuts, stale handles, and a year gone by."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from disk import Loses, LossyDisk
from small import assert_identical, small_model, small_trainer, weights_of
from test_lock import own_namespaces
from test_pipeline import command, environment
from toys import RECIPE, write_recipe

from trivium.cli import main
from trivium.kit import files
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import read_metrics
from trivium.learn.checkpoints import Checkpoints
from trivium.pipeline import lock
from trivium.pipeline.run import run
from trivium.pipeline.store import Entry, Store


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("loses", ["names and content", "content"])
def test_a_power_cut_loses_no_state_that_was_saved(tmp_path: Path, monkeypatch, loses: Loses) -> None:
    """At every fsync of a training: the newest state that was saved is there and goes on identically."""
    straight = small_model()
    small_trainer(tmp_path / "straight", model=straight).run()
    folder = tmp_path / "cut"
    folder.mkdir()
    disk, saved = LossyDisk(folder, monkeypatch), [(0, 0)]
    write = Checkpoints._write

    def note(self: Checkpoints, step: int, *arguments: Any) -> None:
        write(self, step, *arguments)
        saved.append((len(disk.moments), step))

    monkeypatch.setattr(Checkpoints, "_write", note)
    small_trainer(folder, checkpoint={"every_steps": 1}).run()
    monkeypatch.undo()
    assert len(saved) == 8
    moments = range(len(disk.moments))
    for moment in moments:
        place = disk.after(moment, tmp_path / f"after{moment}", loses)
        # Counted before the moment, since what is being written when the power goes may be lost.
        newest = max(step for count, step in saved if count <= moment)
        trainer = small_trainer(place)
        state = trainer.checkpoints.latest()
        assert (state.facts["step"] if state else 0) >= newest
        if state is not None:
            logged = [row["step"] for row in read_metrics(place / "metrics.jsonl")]
            assert logged[: state.facts["step"]] == list(range(1, state.facts["step"] + 1))
    for moment in random.Random(loses).sample(moments, 4):
        again = small_model(seed=9 if saved[1][0] <= moment else 0)
        small_trainer(tmp_path / f"after{moment}", model=again).run()
        assert_identical(weights_of(straight), weights_of(again))
        logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", f"after{moment}")]
        assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]


@pytest.mark.slow
@pytest.mark.parametrize("loses", ["names and content", "content"])
def test_after_a_power_cut_what_is_complete_is_whole(tmp_path: Path, monkeypatch, loses: Loses) -> None:
    """At every fsync of a recipe: no finished stage lacks a byte, and the same command ends the rest."""
    path = write_recipe(tmp_path, RECIPE)
    runs = tmp_path / "runs"
    runs.mkdir()
    with monkeypatch.context() as patch:
        disk = LossyDisk(runs, patch)
        prepared = run(path, runs, only=["left"])
    wanted = {name: prepared.entry(name).output for name in prepared.became}
    complete = 0
    for moment in range(len(disk.moments)):
        place = disk.after(moment, tmp_path / f"after{moment}", loses)
        for entry in Store(place).entries():
            if entry.state == "done":
                complete += 1
                entry.verify(entry.output)
        if moment % 10 == 0:
            again = run(path, place, only=["left"])
            for name, output in wanted.items():
                for file in output.iterdir():
                    assert (again.entry(name).output / file.name).read_bytes() == file.read_bytes()
    assert complete > 10


def stale(number: int, *, at: str) -> Any:
    """An fsync that fails for files with `at` in their path, as a file system that has gone away does."""
    real = files.sync

    def sync(path: Path | str) -> None:
        if at in str(path):
            raise OSError(number, os.strerror(number), str(path))
        real(path)

    return sync


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_system_that_goes_away_stops_the_run_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    straight = small_model()
    small_trainer(tmp_path / "straight", model=straight).run()
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", stale(number, at="step-000000006"))
        cut = small_trainer(tmp_path / "cut", checkpoint={"every_steps": 2})
        with pytest.raises(TriviumError, match=r"could not be written: .*; see to the disk or the network"):
            cut.run()
    assert cut.checkpoints.steps() == [2, 4]
    again = small_model(seed=9)
    small_trainer(tmp_path / "cut", model=again).run()
    assert_identical(weights_of(straight), weights_of(again))


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_state_that_cannot_be_read_for_a_while_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A damaged state is removed; a stale handle is no damage."""
    trainer = small_trainer(tmp_path, checkpoint={"every_steps": 3})
    trainer.run()
    real = Path.read_text

    def gone(self: Path, *arguments: Any, **options: Any) -> str:
        if self.name == "state.json":
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", gone)
        with pytest.raises(TriviumError, match=r"state\.json cannot be read: "):
            small_trainer(tmp_path).run()
    assert trainer.checkpoints.steps() == [3, 6]


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_the_command_ends_in_a_sentence_where_the_disk_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, capsys
) -> None:
    run(write_recipe(tmp_path), tmp_path / "runs", only=["base"])
    real = os.scandir

    def gone(place: Any = ".") -> Any:
        if "runs" in str(place):
            raise OSError(number, os.strerror(number), str(place))
        return real(place)

    monkeypatch.setattr(os, "scandir", gone)
    with pytest.raises(SystemExit) as ended:
        main(["gc", "--runs", str(tmp_path / "runs")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert os.strerror(number) in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("years", [-1, 1, 40])
def test_a_clock_that_jumps_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    """Backwards and forwards, between a stop and its resumption, and while a stage is at work."""
    path = write_recipe(tmp_path)
    real, away = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + away[0])
    whole = run(path, tmp_path / "whole")
    log = Entry.metrics.fget(whole.entry("base"))  # type: ignore[attr-defined]
    entry = whole.entry("base").folder.name
    # A lock of one that died, taken in another year; a text that was changed in one to come.
    (tmp_path / "cut" / "store" / entry).mkdir(parents=True)
    with lock.locked(tmp_path / "cut" / "store" / entry, print):
        (tmp_path / "held").write_text((tmp_path / "cut" / "store" / entry / "LOCK").read_text())
    (tmp_path / "cut" / "store" / entry / "LOCK").write_text((tmp_path / "held").read_text())
    away[0] = years * 365 * 86400
    stamp = real() - 2 * away[0]
    os.utime(tmp_path / "texts" / "a.txt", (stamp, stamp))
    again = run(path, tmp_path / "cut")
    assert set(again.became.values()) <= {"ran", "resumed"}
    assert again.entry("base").folder.name == entry
    assert again.entry("base").metrics == log
    assert 0 <= again.entry("base").record["seconds"] < 100
    away[0] = 0
    assert set(run(path, tmp_path / "cut").became.values()) == {"reused"}
    # Another text of the same length in a second that has long passed is another text.
    (tmp_path / "texts" / "a.txt").write_text("other words\n"[:11])
    os.utime(tmp_path / "texts" / "a.txt", (stamp, stamp))
    assert run(path, tmp_path / "cut").became["words"] == "ran"


@pytest.mark.slow
def test_two_machines_on_one_store_make_each_stage_once(tmp_path: Path) -> None:
    """Two processes that share nothing but the folder: neither numbers, nor host names, nor a parent."""
    path, runs = write_recipe(tmp_path, RECIPE.replace("steps: 4", "steps: 40")), tmp_path / "runs"
    words = command("run", path, "--runs", runs, "--only", "base")
    before = own_namespaces()
    started = [
        subprocess.Popen(
            [*before, *words], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    entry = Store(runs).recipes()["toy"]["base"]
    assert [row["step"] for row in entry.metrics] == list(range(1, 41))
    assert sum("base: toy_train" in one for one in said) == 1
    assert sum("base: done before, reused" in one for one in said) == 1
