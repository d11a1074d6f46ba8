"""Mid-training: what is taken over, what is seen again, what grows, what reaches further."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import trivium
from tests.test_pretrain import write
from tests.tuning import cut_off
from trivium.data.door import documents
from trivium.data.ingredients import Ingredient, eased, with_replay
from trivium.data.mixture import MixturePlan, PlannedSource, weight_at
from trivium.data.shards import Shards
from trivium.data.sources import read_documents
from trivium.data.split import in_validation, text_hash
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json
from trivium.pipeline.run import prepare
from trivium.tokens.extend import extend_tokenizer

RECIPE = """\
name: tiny
stages:
  words:  {kind: tokenizer, data: ./texts, vocabulary: 268}
  corpus: {kind: corpus, data: ./texts, tokenizer: words, validation: 0.1}
  base:
    kind: pretrain
    data: corpus
    model: {depth: 1, width: 32}
    context: 32
    batch: 256
    steps: 8
    learning_rate: {decay: wsd}
    checkpoint: {at: [step=4]}
  fork:
    kind: midtrain
    from: base@step=4
    data: {./other: {weight: 1, validation: 0.2}}
    replay: {data: corpus, share: 0.25}
    batch: 256
    steps: 8
    learning_rate: {from: parent, decay: 1-sqrt}
    optimiser_state: keep
  tongue:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.2}}
    watch: {./texts: {validation: 0.1}}
    vocabulary: {data: ./other, added: 12}
    batch: 256
    steps: 3
    learning_rate: 0.002
  long:
    kind: midtrain
    from: base
    data: corpus
    context: {length: 128, method: yarn}
    batch: 256
    steps: 3
    learning_rate: 0.002
