"""The merge stage and micro-anneals, end to end."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import trivium
from tests.test_midtrain import RECIPE, recipe
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json

FORKS = """\
  left:  {kind: midtrain, from: base, data: corpus, batch: 256, steps: 3, learning_rate: 0.02, seed: 1}
  right: {kind: midtrain, from: base, data: corpus, batch: 256, steps: 3, learning_rate: 0.02, seed: 2}
"""
ROAD = RECIPE[: RECIPE.index("  fork:")] + FORKS
SOUPS = """\
  mean:   {kind: merge, of: [left, right], data: corpus}
  same:   {kind: merge, of: [left, left], method: slerp, share: 0.3}
  ema:    {kind: merge, of: [base@step=4, base, left], method: ema, decay: 0.25}
  greedy: {kind: merge, of: [left, right, base], method: greedy, data: corpus}
  less:   {kind: merge, of: [left], base: base, method: tasks, weights: [-1]}
  ties:   {kind: merge, of: [left, right], base: base, method: ties, density: 0.4}
  dare:   {kind: merge, of: [left, right], base: base, method: dare}
  mixes:
    kind: anneals
    from: base
    candidates: {same: corpus, other: {./other: {validation: 0.2}}}
    measure: {./other: {validation: 0.2}}
    batch: 256
    steps: 4
    learning_rate: 0.01
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup")
    return trivium.run(recipe(folder, ROAD + SOUPS), runs=folder / "runs")


def weights(folder):
    return load_tensors(folder / "model" / "model.safetensors")


def test_the_mean_is_the_mean_and_is_shown_beside_its_ingredients(made):
    left, right, soup = (weights(made[name].folder) for name in ("left", "right", "mean"))
    for key, tensor in soup.items():
        assert torch.allclose(tensor, (left[key] + right[key]) / 2, atol=1e-6)
    assert any(not torch.equal(left[key], right[key]) for key in left)
    assert list(made["mean"].summary["bits_per_byte"]) == ["left", "right", "the soup"]
    ids = torch.tensor([made["mean"].model().tokenizer.encode("3 and 4 make 7.")])
    theirs = AutoModelForCausalLM.from_pretrained(made["mean"].folder / "model")
    assert torch.allclose(theirs(ids).logits[0], made["mean"].model().logits(ids[0].tolist()), atol=5e-5)


def test_a_model_merged_with_itself_stays(made):
    left, soup = weights(made["left"].folder), weights(made["same"].folder)
    assert all(torch.allclose(soup[key], left[key], atol=1e-6) for key in left)


def test_ema_over_checkpoints_is_the_recursion(made):
    early = weights(next((made["base"].folder / "kept").iterdir()))
    base, left, soup = (weights(made[name].folder) for name in ("base", "left", "ema"))
    for key, tensor in soup.items():
        by_hand = 0.25 * (0.25 * early[key] + 0.75 * base[key]) + 0.75 * left[key]
        assert torch.allclose(tensor, by_hand, atol=1e-6)


def test_a_subtracted_task_vector_mirrors_the_model_at_its_base(made):
    base, left, less = (weights(made[name].folder) for name in ("base", "left", "less"))
    assert all(torch.allclose(less[key], 2 * base[key] - left[key], atol=1e-6) for key in base)


def test_a_greedy_soup_is_no_worse_than_its_best_ingredient(made):
    table = made["greedy"].summary["bits_per_byte"]
    best = min(table[name]["corpus"] for name in ("left", "right", "base"))
    assert table["the soup"]["corpus"] <= best + 1e-9
    assert table[made["greedy"].summary["of"][0]]["corpus"] == best


def test_the_candidate_that_holds_what_is_measured_comes_first(made):
    table = read_json(made["mixes"].folder / "report" / "table.json")
    first, second = table["candidates"]
    assert (first["candidate"], second["candidate"]) == ("other", "same")
    gain = table["before"]["./other"] - first["bits_per_byte"]["./other"]
    assert gain > 0
    assert first["gain_per_million_tokens"] == pytest.approx(gain / first["tokens"] * 1e6)


@pytest.mark.parametrize(
    ("soup", "error"),
    [
        ("{kind: merge, of: [base], method: ties}", "name it"),
        ("{kind: merge, of: [base], method: greedy}", "name `data`"),
        ("{kind: merge, of: [base], method: slerp}", "2 models"),
        ("{kind: merge, of: [base], weights: [1, 2]}", "as many"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, soup, error):
    text = RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 4") + f"  soup: {soup}\n"
    with pytest.raises(TriviumError, match=error):
        trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")
