"""Damaged files are named and never used: saved states, finished stages, records, what is inherited."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
import torch
from small import assert_identical, small_model, small_trainer, weights_of
from toys import RECIPE, write_recipe

import trivium
from tests.test_pretrain import RECIPE as TRAINED
from tests.test_pretrain import write as write_trained
from trivium.kit import files, seals
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import read_json, save_tensors, write_json
from trivium.kit.seals import read_seal
from trivium.pipeline import show
from trivium.pipeline.run import run
from trivium.pipeline.store import Entry, Store

CHILD = """\
  child:
    kind: midtrain
    from: base
    data: corpus
    batch: 256
    steps: 2
    learning_rate: 0.001
    optimiser_state: keep
"""


def flip(path: Path, place: int, bit: int = 0) -> None:
    """Turn over one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """The same recipe run in two places."""
    runs = []
    for number in range(2):
        folder = tmp_path_factory.mktemp(f"trained{number}")
        runs.append(trivium.run(write_trained(folder, TRAINED), runs=folder / "runs"))
    return runs


def test_a_state_with_a_changed_number_is_named_and_the_one_before_is_used(tmp_path: Path, capsys) -> None:
    straight = small_model()
    small_trainer(tmp_path / "straight", model=straight).run()
    trainer = small_trainer(tmp_path / "cut", checkpoint={"every_steps": 3})
    trainer.run()
    newest = trainer.checkpoints.path(6) / "state.json"
    content = json.loads(newest.read_text())
    assert content["step"] == 6
    newest.write_text(json.dumps({**content, "step": 2}))
    again = small_model(seed=9)
    small_trainer(tmp_path / "cut", model=again).run()
    said = capsys.readouterr().err
    assert f"{newest} is damaged" in said
    assert "Going on after step 3" in said
    assert_identical(weights_of(straight), weights_of(again))


def test_a_state_under_the_name_of_another_step_is_not_used(tmp_path: Path, capsys) -> None:
    trainer = small_trainer(tmp_path, checkpoint={"every_steps": 3})
    trainer.run()
    os.rename(trainer.checkpoints.path(6), trainer.checkpoints.path(7))
    small_trainer(tmp_path).run()
    assert "step-000000007 holds the state after step 6" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["state.json", "tensors.safetensors"])
def test_wherever_a_bit_of_a_state_flips_the_one_before_is_used(tmp_path: Path, name: str) -> None:
    straight = small_model()
    small_trainer(tmp_path / "straight", model=straight).run()
    chance = random.Random(name)
    folder = tmp_path / "cut"
    trainer = small_trainer(folder, checkpoint={"every_steps": 3})
    trainer.run()
    path = trainer.checkpoints.path(6) / name
    whole = {one: one.read_bytes() for one in path.parent.iterdir()}
    for _ in range(12):
        path.parent.mkdir(exist_ok=True)
        for one, content in whole.items():
            one.write_bytes(content)
        flip(path, chance.randrange(len(whole[path])), chance.randrange(8))
        state = small_trainer(folder).checkpoints.latest()
        assert state is not None
        assert state.facts["step"] == 3
    again = small_model(seed=9)
    small_trainer(folder, model=again).run()
    assert_identical(weights_of(straight), weights_of(again))


def test_states_stay_until_the_stage_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """A disk that fills up while the last file is written costs no training."""

    def full(*_: object) -> None:
        raise TriviumError("The disk is full")

    recipe, runs = write_trained(tmp_path, TRAINED), tmp_path / "runs"
    trivium.run(recipe, runs=runs, only=["corpus"])
    with monkeypatch.context() as patch:
        patch.setattr(Entry, "complete", full)
        with pytest.raises(TriviumError, match="The disk is full"):
            trivium.run(recipe, runs=runs, only=["base"])
    (base,) = (runs / "store").glob("base-*")
    assert [path.name for path in (base / "checkpoints").iterdir()]
    prepared = trivium.run(recipe, runs=runs, only=["base"])
    assert prepared.became["base"] == "resumed"
    assert not (base / "checkpoints").exists()
    assert "Going on after step 10 of 12" in capsys.readouterr().err


