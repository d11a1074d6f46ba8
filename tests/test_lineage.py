"""`why` tells the whole line of a result; `ls` and the index page what everything cost and descends from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from toys import ToyTrain, write_recipe

import trivium
from trivium.cli import main
from trivium.kit import code
from trivium.kit.files import read_json, write_json
from trivium.pipeline import listing
from trivium.pipeline.index import write_index
from trivium.pipeline.lineage import line, text
from trivium.pipeline.listing import results, table
from trivium.pipeline.run import run
from trivium.pipeline.store import Store
from trivium.pipeline.why import accept


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(list(words))
    return capsys.readouterr().out


@pytest.mark.slow
def test_why_tells_data_code_machine_and_every_ancestor(tmp_path, capsys):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    prepared = run(path, runs)
    found = json.loads(told(capsys, "why", "toy/left", "--runs", str(runs), "--json"))
    assert found["entry"] == prepared.entry("left").folder.name
    assert found["parents"] == {"base": prepared.entry("base").folder.name}
    assert [one["stage"] for one in found["ancestors"]] == ["base", "words"]
    assert found["versions"]["trivium"]
    assert found["machine"]["kernels"]
    assert found["changed"] == []
    assert found["result"] == read_json(prepared.entry("left").folder / "COMPLETE")["result"]
    (data,) = found["ancestors"][1]["data"]
    assert data["written"] == "./texts"
    assert data["state"] == "unchanged"
    assert [file["path"].rpartition("/")[2] for file in data["files"]] == ["a.txt"]
    (tmp_path / "texts" / "a.txt").write_text("other words\n")
    assert line(runs, "left")["ancestors"][1]["data"][0]["state"] == "changed since"
    assert "data      ./texts" in text(line(runs, "left"))
    assert "(changed since)" in text(line(runs, "left"))


@pytest.mark.slow
def test_why_tells_who_reuses_a_result_since_when_and_what_was_accepted(tmp_path, monkeypatch):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    run(path, runs)
    run(path, runs, ["name=other", "left.steps=3"])
    base = line(runs, "toy/left")["ancestors"][0]
    ((use,),) = [base["reused_by"]]
    assert (use["recipe"], use["stage"]) == ("other", "base")
    run(path, runs, ["name=other", "left.steps=3"])
    assert line(runs, "toy/left")["ancestors"][0]["reused_by"] == [use]
    monkeypatch.setattr(ToyTrain, "version", 2)
    accept(path, "base", "only a comment", runs)
    ((said,),) = [line(runs, "toy/left")["ancestors"][0]["accepted"]]
    assert said["because"] == "only a comment"
    assert "only a comment" in text(line(runs, "toy/left"))


@pytest.mark.slow
def test_a_result_whose_code_has_changed_says_so(tmp_path, monkeypatch):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    run(path, runs)
    assert not any(one["code_changed"] for one in results(runs))
    now = {**listing.package_code(), "learn": "another"}
    monkeypatch.setattr("trivium.pipeline.listing.package_code", lambda: now)
    monkeypatch.setattr("trivium.pipeline.lineage.package_code", lambda: now)
    assert all(one["code_changed"] for one in results(runs))
    assert line(runs, "toy/left")["changed"] == ["trivium.learn"]
    assert "changed since: trivium.learn" in text(line(runs, "toy/left"))
    page = write_index(runs).read_text()
    assert "code changed since" in page


def test_every_package_that_can_change_a_result_counts_as_its_code():
    around = {"cli", "pipeline", "serve", "lab"}
    packages = {path.parent.name for path in Path(trivium.__file__).parent.glob("*/__init__.py")}
    assert set(listing.package_code()) == packages - around


def test_words_and_templates_beside_the_code_count_as_code(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "a.py").write_text("a = 1")
    before = code._checksum(tmp_path)
    (tmp_path / "library" / "recipe.yaml").write_text("name: x")
    assert code._checksum(tmp_path) == before
    (tmp_path / "queries.yaml").write_text("[1]")
    assert code._checksum(tmp_path) != before


def test_ls_tells_cost_money_and_the_base_of_every_model(tmp_path, capsys):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    prepared = run(path, runs)
    entry = prepared.entry("base")
    rows = {row["stage"]: row for row in results(runs, price=3600.0)}
    assert rows["left"]["bases"] == rows["right"]["bases"] == [entry.folder.name]
    assert rows["base"]["bases"] == []
    assert rows["base"]["cost"] == pytest.approx(entry.record["seconds"], abs=1e-3)
    assert results(runs)[0]["cost"] is None
    shown = table(results(runs, price=3600.0), cost=True)
    assert shown[0][-1] == "money"
    assert shown[-1][0] == "toy: all"
    assert "money" in told(capsys, "ls", "--cost", "--price", "2", "--runs", str(runs))
    assert "money" not in write_index(runs).read_text()
    assert "money" in write_index(runs, price=2.0).read_text()
    assert len(json.loads(told(capsys, "ls", "--json", "--runs", str(runs)))) == 4


@pytest.mark.slow
def test_the_index_of_finished_results_is_kept_and_a_damaged_one_made_again(tmp_path, monkeypatch):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    run(path, runs)
    first = results(runs)
    read = []
    facts = listing._facts
    monkeypatch.setattr(listing, "_facts", lambda entry: read.append(entry) or facts(entry))
    assert results(runs) == first
    assert read == []
    index = runs / "store" / listing.INDEX
    index.write_text(index.read_text().replace("toy", "joy"))
    assert results(runs) == first
    assert len(read) == 4
    # What is not finished is looked at every time; what is gone is left out.
    store = Store(runs)
    (store.recipes()["toy"]["right"].folder / "COMPLETE").unlink()
    assert {one["stage"]: one["state"] for one in results(runs)}["right"] == "cut off"
    store.remove(store.recipes()["toy"]["right"])
    assert {one["stage"] for one in results(runs)} == {"words", "base", "left"}


@pytest.mark.slow
def test_the_page_lists_recipes_verdicts_cost_and_descent(tmp_path, capsys):
    path, runs = write_recipe(tmp_path), tmp_path / "runs"
    run(path, runs)
    claims = [{"says": "Left is <better>", "verdict": "supported"}, {"says": "No", "verdict": "not shown"}]
    write_json(runs / "toy" / "experiment.json", {"claims": claims})
    assert "Wrote" in told(capsys, "ls", "--html", str(tmp_path / "page.html"), "--runs", str(runs))
    page = (tmp_path / "page.html").read_text()
    assert "Left is &lt;better&gt;" in page
    assert "<strong>Supported.</strong>" in page
    assert 'href="runs/toy/report.html"' in page
    assert re.search(r">left</th>.*?<td>base</td></tr>", page, re.S)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
