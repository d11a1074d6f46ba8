"""Experiments: arms and seeds become one graph, numbers get intervals over seeds, claims a verdict."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import toys

import trivium
from trivium.cli import main
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.lab.experiment_page import page, sentence
from trivium.lab.experiments import Number, judged, over_seeds, t_below, t_quantile, tables, taken, verdicts
from trivium.pipeline.run import prepare, run
from trivium.recipe import graph
from trivium.recipe.experiment import Experiment
from trivium.recipe.schema import load
from trivium.stages.parts.stage import Stage

RECIPE = """\
name: tiny
seed: 5
stages:
  words: {kind: toy_words, data: ./texts}
  base: {kind: toy_train, words: words, steps: 2}
  more: {kind: toy_train, from: base, steps: 3}
  pinned: {kind: toy_train, words: words, steps: 1, seed: 9}
experiment:
  question: Does more help?
  arms:
    plain: {}
    fast: {more: {rate: 0.5}}
    short: {base: {steps: 1}, more: {steps: 1}}
    alone: {pinned: null}
  measure:
    loss: {stage: more, take: loss}
    gained: {stage: more, take: loss, since: base}
  claims:
    - {says: more is better, on: loss, arm: plain, against: short, below: 0, control: fast}
    - {says: loss is low, on: loss, arm: plain, below: 0.5, control: short}
