"""The merge stage and micro-anneals, end to end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import trivium
from tests.test_midtrain import RECIPE, recipe
from trivium.data.packed import PackedRows
from trivium.data.rows import row_of_documents
from trivium.data.shards import Shards
from trivium.data.sources import read_documents
from trivium.data.split import in_validation, text_hash
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json
from trivium.kit.metrics import read_metrics
from trivium.learn.trainer import Trainer
from trivium.model import merge
from trivium.model.folder import load_model
from trivium.pipeline import plan, status
from trivium.pipeline.run import prepare, run
from trivium.stages.parts.paired import measured_documents

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
  ties:   {kind: merge, of: [left, right], base: base, method: ties, density: 0.4, scale: 0.7}
  dare:   {kind: merge, of: [left, right], base: base, method: dare, density: 0.3, scale: 0.6, seed: 5}
  arc:    {kind: merge, of: [left, right], method: slerp, share: 0.3}
  uneven: {kind: merge, of: [left, right], weights: [3, 1]}
  half:   {kind: merge, of: [left, right], base: base, method: tasks, scale: 0.5}
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


@pytest.mark.slow
def test_the_mean_is_the_mean_and_is_shown_beside_its_ingredients(made):
    left, right, soup = (weights(made[name].folder) for name in ("left", "right", "mean"))
    for key, tensor in soup.items():
        assert torch.allclose(tensor, (left[key] + right[key]) / 2, atol=1e-6)
    assert any(not torch.equal(left[key], right[key]) for key in left)
    assert list(made["mean"].summary["bits_per_byte"]) == ["left", "right", "the merge"]
    ids = torch.tensor([made["mean"].model().tokenizer.encode("3 and 4 make 7.")])
    theirs = AutoModelForCausalLM.from_pretrained(made["mean"].folder / "model")
    assert torch.allclose(theirs(ids).logits[0], made["mean"].model().logits(ids[0].tolist()), atol=5e-5)


@pytest.mark.slow
def test_a_model_merged_with_itself_stays(made):
    left, soup = weights(made["left"].folder), weights(made["same"].folder)
    assert all(torch.allclose(soup[key], left[key], atol=1e-6) for key in left)


@pytest.mark.slow
def test_ema_over_checkpoints_is_the_recursion(made):
    early = weights(next((made["base"].folder / "kept").iterdir()))
    base, left, soup = (weights(made[name].folder) for name in ("base", "left", "ema"))
    for key, tensor in soup.items():
        by_hand = 0.25 * (0.25 * early[key] + 0.75 * base[key]) + 0.75 * left[key]
        assert torch.allclose(tensor, by_hand, atol=1e-6)


@pytest.mark.slow
def test_a_subtracted_task_vector_mirrors_the_model_at_its_base(made):
    base, left, less = (weights(made[name].folder) for name in ("base", "left", "less"))
    assert all(torch.allclose(less[key], 2 * base[key] - left[key], atol=1e-6) for key in base)


@pytest.mark.slow
def test_every_method_is_given_the_settings_of_its_stage(made):
    def tensors(name):
        return dict(load_model(made[name].folder / "model").state_dict())

    base, left, right = map(tensors, ("base", "left", "right"))
    expected = {
        "ties": merge.ties(base, [left, right], density=0.4, scale=0.7),
        "dare": merge.dare(base, [left, right], density=0.3, scale=0.6, seed=5),
        "arc": merge.slerp(left, right, 0.3),
        "uneven": {key: 0.75 * left[key] + 0.25 * right[key] for key in base},
        "half": {key: base[key] + 0.5 * (left[key] + right[key] - 2 * base[key]) for key in base},
    }
    for name, wanted in expected.items():
        found = tensors(name)
        assert all(torch.allclose(found[key], wanted[key], atol=1e-6) for key in base), name


@pytest.mark.slow
def test_a_greedy_soup_is_reported_on_documents_that_did_not_choose_it(made):
    summary = made["greedy"].summary
    model, tokenizer = made["greedy"].model(), made["greedy"].model().tokenizer
    held = Shards(made["corpus"].folder / "data", "validation")
    bits, size = 0.0, 0
    # A document is a row here, and rows are packed longest first; by hand, one document at a time.
    names = [one for row in packed_in_order(held) for one in row.ids]
    for name in names[1::2]:
        index = [held.id(place) for place in range(len(held))].index(name)
        ids = held.document(index)
        losses = torch.log_softmax(torch.as_tensor(model.logits(ids[:-1].tolist())).double(), -1)
        bits -= float(losses[range(len(ids) - 1), ids[1:]].sum()) / math.log(2)
        size += int(tokenizer.byte_lengths()[ids[1:]].sum())
    assert summary["bits_per_byte"]["the merge"]["corpus"] == pytest.approx(bits / size, abs=1e-5)
    assert all(one["documents"] == len(names) // 2 for one in summary["against"].values())


def packed_in_order(held):
    packed = PackedRows(held, 32)
    return [packed.row(index) for index in range(len(packed))]


@pytest.mark.slow
def test_the_soup_stands_beside_its_ingredients_with_intervals_without_being_asked(made):
    for name, parts in (("same", ["left", "left"]), ("ties", ["left", "right"])):
        summary = made[name].summary
        assert list(summary["bits_per_byte"]) == [*dict.fromkeys(parts), "the merge"]
        assert list(summary["bits_per_byte"]["the merge"]) == ["corpus"]
        for part in parts:
            table, beside = summary["bits_per_byte"], summary["against"][part]
            difference = table["the merge"]["corpus"] - table[part]["corpus"]
            assert beside["value"] == pytest.approx(difference)
            assert beside["low"] <= beside["value"] <= beside["high"]
    assert not made["same"].summary["against"]["left"]["shown"]
    table = {name: one["corpus"] for name, one in made["ties"].summary["bits_per_byte"].items()}
    below = (table["left"] + table["right"]) / 2 - table["the merge"]
    assert made["ties"].summary["below_mean"] == pytest.approx(below)


@pytest.mark.slow
def test_the_candidate_that_holds_what_is_measured_comes_first(made):
    table = read_json(made["mixes"].folder / "report" / "table.json")
    first, second = table["candidates"]
    assert (first["candidate"], second["candidate"]) == ("other", "same")
    gain = table["before"]["./other"] - first["bits_per_byte"]["./other"]
    assert gain > 0
    whole = first["gain_per_million_tokens"]
    assert whole["value"] == pytest.approx(gain / first["tokens"] * 1e6)
    assert whole["low"] <= whole["value"] <= whole["high"]
    behind = second["behind_the_first"]
    assert behind["value"] == pytest.approx(whole["value"] - second["gain_per_million_tokens"]["value"])
    assert "behind_the_first" not in first


@pytest.mark.parametrize(
    ("soup", "error"),
    [
        ("{kind: merge, of: [base], method: ties}", "name it"),
        ("{kind: merge, of: [base], method: slerp}", "2 models"),
        ("{kind: merge, of: [base], weights: [1, 2]}", "as many"),
        ("{kind: merge, of: [base], density: 0.2}", "`mean` takes no `density`"),
        ("{kind: merge, of: [base], base: base}", "`mean` takes no `base`"),
        ("{kind: merge, of: [base], method: ema, scale: 2}", "`ema` takes no `scale`"),
        ("{kind: merge, of: [base], method: ties, base: base, share: 0.1}", "`ties` takes no `share`"),
        ("{kind: merge, of: [base], method: greedy, decay: 0.1}", "`greedy` takes no `decay`"),
        ("{kind: merge, of: [base], method: tasks, base: base, density: 0.1}", "`tasks` takes no `density`"),
        ("{kind: merge, of: [base], method: tasks, base: base, weights: [1], scale: 2}", "leave `scale` out"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_anything_runs(tmp_path, soup, error):
    text = RECIPE[: RECIPE.index("  fork:")] + f"  soup: {soup}\n"
    with pytest.raises(TriviumError, match=error):
        prepare(recipe(tmp_path, text), tmp_path / "runs")


@pytest.mark.slow
def test_models_whose_positions_differ_are_not_merged(tmp_path):
    text = RECIPE[: RECIPE.index("  fork:")] + RECIPE[RECIPE.index("  long:") :]
    text = text.replace("steps: 3", "steps: 1") + "  soup: {kind: merge, of: [base, long]}\n"
    error = "'base' and 'long' cannot be merged: context is 32 in one and 128 in the other"
    with pytest.raises(TriviumError, match=error):
        trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")


@pytest.mark.slow
def test_measured_documents_that_were_trained_on_under_another_share_are_left_out(tmp_path):
    text = (
        RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 4")
        + """\
  mid:   {kind: midtrain, from: base, data: {./other: {validation: 0.2}}, batch: 256, steps: 2}
  soup:  {kind: merge, of: [mid, mid], data: {./other: {validation: 0.5}}}
  texts: {kind: merge, of: [mid, mid], data: {./texts: {validation: 0.9}}}
  mixes:
    kind: anneals
    from: base
    candidates: {other: {./other: {validation: 0.2}}}
    measure: {./other: {validation: 0.5}}
    batch: 256
    steps: 2