"""


def recipe(folder, text=RECIPE):
    path = write(folder, text)
    (folder / "other").mkdir()
    lines = [f"zamo{one} kelu vrado zamo{other} kelu." for one in range(20) for other in range(10)]
    (folder / "other" / "tongue.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return folder, trivium.run(recipe(folder), runs=folder / "runs")


def changes(stage):
    return {row["change"]: (row["before"], row["after"]) for row in stage.changes}


def test_a_fork_starts_from_the_kept_weights_at_the_rate_they_were_trained_with(made):
    _, run = made
    kept = next((run["base"].folder / "kept").iterdir())
    rates = read_json(kept / "training.json")["learning_rates"]
    said = changes(run["fork"])
    assert said["learning rate"] == (rates["matrices"], rates["matrices"])
    assert said["optimiser state"] == ("the parent's", "the parent's")
    assert read_json(run["fork"].folder / "training.json")["peak_learning_rates"] == rates
    # The moments went on counting from the fork's step 4, not from the base's end.
    assert int(load_tensors(run["fork"].folder / "moments.safetensors")["steps"]) == 12


def test_the_replay_has_its_share(made):
    _, run = made
    data = run["fork"].summary["data"]
    assert data["corpus"]["share"] == pytest.approx(0.25, abs=1 / 64)


def test_both_sources_are_measured_and_the_watched_one_is_not_trained(made):
    _, run = made
    assert list(run["tongue"].summary["data"]) == ["./other"]
    assert any("texts" in key for row in run["tongue"].metrics for key in row)


def test_the_vocabulary_grows_and_transformers_agrees(made):
    path, run = made
    said = changes(run["tongue"])
    assert said["vocabulary"] == (268, 280)
    before = AutoTokenizer.from_pretrained(run["base"].folder / "model")
    after = AutoTokenizer.from_pretrained(run["tongue"].folder / "model")
    for name, share in (("./other", 0.2), ("./texts", 0.1), ("corpus", 0.1)):
        folder = {"corpus": "texts"}.get(name, name)
        held = [
            one.text for one in read_documents(str(path / folder)) if in_validation(text_hash(one), share)
        ]
        size = sum(len(text.encode()) for text in held)
        by_hand = [size / sum(len(theirs(text).input_ids) for text in held) for theirs in (before, after)]
        assert said[f"bytes per token of {name}"] == pytest.approx(by_hand, abs=1e-3)
    new, old = said["bytes per token of ./other"], said["bytes per token of corpus"]
    assert new[1] > 1.5 * new[0]
    assert old[1] == pytest.approx(old[0], rel=0.05)
    agrees(run["tongue"], "zamo3 kelu vrado")
    theirs = AutoTokenizer.from_pretrained(run["tongue"].folder / "model")
    assert max(theirs("zamo3 kelu vrado").input_ids) >= 268


def test_the_stretched_model_reaches_four_times_as_far_and_transformers_agrees(made):
    _, run = made
    before, after = changes(run["long"])["positions"]
    assert "default" in before
    assert "yarn" in after
    assert "128 tokens" in after
    agrees(run["long"], "1 and 2 make 3. " * 7)


def agrees(stage, text):
    model = stage.model()
    ids = model.tokenizer.encode(text)
    theirs = AutoModelForCausalLM.from_pretrained(stage.folder / "model")(torch.tensor([ids])).logits[0]
    assert torch.allclose(theirs, model.logits(ids), atol=5e-5)


@pytest.mark.slow
def test_more_context_than_the_positions_reach_is_refused(tmp_path):
    text = RECIPE[: RECIPE.index("  fork:")] + RECIPE[RECIPE.index("  long:") :]
    path = recipe(tmp_path, text.replace(", method: yarn", ""))
    with pytest.raises(TriviumError, match="add a `method`"):
        trivium.run(path, runs=tmp_path / "runs")


class Rows:
    tokens = 100


def test_a_replay_keeps_its_share_while_the_new_weights_move():
    new = [
        Ingredient("common", Rows(), weights=((0.0, 3.0), (1.0, 0.0))),
        Ingredient("good", Rows(), weights=((0.0, 0.0), (1.0, 1.0))),
    ]
    old = [Ingredient("old", Rows(), weights=((0.0, 7.0),))]
    mixed = with_replay(new, old, 0.2)
    plan = MixturePlan(
        tuple(PlannedSource(one.name, 50, one.weights) for one in mixed), total=500, batch=5, seed=0
    )
    for rows in range(0, 501, 50):
        drawn = dict(zip(("common", "good", "old"), plan.drawn(rows), strict=True))
        assert abs(drawn["old"] - 0.2 * rows) <= 1
    places = np.linspace(0, 1, 100_001)
    share = 0.8 * np.trapezoid(places / (places + 3 * (1 - places)), places)
    assert drawn["good"] == pytest.approx(500 * share, rel=0.01)


def test_with_a_replay_weights_jump_and_bend_where_the_recipe_says():
    """Where the sum stays the same, dividing by it changes no curve: each is its own, times its share."""
    first = ((0.0, 1.0), (0.3, 1.0), (0.3, 0.0), (1.0, 0.0))
    second = ((0.0, 0.0), (0.3, 0.0), (0.3, 1.0), (0.77, 0.2), (1.0, 0.6))
    third = ((0.0, 0.0), (0.3, 0.0), (0.77, 0.8), (1.0, 0.4))
    new = [Ingredient(f"{place}", Rows(), weights=one) for place, one in enumerate((first, second, third))]
    old = [
        Ingredient("old", Rows(), weights=((0.0, 2.0),)),
        Ingredient("older", Rows(), weights=((0.0, 6.0),)),
    ]
    mixed = with_replay(new, old, 0.2)
    for place in np.linspace(0, 1, 1001):
        for after in (False, True):
            found = [weight_at(one.weights, place, after=after) for one in mixed]
            wanted = [0.8 * weight_at(one, place, after=after) for one in (first, second, third)]
            assert found == pytest.approx([*wanted, 0.05, 0.15], abs=1e-9)


def test_a_cosine_ramp_is_slow_at_its_ends_and_half_way_in_the_middle():
    knots = eased(((0.0, 0.0), (0.5, 1.0), (0.5, 2.0), (1.0, 2.0)))
    places, levels = zip(*knots, strict=True)
    assert np.interp(0.25, places, levels) == pytest.approx(0.5)
    assert np.interp(0.05, places, levels) < 0.04
    assert [level for place, level in knots if place == 0.5] == [1.0, 2.0]


@pytest.mark.slow
def test_what_the_parent_was_trained_on_is_not_watched(tmp_path, capsys):
    text = (
        RECIPE[: RECIPE.index("  fork:")]
        + """\
  mid:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.2}}
    watch: {./texts: {validation: 0.6}}
    batch: 256
    steps: 2
"""
    )
    run = trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")
    held = len(Shards(run["corpus"].folder / "data", "validation"))
    wider = sum(in_validation(text_hash(one), 0.6) for one in read_documents(str(tmp_path / "texts")))
    assert f"./texts: {wider - held} of {wider} held-out documents are trained on" in capsys.readouterr().err
    assert run["mid"].summary["data"].keys() == {"./other"}


@pytest.mark.slow
def test_a_ramped_midtrain_that_is_cut_off_ends_as_one_that_is_not(tmp_path, monkeypatch):
    text = (
        RECIPE[: RECIPE.index("  fork:")]
        + """\
  long:
    kind: midtrain
    from: base
    data: {corpus: {weight: [1, 0]}, ./other: {weight: [0, 1], validation: 0.2}}
    ramp: cosine
    replay: {data: {./texts: {validation: 0.1}}, share: 0.2}
    context: {length: [32, 64, 128], method: yarn}
    batch: 256
    steps: 12
    checkpoint: {every_steps: 1}
