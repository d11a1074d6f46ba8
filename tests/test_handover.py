"""What a stage takes over from its parent: rates, moments, and what is said about both."""

from __future__ import annotations

import pytest

import trivium
from tests.test_midtrain import RECIPE, changes, recipe
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json

BASE = RECIPE[: RECIPE.index("  fork:")]
MORE = """\
  tongue:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.2}}
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 3
    learning_rate: 0.002
    optimiser_state: keep
  other-hand:
    kind: midtrain
    from: base@step=4
    data: corpus
    batch: 256
    steps: 3
    optimiser: adamw
    learning_rate: 0.001
    optimiser_state: keep
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handover")
    path = recipe(folder, BASE + MORE)
    return path, folder / "runs", trivium.run(path, runs=folder / "runs")


def test_the_log_says_that_new_rows_have_no_moments_yet(made):
    _, _, run = made
    before, after = changes(run["tongue"])["optimiser moments"]
    total = len(
        [name for name in load_tensors(run["base"].folder / "moments.safetensors") if "first." in name]
    )
    assert before == "the parent's"
    rows = "the new rows of embedding.weight, head.weight"
    assert after == f"the parent's for {total} of {total} parameters, zero for {rows}"


def test_the_log_says_that_adamw_has_no_moments_of_muons_matrices(made):
    _, _, run = made
    said = changes(run["other-hand"])
    assert said["optimiser"] == ("muon", "adamw")
    before = load_tensors(run["base"].folder / "moments.safetensors")
    names = {name.removeprefix("first.") for name in before if name.startswith("first.")}
    matrices = {name for name in names if f"second.{name}" not in before}
    assert f"for {len(names - matrices)} of {len(names)} parameters" in said["optimiser moments"][1]
    assert f"and {len(matrices) - 2} more" in said["optimiser moments"][1]
    # Three steps of their own, and the four of the parent for what was AdamW's before.
    after = load_tensors(run["other-hand"].folder / "moments.safetensors")
    assert {int(after[f"count.{name}"]) for name in matrices} == {3}
    assert {int(after[f"count.{name}"]) for name in names - matrices} == {7}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"other-hand.learning_rate": "parent"}, "base@step=4 was trained by muon"),
        ({"tongue.learning_rate": "parent"}, "the learning rate of base ended at 0"),
        (
            {"other-hand.adapter": {"rank": 2}, "other-hand.learning_rate": 0.002},
            "none of the parent's moments fit",
        ),
    ],
)
def test_what_means_nothing_here_is_refused(made, changes, said):
    path, runs, _ = made
    with pytest.raises(TriviumError, match=said):
        trivium.run(path, runs=runs, set=changes, only=["tongue", "other-hand"])


@pytest.mark.parametrize(
    ("rate", "left"),
    [
        ("{decay: linear}", 0.0),
        ("{decay: cosine, to: 0.1}", 0.1),
        ("{decay: 1-sqrt}", 0.0),
        ("{decay: constant}", 1.0),
        ("{decay: wsd}", 0.0),
    ],
)
def test_the_rate_that_is_left_follows_from_the_decay_and_where_it_goes(tmp_path, rate, left):
    path = recipe(tmp_path, BASE.replace("{decay: wsd}", rate))
    run = trivium.run(path, runs=tmp_path / "runs", only=["base"])
    found = read_json(run["base"].folder / "training.json")
    assert found["learning_rates"]["matrices"] == pytest.approx(
        left * found["peak_learning_rates"]["matrices"]
    )
    assert found["optimiser"] == "muon"
