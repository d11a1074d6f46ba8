"""Saved states go through the shared store: what is taken over goes on from them, to the same bits."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from buckets import made, until
from test_sharing import ended, machine
from toys import write_recipe

from trivium.kit.errors import TriviumError
from trivium.kit.places import Folder, place_at
from trivium.learn.trainer import Trainer
from trivium.pipeline import states as module
from trivium.pipeline.run import prepare, run
from trivium.pipeline.states import STATE, SavedStates, progress

TRAINING = """\
name: seeds
stages:
  words: {kind: tokenizer, data: [{path: world:prose, limit: 60}], vocabulary: 300}
  corpus: {kind: corpus, data: [{path: world:prose, limit: 60}], tokenizer: words, validation: 0.1}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32, head_width: 16, heads: 2}, context: 64,
         batch: 256, steps: 8, checkpoint: {every_steps: 2}}
"""


def holding(number: int) -> Any:
    """A lease with this number, which is never lost."""
    return SimpleNamespace(number=number, lost=False, check=lambda: None)


def saved(entry: Path, step: int, more: str = "") -> Path:
    """An entry as a stage leaves it that was cut off after some steps."""
    state = entry / "checkpoints" / f"step-{step:09d}"
    state.mkdir(parents=True)
    (state / "state.json").write_text(f"{step}{more}")
    (entry / "metrics.jsonl").write_text('{"step": 1}\n')
    (entry / "stage.yaml").write_text("kind: toy\n")
    return entry


def files(entry: Path) -> dict[str, str]:
    paths = [path for path in entry.rglob("*") if path.is_file()]
    return {path.relative_to(entry).as_posix(): path.read_text() for path in paths}


@pytest.mark.slow
def test_a_killed_machines_stage_goes_on_from_what_it_saved(tmp_path):
    """The machine is killed at its third step, and the one that takes over makes the third and fourth."""
    path, gate, url = write_recipe(tmp_path), tmp_path / "gate", f"file://{tmp_path / 'shared'}"
    words = ("run", path, "--store", url, "--only", "base")
    words += ("--set", f"base.gate={gate}", "--set", "base.gate_at=3")
    dead = machine(*words, "--runs", tmp_path / "dead")
    fingerprint = prepare(path, tmp_path / "look").nodes["base"].fingerprint
    until(lambda: f"1.{STATE}" in place_at(url).names(f"checkpoints/{fingerprint}"))
    dead.kill()
    dead.communicate()
    gate.touch()
    said = ended(machine(*words, "--runs", tmp_path / "heir"))
    assert "what another machine saved is used" in said
    assert "base: going on where it was cut off" in said
    assert place_at(url).names(f"checkpoints/{fingerprint}") == []
    run(path, tmp_path / "alone", only=["base"])
    assert made(tmp_path / "heir", "toy") == made(tmp_path / "alone", "toy")
    rows = (tmp_path / "heir" / "toy" / "base" / "metrics.jsonl").read_text()
    assert rows == (tmp_path / "alone" / "toy" / "base" / "metrics.jsonl").read_text()


def killed_at_step(recipe: Path, runs: Path, url: str, step: int) -> None:
    """A machine that loses its power after some steps, once it has shared a state."""
    fingerprint = prepare(recipe, runs).nodes["base"].fingerprint
    one_step = Trainer._one_step

    def counted(self: Trainer) -> Any:
        row = one_step(self)
        if self.step == step:
            until(lambda: f"1.{STATE}" in place_at(url).names(f"checkpoints/{fingerprint}"))
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    Trainer._one_step = counted  # type: ignore[method-assign]
    module.LOOK = 0.05
    run(recipe, runs, store=url)


@pytest.mark.slow
def test_a_training_that_is_taken_over_comes_to_the_same_bits(tmp_path, monkeypatch):
    recipe, url = tmp_path / "seeds.yaml", f"file://{tmp_path / 'shared'}"
    recipe.write_text(TRAINING)
    run(recipe, tmp_path / "alone")
    arguments = (recipe, tmp_path / "dead", url, 5)
    process = multiprocessing.get_context("fork").Process(target=killed_at_step, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    steps: list[int] = []
    one_step = Trainer._one_step

    def counted(self: Trainer) -> Any:
        steps.append(self.step + 1)
        return one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", counted)
    prepared = run(recipe, tmp_path / "heir", store=url)
    assert prepared.became == {"words": "pulled", "corpus": "pulled", "base": "resumed"}
    assert steps in ([3, 4, 5, 6, 7, 8], [5, 6, 7, 8])
    assert made(tmp_path / "heir", "seeds") == made(tmp_path / "alone", "seeds")


@pytest.mark.slow
def test_one_that_is_stopped_shares_what_it_saved_on_the_way_out(tmp_path, monkeypatch):
    recipe, url = tmp_path / "seeds.yaml", f"file://{tmp_path / 'shared'}"
    recipe.write_text(TRAINING.replace("every_steps: 2", "every_steps: 100"))
    one_step = Trainer._one_step

    def stopped(self: Trainer) -> Any:
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return one_step(self)

    monkeypatch.setattr(Trainer, "_one_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "here", store=url)
    monkeypatch.setattr(Trainer, "_one_step", one_step)
    assert run(recipe, tmp_path / "there", store=url).became["base"] == "resumed"


def test_a_store_that_is_away_for_a_while_does_not_stop_the_stage(tmp_path, monkeypatch, capsys):
    """Saved states are a convenience: what cannot be sent is said once."""
    entry, place, tried = saved(tmp_path / "far-12", 10), Folder(tmp_path / "shared"), []

    def away(name: str, content: bytes) -> None:
        tried.append(name)
        raise TriviumError("s3://lab cannot be used: no route")

    monkeypatch.setattr(place, "write", away)
    monkeypatch.setattr(module, "LOOK", 0.01)
    with SavedStates(place, "12").following(entry, holding(1), print):
        until(lambda: len(tried) > 6)
    assert capsys.readouterr().out == (
        "far-12: its saved state could not be shared (s3://lab cannot be used: no route)\n"
    )
    monkeypatch.undo()
    states = SavedStates(place, "12")
    with pytest.raises(KeyboardInterrupt), states.following(entry, holding(1), print):
        raise KeyboardInterrupt
    assert f"1.{STATE}" in place.names("checkpoints/12")


def test_nothing_is_sent_any_more_when_the_stage_has_ended(tmp_path, monkeypatch):
    begun, ended = threading.Event(), threading.Event()

    def slow(*_: Any) -> None:
        begun.set()
        time.sleep(0.3)
        ended.set()

    monkeypatch.setattr(module, "LOOK", 0.01)
    monkeypatch.setattr(SavedStates, "_try_to_send", slow)
    with SavedStates(Folder(tmp_path / "shared"), "12").following(tmp_path, holding(1), print):
        assert begun.wait(20)
    assert ended.is_set()


def test_only_what_is_ahead_of_this_disk_is_fetched(tmp_path, capsys):
    states = SavedStates(Folder(tmp_path / "shared"), "12")
    states._send(saved(tmp_path / "far-12", 20), holding(1))
    before = files(saved(tmp_path / "near-12", 30))
    states.fetch(tmp_path / "near-12", print)
    assert files(tmp_path / "near-12") == before
    states.fetch(saved(tmp_path / "behind-12", 10), print)
    assert files(tmp_path / "behind-12") == files(tmp_path / "far-12")
    states.fetch(tmp_path / "new-12", print)
    assert files(tmp_path / "new-12") == files(tmp_path / "far-12")
    assert capsys.readouterr().out.count("what another machine saved is used") == 2
    assert progress(["stage.yaml"]) == -1
    assert progress(["checkpoints/count.json"]) == 0


def test_the_newest_state_alone_is_kept_there(tmp_path):
    place, entry = Folder(tmp_path / "shared"), saved(tmp_path / "far-12", 10)
    states = SavedStates(place, "12")
    states._send(entry, holding(1))
    first = place.names("checkpoints/12")
    saved(entry, 20)
    (entry / "LOCK").touch()
    (entry / "COMPLETE").touch()
    states._send(entry, holding(1))
    content = json.loads(place.read(f"checkpoints/12/1.{STATE}"))
    wanted = {"checkpoints/step-000000020/state.json", "metrics.jsonl", "stage.yaml"}
    assert set(content["files"]) == wanted
    assert len(place.names("checkpoints/12")) == len(first) == 4
    assert not list(tmp_path.rglob(".*state*"))
    states.clear()
    assert place.names("checkpoints/12") == []


def test_one_that_was_taken_over_while_it_slept_spoils_nothing(tmp_path):
    place = Folder(tmp_path / "shared")
    SavedStates(place, "12")._send(saved(tmp_path / "heir-12", 30), holding(2))
    SavedStates(place, "12")._send(saved(tmp_path / "asleep-12", 20), holding(1))
    SavedStates(place, "12").fetch(tmp_path / "third-12", print)
    assert files(tmp_path / "third-12") == files(tmp_path / "heir-12")


def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, capsys):
    place = Folder(tmp_path / "shared")
    SavedStates(place, "12")._send(saved(tmp_path / "first-12", 10), holding(1))
    older = {name: place.read(f"checkpoints/12/{name}") for name in place.names("checkpoints/12")}
    SavedStates(place, "12")._send(saved(tmp_path / "second-12", 20, "x"), holding(2))
    for name, content in older.items():
        place.write(f"checkpoints/12/{name}", content)
    (part,) = [
        name for name in place.names("checkpoints/12") if place.read(f"checkpoints/12/{name}") == b"20x"
    ]
    place.write(f"checkpoints/12/{part}", b"21x")
    SavedStates(place, "12").fetch(tmp_path / "third-12", print)
    assert f"checkpoints/12/{part} of third-12 is damaged; an earlier one is used" in capsys.readouterr().out
    assert files(tmp_path / "third-12") == files(tmp_path / "first-12")
    place.write(f"checkpoints/12/1.{STATE}", b"{}")
    place.write(f"checkpoints/12/2.{STATE}", b"[1")
    SavedStates(place, "12").fetch(tmp_path / "fourth-12", print)
    assert capsys.readouterr().out.count(f".{STATE} is damaged") == 2
    assert not (tmp_path / "fourth-12").exists()


def test_a_state_that_leads_out_of_its_folder_is_refused(tmp_path, capsys):
    from trivium.kit.fingerprint import seal_of

    content: dict[str, Any] = {"files": {"checkpoints/../../../out": ["", []]}}
    place = Folder(tmp_path / "shared")
    place.write(f"checkpoints/12/1.{STATE}", json.dumps({**content, "sealed": seal_of(content)}).encode())
    SavedStates(place, "12").fetch(tmp_path / "runs" / "store" / "third-12", print)
    assert "which is no file in its folder" in capsys.readouterr().out
    assert not list(tmp_path.rglob("out"))