"""


def written(folder: Path, text: str = RECIPE) -> Path:
    return toys.write_recipe(folder, text)


def changed(folder: Path, before: str, after: str) -> Path:
    assert before in RECIPE
    return written(folder, RECIPE.replace(before, after))


def test_what_is_the_same_stands_in_the_graph_once(tmp_path):
    recipe = load(written(tmp_path))
    assert set(recipe.stages) == {
        "words", "pinned", *(f"base.{seed}" for seed in (5, 6, 7)), *(f"more.{seed}" for seed in (5, 6, 7)),
        *(f"more.fast.{seed}" for seed in (5, 6, 7)), *(f"base.short.{seed}" for seed in (5, 6, 7)),
        *(f"more.short.{seed}" for seed in (5, 6, 7)),
    }  # fmt: skip
    nodes = graph.build(recipe)
    assert nodes["more.fast.6"].parents["base"].stage == "base.6"
    assert nodes["more.short.6"].parents["base"].stage == "base.short.6"
    assert nodes["base.short.7"].parents["words"].stage == "words"
    assert len({node.fingerprint for node in nodes.values()}) == len(nodes)
    assert recipe.expanded.cells["alone", 6] == {"words": "words", "base": "base.6", "more": "more.6"}


def test_an_arm_may_use_the_earlier_name_of_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(Stage.kinds["toy_train"], "formerly", {"speed": "rate"})
    text = RECIPE.replace("steps: 3}", "steps: 3, rate: 0.25}").replace("{rate: 0.5}", "{speed: 0.5}")
    stages = load(written(tmp_path, text)).stages
    assert [stages[name].rate for name in ("more.5", "more.fast.5")] == [0.25, 0.5]


def test_a_stage_is_another_where_only_what_it_stands_on_is(tmp_path):
    recipe = load(written(tmp_path), {"experiment.arms.early": {"base": {"steps": 5}}})
    assert graph.build(recipe)["more.early.6"].parents["base"].stage == "base.early.6"
    assert "pinned.early" not in recipe.stages


def test_a_seed_changes_what_it_must_and_an_arm_is_the_recipe_it_looks_like(tmp_path):
    nodes = prepare(written(tmp_path), tmp_path / "runs").nodes
    plain = RECIPE[: RECIPE.index("experiment:")]
    for seed in (5, 6):
        text = plain.replace("seed: 5", f"seed: {seed}")
        alone = prepare(toys.write_recipe(tmp_path, text, "plain.yaml"), tmp_path / "runs").nodes
        for stage in ("base", "more"):
            assert nodes[f"{stage}.{seed}"].fingerprint == alone[stage].fingerprint
        assert nodes["words"].fingerprint == alone["words"].fingerprint
        assert nodes["pinned"].fingerprint == alone["pinned"].fingerprint
    fast = plain.replace("steps: 3}", "steps: 3, rate: 0.5}")
    alone = prepare(toys.write_recipe(tmp_path, fast, "fast.yaml"), tmp_path / "runs").nodes
    assert nodes["more.fast.5"].fingerprint == alone["more"].fingerprint


@pytest.mark.slow
def test_a_run_ends_in_tables_a_page_and_json(tmp_path, capsys):
    main(["run", str(written(tmp_path)), "--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    found = read_json(tmp_path / "runs" / "tiny" / "experiment.json")
    assert found["measures"]["loss"]["arms"]["fast"]["values"] == [1 / 3] * 3
    assert found["measures"]["gained"]["arms"]["short"]["values"] == [0.0] * 3
    # The toy's loss is the same whatever the seed, so nothing can be said of other seeds.
    assert [claim["verdict"] for claim in found["claims"]] == ["not shown", "not shown"]
    assert "open: nothing bounds it" in out
    assert (
        "Nothing bounds what chance does here" in (tmp_path / "runs" / "tiny" / "experiment.html").read_text()
    )
    assert "loss is low" in out
    html = (tmp_path / "runs" / "tiny" / "experiment.html").read_text()
    assert html == page(found)
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", html)
    again = run(tmp_path / "toy.yaml", tmp_path / "runs")
    assert set(again.became.values()) == {"reused"}
    assert again.concluded == found
    assert run(tmp_path / "toy.yaml", tmp_path / "runs", only=["base.6"]).concluded is None


@pytest.mark.parametrize("seeds", ["1000000000", "501", "1e30", str(10**40)])
def test_more_runs_than_anybody_can_mean_are_refused(seeds, tmp_path):
    """The graph was written down for every seed, and `plan` did not end."""
    with pytest.raises(TriviumError, match=r"toy\.yaml.*seeds|seeds.*toy\.yaml"):
        load(written(tmp_path), [f"experiment.seeds={seeds}"])


@pytest.mark.slow
def test_seeds_may_be_set_named_or_one(tmp_path):
    path = written(tmp_path)
    assert {seed for _, seed in load(path, ["experiment.seeds=[3, 8]"]).expanded.cells} == {3, 8}
    one = run(path, tmp_path / "runs", ["experiment.seeds=1"])
    assert "base" in one.nodes
    assert [claim["verdict"] for claim in one.concluded["claims"]] == ["control did not fail", "not shown"][
        1:
    ] * 2
    assert "One seed" in sentence(one.concluded["claims"][1], 1)


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("on: loss, arm: plain, against", "on: lass, arm: plain, against", "no measure is called `lass`"),
        ("arm: plain, below", "arm: plane, below", "no arm is called `plane`"),
        ("below: 0.5, ", "", "needs one of `above` and `below`"),
        ("control: short}", "control: plain}", "its own `against` or `control`"),
        ("fast: {more: {rate: 0.5}}", "fast: {more: {rat: 0.5}}", "In the arm `fast`, toy.*not a setting"),
        ("stage: more, take: loss}", "stage: pinned, take: loss}", None),
        ("short: {base: {steps: 1}, more: {steps: 1}}", "short: {more: null}", "`short` has no stage `more`"),
        ("experiment:\n", "report: {compare: [base]}\nexperiment:\n", "leave `report` or `experiment` out"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, before, after, told):
    path = changed(tmp_path, before, after)
    if told is None:
        load(path)
        return
    with pytest.raises(TriviumError, match=told):
        load(path)


@pytest.mark.slow
def test_an_unknown_number_is_answered_with_the_nearest(tmp_path):
    with pytest.raises(TriviumError, match="has no number `los`; did you mean `loss`"):
        run(changed(tmp_path, "take: loss}", "take: los}"), tmp_path / "runs")


def test_numbers_of_a_report_carry_the_error_of_its_questions(tmp_path):
    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.196, "high": value + 0.196, "n": 100}

    task = {
        "measures": {"accuracy": interval(0.5)},
        "groups": {"length": {"512": {"accuracy": interval(0.25)}}},
    }
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(json.dumps({"tasks": {"keys": task}}))
    assert taken(tmp_path, "keys: accuracy").error == pytest.approx(0.1, rel=1e-3)
    assert taken(tmp_path, "keys: accuracy, length=512").value == 0.25


def test_a_number_with_an_interval_in_a_summary_is_a_measure(tmp_path):
    agreement = {"value": 0.94, "low": 0.92, "high": 0.96, "n": 902}
    (tmp_path / "stage.yaml").write_text(json.dumps({"summary": {"agreement": agreement, "steps": 902}}))
    found = taken(tmp_path, "agreement")
    assert (found.value, found.error) == (0.94, pytest.approx(0.02 / 1.96, rel=1e-3))


def test_students_t():
    # Table 26.10 of Abramowitz and Stegun.
    for degrees, value in ((1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert t_quantile(0.975, degrees) == pytest.approx(value, abs=6e-4)
        assert t_below(value, degrees) == pytest.approx(0.975, abs=2e-5)


def test_intervals_over_three_seeds_cover_what_they_promise():
    generator = np.random.default_rng(1)
    estimates = [over_seeds([Number(one) for one in row]) for row in generator.normal(size=(4000, 3))]
    covered = np.mean([not one.interval.excludes(0.0) for one in estimates])
    assert 0.935 <= covered <= 0.965
    assert np.mean([one.p_value < 0.05 for one in estimates]) == pytest.approx(1 - covered, abs=1e-9)


def test_intervals_are_never_narrower_than_the_questions_allow():
    estimate = over_seeds([Number(one, 0.1) for one in (0.499, 0.5, 0.501)])
    assert estimate.interval.high - 0.5 == pytest.approx(1.96 * 0.1 / math.sqrt(3), rel=1e-3)
    assert over_seeds([Number(0.5)]).interval.low == -math.inf


def test_seeds_that_all_say_the_same_show_nothing_but_what_their_questions_do():
    alike = over_seeds([Number(0.1 + 0.2)] * 3)
    assert (alike.p_value, alike.interval.low, alike.interval.high) == (1.0, -math.inf, math.inf)
    asked = over_seeds([Number(0.5, 0.1)] * 3)
    # Table 26.10 of Abramowitz and Stegun: 4.303 for two degrees of freedom.
    assert asked.interval.high - 0.5 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    assert over_seeds([Number(1.0, 0.004)] * 3).p_value < 0.001


def test_a_number_whose_interval_is_open_shows_nothing(tmp_path):
    """Two models far apart, of which one gave all its answers the same length."""
    open_ends = {"value": 9.0, "low": None, "high": None, "n": 40}
    task = {"measures": {"tokens": open_ends}, "groups": {}}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "results.json").write_text(json.dumps({"tasks": {"sums": task}}))
    (tmp_path / "stage.yaml").write_text("{produces: report, seconds: 1.0}")
    number = taken(tmp_path, "sums: tokens")
    assert over_seeds([number, Number(9.1, 0.1), Number(9.2, 0.1)]).p_value == 1.0
    found = judged(
        experiment("sums: tokens"), {(arm, 0): {"asked": tmp_path} for arm in ("with", "without", "other")}
    )
    json.dumps(found, allow_nan=False)


def experiment(take: str = "x", **claim: object) -> Experiment:
    claims = [{"says": "a", "on": "m", "arm": "with", "against": "without", "control": "other"} | claim]
    measure = {"m": {"stage": "asked", "take": take}}
    arms: dict[str, dict] = {"with": {}, "without": {}, "other": {}}
    return Experiment.model_validate({"arms": arms, "measure": measure, "claims": claims})


def found_of(tmp_path: Path, values: dict[str, list[float]], **claim: object) -> dict:
    folders = {}
    for arm, row in values.items():
        for seed, value in enumerate(row):
            folder = tmp_path / f"{arm}-{seed}"
            folder.mkdir(exist_ok=True)
            (folder / "stage.yaml").write_text(f"{{produces: report, seconds: 1.0, summary: {{x: {value}}}}}")
            folders[arm, seed] = {"asked": folder}
    return judged(experiment(**claim), folders)


NEAR = [0.50, 0.52, 0.51]
FAR = [0.80, 0.83, 0.81]


@pytest.mark.parametrize(
    ("arm", "without", "other", "claim", "verdict"),
    [
        (FAR, NEAR, NEAR[::-1], {}, "supported"),
        (FAR, NEAR, [0.81, 0.82, 0.80], {}, "control did not fail"),
        ([0.4, 0.9, 0.7], NEAR, NEAR[::-1], {}, "not shown"),
        (FAR, NEAR, NEAR[::-1], {"below": 0}, "not shown"),
        (NEAR, FAR, FAR[::-1], {"below": 0}, "supported"),
        (FAR, NEAR, NEAR[::-1], {"above": 0.4}, "not shown"),
        # The effect is there, but it is not told apart from a control that is all over the place.
        (FAR, NEAR, [0.3, 1.1, 0.7], {}, "not shown"),
        (FAR, NEAR, NEAR, {"control": "without"}, "supported"),
        (FAR, NEAR, NEAR, {"against": None, "above": 0.7}, "supported"),
        (FAR, NEAR, FAR, {"against": None, "above": 0.7}, "control did not fail"),
        ([0.8] * 3, [0.5] * 3, [0.5] * 3, {}, "not shown"),
        ([0.8] * 3, NEAR, [0.5] * 3, {"against": None, "above": 0.7}, "not shown"),
    ],
)
def test_verdicts(tmp_path, arm, without, other, claim, verdict):
    found = found_of(tmp_path, {"with": arm, "without": without, "other": other}, **claim)
    assert found["claims"][0]["verdict"] == verdict
    assert tables(found)[1][1][1] == verdict
    assert sentence(found["claims"][0], 3)


def test_arms_without_a_difference_are_seldom_told_apart():
    generator = np.random.default_rng(2)
    claims = experiment().claims
    false = 0
    for _ in range(1000):
        # What a seed does to all arms cancels, as they are compared seed by seed.
        rows = generator.normal(0.5, 0.02, size=(3, 3)) + generator.normal(0, 0.1, size=(1, 3))
        arms = dict(zip(("with", "without", "other"), ([Number(one) for one in row] for row in rows)))
        false += verdicts(claims, {"m": arms})[0]["verdict"] == "supported"
    assert false <= 40


LIBRARY = Path(trivium.__file__).parent / "recipe" / "library" / "experiments"
SHIPPED = sorted(
    path.stem for path in LIBRARY.glob("*.yaml") if "\nexperiment:" in path.read_text(encoding="utf-8")
)


def test_the_documentation_names_every_recipe_of_the_folder():
    text = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    section = text.split("## What ships")[1].split("\n# ")[0]
    named = re.findall(r"`([a-z_]+)`", section)
    assert sorted(named) == sorted(path.stem for path in LIBRARY.glob("*.yaml"))
    assert set(re.findall(r"^\| `([a-z_]+)`", section, re.M)) == set(SHIPPED)


@pytest.mark.quick_cases(9)
@pytest.mark.parametrize("name", SHIPPED)
def test_every_experiment_that_ships_asks_a_question_of_three_seeds_or_more(name):
    recipe = load(f"experiments/{name}")
    assert recipe.experiment is not None
    assert len(recipe.experiment.numbers(recipe.seed)) >= 3
    assert recipe.experiment.question.endswith("?")
    assert graph.build(recipe)
