"""Recipes that YAML reads as far more than is written, or not at all, end in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from trivium.kit.errors import TriviumError
from trivium.pipeline.run import prepare
from trivium.recipe.read import read
from trivium.recipe.yaml_text import parse

STAGE = "stages: {words: {kind: tokenizer, data: ./r.yaml, vocabulary: 300"


def doubled(line: str, times: int = 40) -> str:
    """A chain of anchors, each of which stands for the one before twice."""
    return "\n".join(line.format(new=f"a{number + 1}", old=f"a{number}") for number in range(times))


FAULTS = {
    "lists that double": (
        f"a0: &a0 [x]\n{doubled('{new}: &{new} [*{old}, *{old}]')}\n",
        "more than 100,000 values",
    ),
    "mappings that double": (
        f"a0: &a0 {{x: y}}\n{doubled('{new}: &{new} {{b: *{old}, c: *{old}}}')}\n",
        "more than 100,000 values",
    ),
    "merges that double": (
        f"a0: &a0 {{x: y}}\n{doubled('{new}: &{new} {{<<: [*{old}, *{old}]}}')}\n",
        "more than 100,000 values",
    ),
    "a list that holds itself": ("a: &a [*a]\n", "stands for something that holds itself"),
    "a mapping that merges itself": ("a: &a {<<: *a}\n", "stands for something that holds itself"),
    "brackets in brackets": ("a: " + "[" * 3000, "nested more than 64 deep"),
    "mappings in mappings": (
        "".join(f"{' ' * depth}a:\n" for depth in range(90)),
        "nested more than 64 deep",
    ),
    "aliases that go deep": (
        "a0: &a0 [x]\n" + doubled("{new}: &{new} [*{old}]", 90),
        "nested more than 64 deep",
    ),
    "a day that is not": ("a: 2024-02-31\n", "a value that YAML cannot read .* quote it"),
    "a number of 5,000 digits": (f"a: {'1' * 5000}\n", "a value that YAML cannot read .* quote it"),
    "a letter that is not": ('a: "\\UFFFFFFFF"\n', "a value that YAML cannot read .* quote it"),
    "a list as a key": ("? [a]\n: b\n", "r.yaml:1 is not valid YAML: a key has to be a word or a number"),
    "a mapping as a key": (
        "? {a: b}\n: c\n",
        "r.yaml:1 is not valid YAML: a key has to be a word or a number",
    ),
    "more than a recipe": ("# " + "a" * 200_000, "longer than 131,072 characters"),
    "an object of Python": ("a: !!python/object/apply:os.system [true]\n", "r.yaml:1 is not valid YAML"),
    "a tag that does not fit": ("a: !!timestamp x\n", "a value that YAML cannot read .* quote it"),
    "another tag that does not fit": ("a: !!bool x\n", "a value that YAML cannot read .* quote it"),
    "no YAML": ("a: \0", "r.yaml is not valid YAML"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_sentence_and_nothing_else(fault: str, tmp_path: Path) -> None:
    text, said = FAULTS[fault]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(TriviumError, match=said) as caught:
        prepare(tmp_path / "r.yaml", tmp_path / "runs")
    assert "r.yaml" in str(caught.value)


def test_an_anchor_may_be_used_often(tmp_path: Path) -> None:
    text = "a: &a {x: 1}\nb: [" + ", ".join(["*a"] * 1000) + "]\n"
    content, lines = parse(text, "r.yaml")
    assert content["b"] == [{"x": 1}] * 1000
    assert lines["a", "x"] == 1


@pytest.mark.parametrize("setting", ["words.vocabulary=[" + "[" * 3000, "words.vocabulary=2024-02-31"])
def test_what_is_set_is_read_in_the_same_way(setting: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(STAGE + "}}")
    with pytest.raises(TriviumError, match=r"--set words\.vocabulary=.* is not valid YAML; quote the value"):
        read(tmp_path / "r.yaml", [setting])


@pytest.mark.parametrize("stages", ["5", "[a]", "words", "true"])
def test_stages_that_are_no_mapping_are_not_set(stages: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"stages: {stages}")
    with pytest.raises(TriviumError, match=r"`stages` is .*, not a mapping"):
        read(tmp_path / "r.yaml", ["words.vocabulary=300"])


def test_a_place_in_a_list_is_a_plain_number(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("stages: {a: {kind: evaluate, tasks: [x, y]}}")
    with pytest.raises(TriviumError, match="a list of 2 has no place `²`"):
        read(tmp_path / "r.yaml", ["a.tasks.²=z"])


def test_a_recipe_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(TriviumError, match=r"r\.yaml is not valid YAML"):
        read(tmp_path / "r.yaml")


def test_half_a_sign_is_refused_with_its_line():
    with pytest.raises(TriviumError, match=r"r\.yaml:2 holds half of a sign"):
        parse('name: r\nnote: "\\ud800"\n', "r.yaml")
    assert parse('note: "\U0001f600"', "r.yaml")[0] == {"note": "\U0001f600"}
