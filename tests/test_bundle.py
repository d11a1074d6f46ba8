"""A bundle holds all that makes a result again; what was changed in it, or comes out otherwise, is said."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow.parquet import read_table
from toys import own_kinds
from tuning import own, save, small_model, write_rows

from trivium.cli import main
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import read_json
from trivium.kit.seals import seal_folder, write_sealed
from trivium.pipeline.bundle import verify, write_bundle
from trivium.pipeline.run import run
from trivium.pipeline.store import find

RECIPE = """\
name: toy
seed: 7
stages:
  words: {kind: toys.py:ToyWords, data: ./texts}
  base:  {kind: toys.py:ToyTrain, words: words, steps: 4, keep: [2]}
  left:  {kind: toys.py:ToyTrain, from: base, steps: 2, seed: 3}
  right: {kind: toys.py:ToyTrain, from: base, steps: 2}
"""


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A recipe with a kind of its own and data of its own, run."""
    place = tmp_path / "lab"
    (place / "texts").mkdir(parents=True)
    (place / "texts" / "a.txt").write_text("some words\n")
    own_kinds(place)
    (place / "toy.yaml").write_text(RECIPE)
    run(place / "toy.yaml", place / "runs")
    return place


@pytest.mark.slow
def test_a_bundle_is_made_again_elsewhere_and_is_equal(lab, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    main(["export", "toy/left", "--runs", str(lab / "runs"), "--bundle", str(bundle)])
    assert "left, base, words" in capsys.readouterr().out
    shutil.move(lab, tmp_path / "gone")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(bundle, elsewhere)
    assert not (elsewhere / "runs").exists()
    done = subprocess.run(
        [sys.executable, "-m", "trivium.cli", "verify", str(elsewhere), "--runs", str(tmp_path / "fresh")],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "All 3 results are equal to those of the bundle, bit for bit." in done.stdout
    assert "Not made again" not in done.stdout
    assert (elsewhere / "records" / "left.yaml").is_file()


def test_a_curation_is_made_again_with_the_names_of_its_sources(tmp_path, capsys):
    place = tmp_path / "lab"
    (place / "texts").mkdir(parents=True)
    (place / "texts" / "a.txt").write_text("some words\n")
    (place / "more.jsonl").write_text('{"text": "other words"}\n')
    (place / "r.yaml").write_text(
        "name: r\nstages:\n  web:\n    kind: curate\n"
        "    data: [./texts, './more*.jsonl']\n    steps: [{deduplicate: exact}]\n"
    )
    run(place / "r.yaml", place / "runs")
    bundle = tmp_path / "bundle"
    main(["export", "r/web", "--runs", str(place / "runs"), "--bundle", str(bundle)])
    shutil.rmtree(place)
    main(["verify", str(bundle)])
    assert "All 1 results are equal" in capsys.readouterr().out
    rows = read_table(bundle / "runs" / "r" / "web" / "data").to_pylist()
    assert [row["source"] for row in rows] == ["./texts", "./more*.jsonl"]


@pytest.mark.slow
def test_what_verify_finds_made_already_is_not_called_made_again(lab, tmp_path, capsys):
    """A bundle that came with a `runs` folder would be equal to itself."""
    write_bundle(lab / "runs", "toy/left", tmp_path / "bundle")
    run(tmp_path / "bundle" / "recipe.yaml", tmp_path / "bundle" / "runs", only=["base"])
    main(["verify", str(tmp_path / "bundle")])
    said = capsys.readouterr().out
    assert "Not made again, but found there: base, words; name an empty --runs" in said


@pytest.mark.slow
def test_what_comes_out_otherwise_is_named_with_its_files(lab, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    write_bundle(lab / "runs", "toy/left", bundle)
    manifest = read_json(bundle / "bundle.json")
    del manifest["seal"]
    manifest["stages"]["base"] |= {"kernels": "another processor"}
    manifest["stages"]["base"]["files"]["model/model.json"] = "0" * 32
    write_sealed(bundle / "bundle.json", manifest)
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(bundle)])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert "base came out otherwise than in the bundle" in said.err
    assert "model/model.json (made with another processor, here with" in said.out


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("file", ["recipe.yaml", "texts/a.txt", "bundle.json", "kinds/toys.py"])
def test_a_bundle_that_was_changed_is_named(lab, tmp_path, file):
    bundle = tmp_path / "bundle"
    write_bundle(lab / "runs", "toy/left", bundle)
    path = bundle / file
    path.write_text(path.read_text().replace("s", "z", 1))
    with pytest.raises(DamagedError, match=path.name):
        verify(bundle, tmp_path / "fresh")
    path.unlink()
    with pytest.raises(TriviumError, match=f"{path.name} is missing"):
        verify(bundle, tmp_path / "fresh")


def test_what_cannot_be_bundled_says_why(lab, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(TriviumError, match="is there already"):
        write_bundle(lab / "runs", "toy/left", tmp_path / "there")
    shutil.rmtree(lab / "texts")
    with pytest.raises(TriviumError, match=r"texts \(\./texts\) is not there any more"):
        write_bundle(lab / "runs", "toy/left", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(TriviumError, match="No stage `zzz`"):
        write_bundle(lab / "runs", "zzz", tmp_path / "bundle")


def test_code_that_came_with_a_result_is_not_run(lab, tmp_path):
    """A shared store could bring a file and a record that names it as the code of the kind."""
    entry = find(lab / "runs", "toy/left")
    (entry.folder / "model" / "mine.py").write_text("raise SystemExit('run')\n")
    entry.note({**entry.record, "kind_from": f"{entry.folder}/model/mine.py:Mine"})
    files = [
        path for path in entry.folder.rglob("*") if path.is_file() and path.name not in ("COMPLETE", "LOCK")
    ]
    seal_folder(entry.folder, [path for path in files if not path.is_symlink()], [])
    with pytest.raises(TriviumError, match=r"names .*mine\.py as code, which lies in a result"):
        write_bundle(lab / "runs", "toy/left", tmp_path / "bundle")


@pytest.mark.parametrize("file", ["./scorers/mine.py", "../mine.py"])
def test_a_file_that_scores_lies_in_the_bundle_where_the_settings_name_it(tmp_path, file):
    lab = tmp_path / "lab"
    save(lab / "base", small_model(own()), own())
    write_rows(
        lab / "problems.jsonl", [{"prompt": "what?", "answer": "7", "completions": ["3 + 4 = 7", "7"]}]
    )
    (lab / "scorers").mkdir()
    (lab / file).write_text("def right(completions, **columns):\n    return [1.0] * len(completions)\n")
    (lab / "auto.yaml").write_text(
        "name: auto\nstages:\n  auto: {kind: label_steps, from: ./base, data: ./problems.jsonl, "
        f"labels: exact, max_new_tokens: 100, scorer: '{file}:right'}}\n"
    )
    run(lab / "auto.yaml", lab / "runs")
    if ".." in file:
        with pytest.raises(TriviumError, match="put it beside the recipe"):
            write_bundle(lab / "runs", "auto/auto", tmp_path / "bundle")
        return
    # Writing checks that the bundle's recipe has the fingerprints of what was made.
    assert write_bundle(lab / "runs", "auto/auto", tmp_path / "bundle") == ["auto"]
    assert (tmp_path / "bundle" / "scorers" / "mine.py").read_bytes() == (lab / file).read_bytes()


@pytest.mark.slow
def test_a_bundle_of_other_code_is_refused(lab, tmp_path):
    bundle = tmp_path / "bundle"
    write_bundle(lab / "runs", "toy/left", bundle)
    manifest = read_json(bundle / "bundle.json")
    del manifest["seal"]
    manifest["stages"]["left"]["fingerprint"] = "0" * 16
    write_sealed(bundle / "bundle.json", manifest)
    with pytest.raises(TriviumError, match="left would be another result here"):
        verify(bundle, tmp_path / "fresh")