"""
    )
    made = trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")
    digests = {text_hash(one): one for one in read_documents(str(tmp_path / "other"))}
    unseen = sum(in_validation(digest, 0.2) for digest in digests)
    assert 0 < unseen < sum(in_validation(digest, 0.5) for digest in digests)
    assert made["soup"].summary["against"]["mid"]["documents"] == unseen
    assert made["mixes"].summary["candidates"][0]["documents"] == unseen
    held = len(Shards(made["corpus"].folder / "data", "validation"))
    assert made["texts"].summary["against"]["mid"]["documents"] == held


def test_nothing_to_measure_is_said_before_anything_is_trained(tmp_path):
    text = (
        RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 4")
        + """\
  mixes:
    kind: anneals
    from: base
    candidates: {other: {./other: {validation: 0.2}}}
    measure: {./other: {validation: 0}}
    batch: 256
    steps: 2
"""
    )
    with pytest.raises(TriviumError, match=r"of `\./other` nothing that is not trained on is held out"):
        trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("model"))


@pytest.mark.slow
def test_anneals_that_are_cut_off_end_as_those_that_are_not(tmp_path, monkeypatch):
    text = (
        RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 4")
        + """\
  mixes:
    kind: anneals
    from: base
    candidates: {same: corpus, other: {./other: {validation: 0.2}}}
    measure: {./other: {validation: 0.2}, corpus: {}}
    batch: 256
    steps: 6
    checkpoint: {every_steps: 1}
