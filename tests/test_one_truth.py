"""Compare, eval and distance ask models as their report does, or say how they ask differently."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import trivium
from trivium.cli import main
from trivium.kit.files import read_json
from trivium.lab.asked import Asked, asked_of, written
from trivium.lab.gather_answers import default_tasks, fitting

RECIPE = """\
name: truth
stages:
  words: {kind: tokenizer, vocabulary: 300, data: {path: world:facts, limit: 100}}
  base:
    kind: pretrain
    data: {world:facts: {limit: 100}}
    tokenizer: words
    model: {depth: 1, width: 32}
    context: 128
    batch: 512
    steps: 2
  mid:
    kind: midtrain
    from: base
    data: {world:craft: {limit: 60}}
    vocabulary: {data: {path: world:craft, limit: 60}, added: 16}
    batch: 512
    steps: 2
report: {on: [{task: facts, people: 30, style: continue}], asking: {limit: 4}}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("truth")
    (folder / "truth.yaml").write_text(RECIPE)
    trivium.run(folder / "truth.yaml", runs=folder / "runs")
    return folder / "runs"


def numbers(runs: Path, page: str) -> dict:
    skills = read_json(runs / page)["numbers"]["skills"]
    return {(row["task"], row["metric"]): {name: cell["value"] for name, cell in row["cells"].items() if cell}
            for row in skills}  # fmt: skip


@pytest.mark.slow
def test_compare_gives_the_reports_numbers(runs, capsys):
    main(["compare", "base", "mid", "--runs", str(runs)])
    assert "asked as the report of truth asks" in capsys.readouterr().err
    assert numbers(runs, "compare.json") == numbers(runs, "truth/report.json")


def test_eval_gives_the_reports_numbers_or_says_how_it_asks_differently(runs, capsys, tmp_path):
    main(["eval", "truth/mid", "--tasks", "facts", "--runs", str(runs), "--json", str(tmp_path / "e.json")])
    error = capsys.readouterr().err
    assert error.splitlines()[0] == "asked as the report of truth: facts?people=30&style=continue"
    reported = numbers(runs, "truth/report.json")
    [task] = read_json(tmp_path / "e.json")["tasks"].values()
    for (_, metric), cells in reported.items():
        assert task["measures"][metric]["value"] == pytest.approx(cells["mid"]), metric
    main(["eval", "truth/mid", "--tasks", "facts?people=25", "--runs", str(runs), "--limit", "2"])
    assert "the report asks differently: facts?people=30&style=continue" in capsys.readouterr().err


def test_models_with_other_tokens_are_compared_on_bytes(runs, capsys):
    main(["distance", "base", "mid", "--runs", str(runs), "--count", "3"])
    printed = capsys.readouterr().out
    found = re.findall(r"mid from base +\w+ \(per byte\) +(-?[\d.e-]+)", printed)
    assert found, printed
    assert "not measured" not in printed


def test_an_option_of_one_source_is_not_given_to_another():
    sources = {"facts": {"people": "40"}, "craft": {}, "taste": {"people": "40"}}
    tasks = {one["task"]: one for one in default_tasks(sources, [128])}
    assert tasks["facts"]["people"] == "40"
    assert "people" not in tasks["craft"]
    assert fitting("craft", {"people": 3}) == {}


def test_a_task_with_options_stays_as_it_is_written(tmp_path):
    spec = {"task": "sums", "steps_low": 2}
    asked = Asked("r", ["instructions", spec], None)
    assert asked.as_the_report_asks("sums") == spec
    assert asked.as_the_report_asks("math") == spec
    assert asked.as_the_report_asks("sums?samples=2") == "sums?samples=2"
    assert asked.otherwise("sums?samples=2") == spec
    assert asked.otherwise("sums") is None
    assert written({"task": "sums", "chain_of_thought": False}) == "sums?chain_of_thought=false"
    assert asked_of([], tmp_path) is None
