# ruff: noqa: E501
"""Scorers of form: patterns, tags, JSON schemas, and instructions that a program can check."""

import json
from importlib.util import find_spec

import pytest
from test_grade_scorers import value

from trivium.grade.instructions import follows
from trivium.grade.schema import violation
from trivium.kit.errors import TriviumError


def test_form() -> None:
    tags = {"tags": ("think", "answer")}
    assert value("format", "<think>a</think>\n<answer>b</answer>", tags) == 1.0
    for text in (
        "<answer>b</answer><think>a</think>",
        "<think>a</think><think>b</think><answer>c</answer>",
        "<think></think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer></think>",
    ):
        assert value("format", text, tags) == 0.0, text
    assert value("format", "abc-12", {"pattern": r"[a-z]+-\d+"}) == 1.0
    assert value("format", "abc-12 and more", {"pattern": r"[a-z]+-\d+"}) == 0.0
    with pytest.raises(TriviumError, match="regular expression"):
        value("format", "a", {"pattern": "("})
    with pytest.raises(TriviumError, match="needs a pattern"):
        value("format", "a")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "uniqueItems": True, "maxItems": 3},
        "kind": {"enum": ["a", 1, None]},
        "size": {"oneOf": [{"type": "number", "multipleOf": 0.5}, {"const": "big"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "not": {"const": "bad"}}},
}


KEPT = [
    {"name": "A"}, {"name": "Ab", "age": 3.0}, {"name": "A", "tags": ["x", "y"]}, {"name": "A", "kind": None},
    {"name": "A", "size": 2.5}, {"name": "A", "size": "big"}, {"name": "A", "kind": 1, "age": 0},
]  # fmt: skip
BROKEN = [
    {}, {"name": ""}, {"name": "a"}, {"name": 3}, {"name": "A", "age": 150}, {"name": "A", "age": 1.5},
    {"name": "A", "age": True}, {"name": "A", "x": 1}, {"name": "A", "tags": ["x", "x"]}, [], None, "A",
    {"name": "A", "tags": ["bad"]}, {"name": "A", "kind": True}, {"name": "A", "size": 0.3},
    {"name": "A", "size": "small"}, {"name": "A", "tags": list("abcd")}, {"name": "A", "age": -1},
]  # fmt: skip


@pytest.mark.parametrize("given", [*KEPT, *BROKEN])
def test_json_schema(given: object) -> None:
    assert (violation(given, SCHEMA) is None) == (given in KEPT)
    assert value("format", json.dumps(given), {"schema": SCHEMA}) == float(given in KEPT)
    if find_spec("jsonschema"):
        import jsonschema

        assert jsonschema.Draft202012Validator(SCHEMA).is_valid(given) == (given in KEPT)


def test_exactly_one_form_is_not_any_of_them():
    both = [{"type": "number"}, {"type": "integer"}]
    assert [violation(value, {"anyOf": both}) is None for value in (3, 3.5, "3")] == [True, True, False]
    assert [violation(value, {"oneOf": both}) is None for value in (3, 3.5, "3")] == [False, True, False]


def test_schema_that_cannot_be_kept_is_not_passed_over() -> None:
    with pytest.raises(TriviumError, match="unevaluatedItems"):
        violation([], {"unevaluatedItems": False})
    assert value("format", "NaN", {"schema": {"type": "number"}}) == 0.0
    assert value("format", "[" * 50_000, {"schema": {}}) == 0.0


IFEVAL = [
    ("punctuation:no_comma", {}, "No comma here.", "One, two."),
    ("change_case:english_lowercase", {}, "all small.", "Not small."),
    ("change_case:english_capital", {}, "ALL LARGE.", "Not large."),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG day", "A day"),
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "Sunny and moon.", "Sunny day."),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "A sunny day.", "The Sun."),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "at least"}, "sun, Sunny", "sun, moon"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "less than"}, "Ab", "Aa"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "now three words"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One and two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen.",
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi. P.S. More.", "Hi, PS more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a*"),
    ("detectable_format:multiple_sections", {"section_spliter": "PART", "num_sections": 2}, "PART 1\na\nPART 2\nb", "PART 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A song>>\nla", "<< >> la"),
    ("combination:two_responses", {}, "yes\n******\nno", "yes\n******\nyes"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi!"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "The end. So."),
    ("startend:quotation", {}, '"All of it."', '"Part" of it.'),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Hund und die Katze", "This is not the dog"),
    ("language:response_language", {"language": "ru"}, "Привет, как дела", "Hello there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), IFEVAL)
def test_ifevals_instructions(name: str, arguments: dict, good: str, bad: str) -> None:
    row = {"instruction_id_list": [name], "kwargs": [{**arguments, "unused": None}]}
    assert value("instructions", good, **row) == 1.0
    assert value("instructions", bad, **row) == 0.0


def test_every_ifeval_check_is_tried_and_shares_add_up() -> None:
    from trivium.grade.ifeval import CHECKS

    assert {name for name, *_ in IFEVAL} == set(CHECKS)
    assert len(CHECKS) == 25
    both = [{"check": "punctuation:no_comma"}, {"check": "words", "arguments": {"count": 3}}]
    assert value("instructions", "one, two", {"partial": True}, checks=both) == 0.0
    assert value("instructions", "one two", {"partial": True}, checks=both) == 0.5
    assert value("instructions", "one two", checks=json.dumps(both)) == 0.0
    assert value("instructions", "Sure, here:\none two three", {"loose": True}, checks=both) == 1.0
    with pytest.raises(TriviumError, match="no check called"):
        follows("a", {"check": "nonsense"})
    with pytest.raises(TriviumError, match="arguments"):
        follows("a", {"check": "words", "arguments": {"amount": 3}})
