"""The kinds of stages that docs/extending.md shows: planned, trained, killed, resumed, shown, reported."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from forked import forked

import trivium
from trivium.kit.files import load_tensors
from trivium.kit.metrics import read_metrics
from trivium.kit.numbers import short
from trivium.pipeline import plan, show, status
from trivium.recipe.schema import json_schema, load

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(\"\"\".*?)```", PAGE.read_text(), re.DOTALL)
RECIPE = """\
name: own
stages:
  mixed: {kind: shuffle.py:Shuffle, data: ./texts.jsonl}
  words: {kind: tokenizer, data: mixed, vocabulary: 272}
  corpus: {kind: corpus, data: mixed, tokenizer: words, validation: 0.2}
  base: {kind: pretrain, data: corpus, model: {depth: 1, width: 32, head_width: 16, heads: 2},
         context: 64, batch: 128, steps: 4}
  sharp: {kind: mine.py:Focal, from: base, data: corpus, steps: 60, batch: 128, gamma: 1,
          checkpoint: {every_steps: 3, at: [30]}}
  next: {kind: midtrain, from: sharp@step=30, data: mixed, replay: 0.5, steps: 2, batch: 128}
report: {compare: [base, sharp], on: [bits], asking: {limit: 5}}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows = [
        f'{{"text": "{one} and {other} make {one + other}."}}\n' for one in range(9) for other in range(9)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(rows))
    (tmp_path / "mine.py").write_text(BLOCKS[0])
    (tmp_path / "shuffle.py").write_text(BLOCKS[1])
    (tmp_path / "own.yaml").write_text(RECIPE)
    return tmp_path / "own.yaml"


def test_each_example_is_one_short_file():
    assert [len(block.splitlines()) <= 80 for block in BLOCKS] == [True, True]


def test_a_kind_of_ones_own_is_planned_trained_shown_and_reported(recipe: Path):
    runs = recipe.parent / "runs"
    rows = {row[0]: row for row in plan.plan(recipe, runs)}
    assert rows["sharp"][1:3] == ["focal", "run"]
    assert "tokens 7,680" in rows["sharp"][4]
    load(recipe)
    properties = json_schema()["$defs"]["Focal"]["properties"]
    assert (
        properties["gamma"]["description"]
        == "How much less a well predicted token counts; 0 is the usual loss."
    )
    made = trivium.run(recipe, runs=runs)
    steps = [row for row in made["sharp"].metrics if "step" in row]
    assert len(steps) == 60
    assert all(row["loss"] < row["cross_entropy"] for row in steps), "a well predicted token counts less"
    assert any("validation_loss" in row for row in steps)
    assert made["next"].summary["data"].keys() == {"mixed", "corpus"}, "what was learned can be replayed"
    listed = {row[0].strip("│├└ "): row[1] for row in status.rows(runs, "own")}
    assert listed["sharp"] == "done"
    assert show.documents(show.find(runs, "own/sharp"), 1)
    assert "sharp" in (runs / "own" / "report.html").read_text()


@pytest.mark.slow
def test_a_kind_of_ones_own_resumes_bit_for_bit_after_kill_9(recipe: Path):
    def started(runs: str) -> subprocess.Popen[str]:
        words = ("run", recipe, "--only", "sharp", "--runs", runs)
        return forked(*words, cwd=recipe.parent, stderr=subprocess.DEVNULL)

    assert started("whole").wait(timeout=120) == 0
    process = started("cut")
    while not list(recipe.parent.glob("cut/store/sharp-*/checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -9
    assert not list(recipe.parent.glob("cut/store/sharp-*/COMPLETE"))
    assert started("cut").wait(timeout=120) == 0
    one, other = (recipe.parent / runs / "own" / "sharp" for runs in ("whole", "cut"))
    for file in ("model/model.safetensors", "moments.safetensors"):
        first, second = load_tensors(one / file), load_tensors(other / file)
        assert all(first[name].equal(second[name]) for name in first)
    losses = [
        [row["loss"] for row in read_metrics(at / "metrics.jsonl") if "step" in row] for at in (one, other)
    ]
    assert losses[0] == losses[1]


def test_a_length_that_a_kind_of_ones_own_does_not_plan_is_an_unknown_cost(recipe: Path):
    recipe.write_text(re.sub(r"steps: 60, batch: 128", "epochs: 2", recipe.read_text()))
    rows = {row[0]: row for row in plan.plan(recipe, recipe.parent / "runs")}
    assert rows["sharp"][3] == "unknown"
    assert rows["all"][3].endswith("and what is unknown")


def test_the_steps_of_a_kind_of_ones_own_are_planned_with_the_batch_that_suits_the_model(recipe: Path):
    runs = recipe.parent / "runs"
    trivium.run(recipe, runs=runs, only=["base"])
    recipe.write_text(re.sub(r"steps: 60, batch: 128", "steps: 60", recipe.read_text()))
    [planned] = [row for row in plan.plan(recipe, runs) if row[0] == "sharp"]
    assert f"tokens {short(60 * 2048)}" in planned[4]
    assert planned[3].startswith("about")