"""
    )
    path = recipe(tmp_path, text)
    whole = trivium.run(path, runs=tmp_path / "whole")
    step = Trainer._one_step
    for name, at in (("same", 3), ("other", 4)):

        def dying(self, name=name, at=at):
            if self.step == at and name in str(self.folder):
                self.checkpoints.finish()
                raise RuntimeError("the lights went out")
            return step(self)

        monkeypatch.setattr(Trainer, "_one_step", dying)
        with pytest.raises(RuntimeError, match="lights"):
            trivium.run(path, runs=tmp_path / "cut")
        monkeypatch.undo()
    assert not list((tmp_path / "whole").rglob("checkpoints")), "states of a finished training are left"
    read = read_metrics(tmp_path / "cut" / "tiny" / "mixes+other" / "metrics.jsonl")
    assert max(row.get("step", 0) for row in read) == 4
    cut = trivium.run(path, runs=tmp_path / "cut")
    assert cut["mixes"].summary == whole["mixes"].summary
    for name in ("same", "other"):
        one, other = (
            load_tensors(run[f"mixes+{name}"].folder / "model" / "model.safetensors") for run in (whole, cut)
        )
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_only_documents_of_which_something_is_measured_count():
    row = row_of_documents([np.arange(3), np.arange(4)], ids=["learnt", "held"])
    spelt = np.array([0, 0, 0, 1, 1, 1, 0], dtype=np.float32)
    assert measured_documents([replace(row, columns={"bytes": spelt})]) == {"held"}


@pytest.mark.slow
def test_candidates_may_have_weights_where_the_replay_beside_them_has_none(tmp_path):
    text = (
        RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 2")
        + """\
  mixes:
    kind: anneals
    from: base
    candidates: {one: {./other: {weight: 0.8, validation: 0.2}, ./texts: {weight: 0.2}}}
    measure: {./other: {validation: 0.2}}
    replay: {share: 0.3, data: {corpus: {}}}
    batch: 256
    steps: 2
"""
    )
    made = trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")
    shares = {name: facts["share"] for name, facts in made["mixes+one"].summary["data"].items()}
    assert list(shares) == ["./other", "./texts", "corpus"]
    assert shares["./other"] > shares["./texts"]


@pytest.mark.slow
def test_each_candidate_is_a_stage_that_is_kept_for_itself(tmp_path):
    text = (
        RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 2")
        + """\
  mixes:
    kind: anneals
    from: base
    candidates: {same: corpus, "0.2": {./other: {validation: 0.2}}}
    measure: {./other: {validation: 0.2}}
    batch: 256
    steps: 2
  alone: {kind: midtrain, from: base, data: {./other: {validation: 0.2}}, batch: 256, steps: 2}
"""
    )
    path, runs = recipe(tmp_path, text), tmp_path / "runs"
    made = trivium.run(path, runs=runs)
    one, other = weights(made["mixes+0.2"].folder), weights(made["alone"].folder)
    assert all(torch.equal(one[key], other[key]) for key in one)
    listed = [row[0].strip("│├└ ") for row in status.rows(runs, path)]
    assert {"mixes", "mixes+same", "mixes+0.2"} < set(listed)
    written = path.read_text()
    path.write_text(
        written.replace("candidates: {same: corpus,", "candidates: {same: corpus, more: {./texts: {}},")
    )
    assert {"mixes+more", "mixes"} < {row[0] for row in plan.plan(path, runs)}
    again = run(path, runs).became
    assert again["mixes+same"] == again["mixes+0.2"] == "reused"
    assert again["mixes+more"] == again["mixes"] == "ran"
    path.write_text(written.replace("same: corpus", "../same: corpus"))
    with pytest.raises(TriviumError, match=r"stages.mixes.*`\.\./same` cannot be the name of a stage"):
        prepare(path, runs)
