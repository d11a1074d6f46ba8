"""Recipes: what is read, what is refused and in which words, and what changes a fingerprint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from toys import RECIPE, write_recipe

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.learn.settings import LearningRate
from trivium.pipeline.run import prepare
from trivium.recipe import graph
from trivium.recipe.read import LIBRARY, library, read
from trivium.recipe.schema import json_schema, load
from trivium.stages.pretrain import Pretrain


def refused(folder: Path, text: str, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(TriviumError) as caught:
        graph.build(load(write_recipe(folder, text), overrides))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def changed(folder: Path, old: str, new: str) -> str:
    assert old in RECIPE
    return refused(folder, RECIPE.replace(old, new))


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("base.tokens=0", "than or equal to 1"),
        ("base.steps=-1", "than or equal to 0"),
        ("base.batch=0", "than or equal to 1"),
        ("base.micro_batch=-7", "than or equal to 0"),
        ("base.epochs=0", "than 0"),
        ("base.context=1", "than or equal to 2"),
        ("base.learning_rate=-1", "than or equal to 0"),
        ("base.learning_rate=.nan", "a finite number"),
        ("base.z_loss=.inf", "a finite number"),
        ("base.model.head_width=0", "than or equal to 1"),
        ("base.checkpoint.every_steps=0", "than or equal to 1"),
        ("base.seed=-1", "than or equal to 0"),
        ("base.data={corpus: {weight: -1}}", "than or equal to 0"),
        ("base.data={corpus: {weight: [[0, 1], [1, -1]]}}", "than or equal to 0"),
        ("base.data={corpus: {max_repeats: .inf}}", "a finite number"),
        ("base.adapter={alpha: .inf}", "a finite number"),
        ("mid.context={length: 512, method: yarn, factor: .inf}", "a finite number"),
        ("sft.near_parent={kl: .inf}", "a finite number"),
        ("base.data=3", "a valid mapping"),
        ("base.data=[[corpus]]", "a valid mapping"),
        ("dpo.loss=[[dpo]]", "a valid mapping"),
        ("dpo.beta=[0.1, -0.1]", "than or equal to 0"),
        ("report.asking={temperature: .inf}", "a finite number"),
        ("words.vocabulary=-3", "than or equal to 264"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_runs(override, rule):
    with pytest.raises(TriviumError, match=f"cannot be .*: it should be (greater )?{rule}"):
        load("pocket", [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stages: {}", "stages cannot be {}: it should have at least 1 item, not 0."),
        ("stages: [a]", "stages cannot be ['a']: it should be a valid mapping, as in `{key: value}`."),
        (
            "stages: {a: tokenizer}",
            "stages.a cannot be 'tokenizer': it should be a valid mapping, as in `{key: value}`.",
        ),
        ("stages: &all {a: *all}", "an anchor (`&`) stands for something that holds itself."),
    ],
)
def test_what_is_no_recipe_is_told_in_the_words_of_one(tmp_path, text, words):
    assert words in refused(tmp_path, text)


def test_numbers_and_defaults_are_resolved(tmp_path):
    recipe = load(write_recipe(tmp_path))
    assert recipe.stages["words"].vocabulary == 4000
    assert recipe.stages["base"].seed == 7
    assert list(recipe.stages) == ["words", "base", "left", "right"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("vocabulary: 4k", "vocabluary: 4k", ["toy.yaml:4", "stages.words.vocabluary", "`vocabulary`?"]),
        ("model: {depth: 2}", "model: {dept: 2}", ["toy.yaml:5", "stages.base.model.dept ", "`depth`?"]),
        ("model: {depth: 2}", "model: {depth: two}", ["stages.base.model.depth cannot be 'two'"]),
        ("kind: toy_words", "kind: toy_word", ["stages.words", "`toy_word`", "`toy_words`?"]),
        ("kind: toy_words, ", "", ["stages.words", "`kind`"]),
        ("data: ./texts, ", "", ["stages.words.data is missing"]),
        ("kind: toy_words, data", "kind: tokenizer, dat", ["stages.words.dat is not a setting", "`data`?"]),
        ("seed: 7", "sed: 7", ["toy.yaml:2", "`seed`?"]),
        ("from: 0.1, to: 0.0", "from: 0.1, to: x", ["stages.right.rate.to cannot be 'x'"]),
        ("name: toy", "name: store", ["name", "`store`"]),
        ("name: toy", "name: ../up", ["name cannot be '../up'"]),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(tmp_path, old, new, words):
    sentence = changed(tmp_path, old, new)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            "left:  {kind: toy_train, from: base",
            "left:  {kind: toy_train, from: bas",
            ["stages.left.from", "`base`?"],
        ),
        (
            "right: {kind: toy_train, from: base",
            "right: {kind: toy_train, from: words",
            ["stages.right.from needs a model", "`words` is a toy_words stage and makes a tokenizer"],
        ),
        (
            "left:  {kind: toy_train, from: base",
            "left:  {kind: toy_train, from: nothingalike",
            ["stages.left.from", "its stages are words, base, left, right."],
        ),
        ("words: words", "from: left", ["circle", "base", "left"]),
        ("words: words", "from: base", ["circle"]),
        ("data: ./texts", "data: ./nowhere", ["stages.words.data", "./nowhere", "path that exists"]),
        (
            "left:  {kind: toy_train, from: base",
            "left:  {kind: toy_train, from: base@tok=2",
            ["@tok=2", "@tokens=2M"],
        ),
    ],
)
def test_a_wrong_graph_is_found_before_anything_runs(tmp_path, old, new, words):
    sentence = changed(tmp_path, old, new)
    assert all(word in sentence for word in words), sentence


def test_broken_yaml_is_named_with_its_line(tmp_path):
    assert "toy.yaml:3" in refused(tmp_path, "name: toy\nseed: 1\nseed: 2\n")
    assert "written twice" in refused(tmp_path, "name: toy\nseed: 1\nseed: 2\n")
    assert "toy.yaml:2" in refused(tmp_path, "name: toy\n  seed: 1\n")
    assert "not a recipe" in refused(tmp_path, "")
    assert "stages" in refused(tmp_path, "name: toy\nstages: {}\n")


def test_yaml_words_stay_words_and_numbers_numbers(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("stages: {a: {on: yes, rate: 1e-3, off: true}}\n")
    assert read(path).content["stages"]["a"] == {"on": "yes", "rate": 1e-3, "off": True}


def test_overrides(tmp_path):
    path = write_recipe(tmp_path)
    recipe = load(path, ["stages.base.steps=2k", "left.rate=1e-3", "seed=9", "right.model.width=3"])
    assert recipe.stages["base"].steps == 2000
    assert recipe.stages["left"].rate == 1e-3
    assert recipe.stages["right"].seed == 9
    assert recipe.stages["right"].model.width == 3
    assert load(path, {"stages.base.steps": "5"}).stages["base"].steps == 5
    for override, words in [
        ("bas.steps=1", "`bas`"),
        ("stages.bse.steps=1", "`base`?"),
        ("base.steps", "no value"),
        ("base.steps.deep=1", "base.steps` is 4"),
        ("base.stepps=1", "`steps`?"),
    ]:
        assert words in refused(tmp_path, RECIPE, (override,))


def test_extends_merges_replaces_and_takes_away(tmp_path):
    write_recipe(tmp_path)
    child = tmp_path / "child.yaml"
    child.write_text("extends: toy.yaml\nseed: 3\nstages:\n  base: {steps: 9}\n  left:\n")
    recipe = load(child)
    assert recipe.name == "child"
    assert recipe.seed == 3
    assert recipe.stages["base"].steps == 9
    assert recipe.stages["base"].words == "words"
    assert "left" not in recipe.stages
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(TriviumError, match="circle"):
        load(tmp_path / "a.yaml")


def fingerprints(path: Path, *overrides: str) -> dict[str, str]:
    return {name: node.fingerprint for name, node in graph.build(load(path, overrides)).items()}


def test_only_what_depends_on_a_change_gets_another_fingerprint(tmp_path):
    path = write_recipe(tmp_path)
    before = fingerprints(path)
    assert fingerprints(path) == before

    def differing(*overrides: str) -> set[str]:
        after = fingerprints(path, *overrides)
        return {name for name in after if after[name] != before[name]}

    assert differing("base.steps=5") == {"base", "left", "right"}
    assert differing("left.steps=5") == {"left"}
    assert differing("words.vocabulary=5") == {"words", "base", "left", "right"}
    assert differing("base.gate=open") == set()
    assert differing("seed=8") == {"base", "left", "right"}
    assert differing("left.from=base@step=2") == {"left"}
    (tmp_path / "texts" / "a.txt").write_text("other words\n")
    assert differing() == {"words", "base", "left", "right"}


def test_a_fingerprint_counts_what_auto_means_here_and_not_how_passes_are_cut(tmp_path, monkeypatch):
    """What one kind of device computed is never taken for what another would, and passes are bookkeeping."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words")
    path = tmp_path / "base.yaml"
    path.write_text(
        "name: base\nstages:\n  words: {kind: tokenizer, data: ./texts, vocabulary: 300}\n"
        "  base: {kind: pretrain, data: ./texts, tokenizer: words, tokens: 4k, context: 64}\n"
    )
    before = fingerprints(path)
    assert fingerprints(path, "base.micro_batch=64") == before
    assert fingerprints(path, "base.precision=float32") == before
    assert fingerprints(path, "base.precision=bfloat16")["base"] != before["base"]
    monkeypatch.setattr(machine, "device", lambda: "cuda:3")
    monkeypatch.setattr(machine, "compute_dtype", lambda device: torch.float32)
    elsewhere = fingerprints(path)
    assert elsewhere["words"] == before["words"]
    assert elsewhere["base"] != before["base"]
    monkeypatch.setattr(machine, "device", lambda: "cuda:0")
    assert fingerprints(path) == elsewhere