"""
    )
    path = recipe(tmp_path, text)
    whole = trivium.run(path, runs=tmp_path / "whole")
    # After the first length and before the last: the base has 8 steps, so only `long` comes so far.
    cut_off(monkeypatch, path, tmp_path / "cut", at=9)
    cut = trivium.run(path, runs=tmp_path / "cut")
    one, other = (load_tensors(run["long"].folder / "model" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept = [[row for row in run["long"].metrics if "step" in row and "loss" in row] for run in (whole, cut)]
    assert len(kept[0]) == 12
    assert [row["loss"] for row in kept[0]] == [row["loss"] for row in kept[1]]


@pytest.mark.slow
def test_new_tokens_are_learnt_from_so_many_letters_and_not_from_what_is_held_out(tmp_path, monkeypatch):
    learnt, read = [], []

    def extend(tokenizer, texts, added):
        learnt.extend(texts)
        return extend_tokenizer(tokenizer, texts, added)

    def listened(work, sources):
        for one in documents(work, sources):
            read.append(one.text)
            yield one

    monkeypatch.setattr("trivium.stages.parts.new_tokens.extend_tokenizer", extend)
    monkeypatch.setattr("trivium.stages.parts.new_tokens.documents", listened)
    text = (
        RECIPE[: RECIPE.index("  fork:")]
        + """\
  tongue:
    kind: midtrain
    from: base
    data: {./other: {validation: 0.3}, ./texts: {validation: 0.05}}
    vocabulary: {data: ./other, added: 4, characters: 1000}
    batch: 256
    steps: 1
"""
    )
    trivium.run(recipe(tmp_path, text), runs=tmp_path / "runs")
    whole = list(read_documents(str(tmp_path / "other")))
    held = {one.text for one in whole if in_validation(text_hash(one), 0.3)}
    assert held & set(read)
    assert not held & set(learnt)
    assert sum(map(len, learnt)) - len(learnt[-1]) < 1000 <= sum(map(len, learnt))
    assert len(read) < len(whole) / 2


@pytest.mark.parametrize(
    ("context", "error"),
    [
        ("{length: 64, factor: 2}", "`factor` is part of a `method`"),
        ("{length: 64, base: 100k}", "`base` is part of a `method`"),
        ("{length: 64, method: extrapolate, factor: 2}", "`extrapolate` takes no `factor`"),
        ("{length: 64, method: extrapolate, beta_fast: 9}", "`extrapolate` takes no `beta_fast`"),
        ("{length: 64, method: yarn, every: 2}", "`yarn` takes no `every`"),
        ("{length: 64, method: interpolate, low_freq_factor: 2}", "`interpolate` takes no `low_freq_factor`"),
        ("{length: 64, method: llama3, low_freq_factor: 4}", "4 has to lie below `high_freq_factor` 4"),
        ("{length: 64, method: yarn, beta_fast: 2, beta_slow: 2}", "has to lie above `beta_slow`"),
        ("{length: 64, method: yarn, factor: 0.5}", "greater than or equal to 1"),
    ],
)
def test_options_of_a_context_that_would_be_ignored_are_refused(tmp_path, context, error):
    text = RECIPE[: RECIPE.index("  fork:")]
    text += f"  long: {{kind: midtrain, from: base, data: corpus, steps: 2, context: {context}}}\n"
    with pytest.raises(TriviumError, match=error):
        prepare(recipe(tmp_path, text), tmp_path / "runs")


def test_a_source_that_is_learnt_from_is_not_only_watched(tmp_path):
    text = RECIPE[: RECIPE.index("  fork:")]
    text += "  mid: {kind: midtrain, from: base, data: corpus, watch: corpus, steps: 2}\n"
    with pytest.raises(TriviumError, match="`watch` names `corpus`, which is learnt from"):
        prepare(recipe(tmp_path, text), tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_positions_that_reach_so_far_are_not_stretched(tmp_path, family):
    text = RECIPE[: RECIPE.index("  fork:")].replace("steps: 8", "steps: 4")
    text = text.replace("width: 32}", f"width: 32, family: {family}}}")
    text += "  long: {kind: midtrain, from: base, data: corpus, steps: 2, context: CONTEXT}\n"
    path = recipe(tmp_path, text)
    for context, error in (
        ("{length: 16, method: yarn}", "reads 32 tokens already, so `yarn` has nothing to extend for 16"),
        ("{length: 32, method: interpolate}", "so `interpolate` has nothing to extend for 32"),
        ("{length: 64, method: interpolate, factor: 2}", "do not turn, so `factor` says nothing"),
    ):
        path.write_text(text.replace("CONTEXT", context))
        if family == "qwen3" and "factor" in context:
            continue
        with pytest.raises(TriviumError, match=error):
            trivium.run(path, runs=tmp_path / "runs")