def test_equal_runs_give_equal_bytes(trained) -> None:
    one, other = (run["base"].folder for run in trained)
    left, right = read_seal(one), read_seal(other)
    assert left["result"] == right["result"]
    covered = set(left["files"])
    assert {"stage.yaml", "metrics.jsonl", "moments.safetensors", "training.json"} <= covered
    assert any(name.startswith("kept/step-000000004/") for name in covered)
    for name in covered - {"stage.yaml", "metrics.jsonl"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    everything = {
        path.relative_to(one).as_posix()
        for path in one.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    assert everything - covered == {"COMPLETE"}


def test_a_safetensors_file_has_the_same_bytes_and_the_mode_of_any_new_file(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16)}
    facts = dict.fromkeys("qwertyuiop", "x")
    contents = set()
    before = os.umask(0o027)
    try:
        for number in range(8):
            path = tmp_path / f"{number}.safetensors"
            save_tensors(path, tensors, facts)
            contents.add(path.read_bytes())
            assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    assert len(contents) == 1


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("name", ["moments.safetensors", "training.json", "stage.yaml", "COMPLETE"])
def test_what_is_damaged_and_inherited_is_named(tmp_path: Path, name: str) -> None:
    runs = tmp_path / "runs"
    recipe = write_trained(tmp_path, TRAINED + CHILD)
    trivium.run(recipe, runs=runs, only=["base"])
    path = next((runs / "store").glob("base-*")) / name
    if name == "moments.safetensors":
        flip(path, path.stat().st_size - 1)
    elif name == "training.json":
        content = read_json(path)
        content["peak_learning_rates"]["matrices"] *= 2
        write_json(path, content)
    else:
        place = path.read_bytes().index(b"base" if name == "stage.yaml" else b"model/")
        flip(path, place, 1)
    seals._checked.clear()
    with pytest.raises(DamagedError) as caught:
        trivium.run(recipe, runs=runs)
    assert f"{path.parent.name}/{name} is damaged" in str(caught.value)
    assert "run again" in str(caught.value)


def test_a_kept_model_that_is_damaged_is_named(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, RECIPE.replace("from: base, steps: 2}", "from: base@tokens=2k, steps: 1}"))
    prepared = run(path, tmp_path / "runs", ["base.keep=[2]"], only=["base"])
    damaged = prepared.entry("base").folder / "kept" / "step-2" / "model" / "model.json"
    damaged.write_text(damaged.read_text().replace("2", "3"))
    with pytest.raises(DamagedError, match=r"kept/step-2/model/model\.json is damaged"):
        run(path, tmp_path / "runs", ["base.keep=[2]"])


def test_a_result_that_is_reused_is_looked_at(tmp_path: Path) -> None:
    """Without anything that inherits from it: its records, and the size of all it holds."""
    path = write_recipe(tmp_path)
    prepared = run(path, tmp_path / "runs", only=["base"])
    entry = prepared.entry("base")
    log = entry.folder / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole.replace("0.25", "0.20"))
    with pytest.raises(DamagedError, match=r"metrics\.jsonl is damaged: its checksum differs"):
        run(path, tmp_path / "runs", only=["base"])
    log.write_text(whole)
    cut = entry.folder / "model" / "model.json"
    cut.write_text(cut.read_text()[:-4])
    with pytest.raises(DamagedError, match=r"model\.json is damaged: it has \d+ bytes instead of"):
        run(path, tmp_path / "runs", only=["base"])


def test_what_an_older_version_sealed_is_still_used(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    prepared = run(path, tmp_path / "runs", only=["base"])
    complete = prepared.entry("base").folder / "COMPLETE"
    sums = {name: one for name, one in read_json(complete)["files"].items() if name.startswith("model/")}
    write_json(complete, {"files": sums})
    assert run(path, tmp_path / "runs").became["left"] == "ran"
    seals._checked.clear()
    damaged = complete.parent / "model" / "model.json"
    damaged.write_text(damaged.read_text().replace("7", "8"))
    with pytest.raises(DamagedError, match=r"model\.json is damaged"):
        run(path, tmp_path / "runs", ["right.steps=1"])


def test_looking_at_a_finished_stage_changes_nothing_of_it(trained) -> None:
    folder = trained[0]["base"].folder
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    entry = Entry(folder)
    show.text(entry)
    show.documents(entry, 3)
    trained[0]["base"].model()
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    entry.verify(entry.output)


def test_a_large_file_is_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = run(write_recipe(tmp_path), tmp_path / "runs", only=["base"])
    entry, hashed = prepared.entry("base"), []
    monkeypatch.setattr(seals, "checksum", lambda path: hashed.append(path) or files.checksum(path))
    seals._checked.clear()
    for _ in range(3):
        entry.verify(entry.output)
    assert len(hashed) == len(set(hashed)) > 0


def test_a_record_of_a_stage_at_work_that_is_damaged_costs_only_the_time_it_took(
    tmp_path: Path, capsys
) -> None:
    path = write_recipe(tmp_path)
    prepared = run(path, tmp_path / "runs", only=["base"])
    entry = prepared.entry("base")
    (entry.folder / "COMPLETE").unlink()
    (entry.folder / "stage.yaml").write_text("")
    assert run(path, tmp_path / "runs", only=["base"]).became["base"] == "resumed"
    assert "stage.yaml is damaged" in capsys.readouterr().err
    assert entry.record["summary"]["tokens"] == 4000


def test_gc_stops_at_a_record_that_is_damaged(tmp_path: Path) -> None:
    """What a stage needs is not removed because its record cannot be read."""
    path = write_recipe(tmp_path)
    prepared = run(path, tmp_path / "runs")
    (tmp_path / "runs" / "toy" / "base").unlink()
    record = prepared.entry("left").folder / "stage.yaml"
    record.write_text(record.read_text().replace("parents:", "parent_:"))
    seals._checked.clear()
    with pytest.raises(DamagedError, match=r"left-.*stage\.yaml is damaged"):
        Store(tmp_path / "runs").unreached()


def test_a_folder_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is cut off, there is a folder of that name, with the old content or the new."""
    place = tmp_path / "model"
    with files.whole_folder(place) as beside:
        (beside / "old").write_text("")
    seen = []
    real = {name: getattr(os, name) for name in ("rename", "fsync")}
    for name, call in real.items():
        monkeypatch.setattr(os, name, lambda *a, call=call: (call(*a), seen.append(place.is_dir()))[0])
    with files.whole_folder(place) as beside:
        (beside / "new").write_text("")
    assert len(seen) > 2
    assert all(seen)
    assert [path.name for path in place.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