def test_a_stage_version_counts(tmp_path, monkeypatch):
    path = write_recipe(tmp_path)
    before = fingerprints(path)
    monkeypatch.setattr(type(load(path).stages["words"]), "version", 2)
    assert all(fingerprints(path)[name] != before[name] for name in before)


def test_names_and_places_do_not_count(tmp_path):
    path = write_recipe(tmp_path)
    renamed = write_recipe(
        tmp_path,
        RECIPE.replace("words: {", "vocab: {").replace("words: words", "words: vocab"),
        "renamed.yaml",
    )
    assert fingerprints(path)["base"] == fingerprints(renamed)["base"]
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(tmp_path, elsewhere)
    assert fingerprints(elsewhere / "toy.yaml") == fingerprints(path)


def test_needed_stages_come_in_order(tmp_path):
    nodes = graph.build(load(write_recipe(tmp_path)))
    assert graph.needed(nodes, ["left"]) == ["words", "base", "left"]
    assert graph.needed(nodes, []) == list(nodes)
    with pytest.raises(TriviumError, match="`left`\\?"):
        graph.needed(nodes, ["lefft"])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(TriviumError, match="`laptop`\\?"):
        load("laptpo")


def test_json_schema_knows_every_kind_and_key():
    schema = json_schema()
    # A class of the same name in another module, of another test, gives both longer names.
    named = [one.get("properties", {}) for one in schema["$defs"].values()]
    [toy] = [one for one in named if one.get("kind", {}).get("const") == "toy_train"]
    assert "from" in toy
    assert "start" not in toy


@pytest.mark.quick_cases(10)
@pytest.mark.parametrize("name", library())
def test_every_shipped_recipe_is_valid(name):
    recipe = load(name)
    assert graph.build(recipe)
    assert recipe.written.path.is_relative_to(LIBRARY)


EARLIER = """
name: earlier
seed: 1
stages:
  words: {kind: tokenizer, data: ./texts, vocabulary: 300}
  corpus: {kind: corpus, data: ./texts, tokenizer: words}
  base: {kind: pretrain, data: corpus, length: 64, learning_rate: {pace: 0.01}, tokens: 4k}
  wins: {kind: duel, from: base, against: base, data: ./texts, judge: [instructions]}
"""


def test_earlier_names_keep_working_and_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pretrain, "formerly", {"length": "context"})
    monkeypatch.setattr(LearningRate, "formerly", {"pace": "from"})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some words")
    path = tmp_path / "earlier.yaml"
    path.write_text(EARLIER)
    recipe = load(path)
    base = recipe.stages["base"]
    assert (base.context, base.learning_rate.start, recipe.stages["wins"].kind) == (64, 0.01, "compare")
    assert list(recipe.notices) == [
        "earlier.yaml:7: stages.base.length: `length` is called `context` now; both work.",
        "earlier.yaml:7: stages.base.learning_rate.pace: `pace` is called `from` now; both work.",
        "earlier.yaml:8: stages.wins.kind: `duel` is called `compare` now; both work.",
    ]
    # What is set on top wins, whichever name the file and the override use.
    assert load(path, ["base.context=32"]).stages["base"].context == 32
    assert load(path, ["base.length=32"]).stages["base"].context == 32
    prepare(path, tmp_path / "runs")
    assert "`duel` is called `compare` now" in capsys.readouterr().err


def test_an_earlier_name_beside_the_present_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Pretrain, "formerly", {"length": "context"})
    path = tmp_path / "both.yaml"
    path.write_text(EARLIER.replace("length: 64", "length: 64, context: 64").replace("pace", "from"))
    with pytest.raises(TriviumError, match=r"stages\.base: `length` is an earlier name of `context`"):
        load(path)
