"""`decontaminate: {against: recipe}`: what a recipe measures on is found in what it learns from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from curating import rows, write_lines

import trivium
from trivium.curate.examination import items_of
from trivium.data.sources import read_documents
from trivium.data.split import in_validation, text_hash
from trivium.evals.examined import examined
from trivium.evals.settings import Settings
from trivium.evals.task import task_names
from trivium.kit.errors import TriviumError
from trivium.pipeline.bundle import write_bundle
from trivium.pipeline.plan import planned
from trivium.recipe import graph, schema

AGAINST_RECIPE = [{"decontaminate": {"against": "recipe"}}]
TINY = {"depth": 1, "width": 32, "head_width": 16, "heads": 2, "inner_width": 32}
ASKED = "Which capital of Peru lies by the sea?"
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def poem(number: int) -> str:
    """A text that shares no five words with that of another number."""
    return " ".join(f"{NUMBERS[number % 10]}{number}{letter}" for letter in "abcdefghij")


def written(folder: Path, **changes: Any) -> Path:
    """A recipe of a curation, a training with something held out, and an evaluation."""
    write_lines(
        folder / "exam.jsonl", [{"question": "Which capital of Peru lies by the sea?", "answer": "Lima"}]
    )
    write_lines(folder / "poems.jsonl", [poem(number) for number in range(40)])
    leak = f"Somebody asks: {ASKED} It is Lima."
    write_lines(folder / "raw.jsonl", [leak, "a text of its own", *(poem(number) for number in range(40))])
    stages: dict[str, Any] = {
        "web": {"kind": "curate", "data": "./raw.jsonl", "steps": AGAINST_RECIPE},
        "words": {"kind": "tokenizer", "data": "web", "vocabulary": 300},
        "base": {
            "kind": "pretrain", "data": {"web": {}, "./poems.jsonl": {"validation": 0.3}},
            "tokenizer": "words", "model": TINY, "context": 64, "batch": 256, "steps": 1,
        },
        "asked": {"kind": "evaluate", "from": "base", "on": [{"task": "own", "data": "./exam.jsonl"}]},
    }  # fmt: skip
    stages |= changes
    recipe = {"name": "clean", "stages": {name: one for name, one in stages.items() if one is not None}}
    place = folder / "r.yaml"
    place.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return place


def fingerprint(place: Path) -> str:
    return graph.build(schema.load(place))["web"].fingerprint


def against(place: Path, stage: str = "web") -> list[str]:
    """The places of what a stage of a recipe searches for."""
    [step] = schema.load(place).stages[stage].steps  # type: ignore[attr-defined]
    return [one["path"] for one in step["decontaminate"]["against"]]


def test_questions_and_what_is_held_out_are_left_out(tmp_path: Path) -> None:
    place = written(tmp_path)
    trivium.run(place, runs=tmp_path / "runs", only=["web"])
    folder = tmp_path / "runs" / "clean" / "web"
    held = [
        one.text
        for one in read_documents(str(tmp_path / "poems.jsonl"))
        if in_validation(text_hash(one), 0.3)
    ]
    assert 0 < len(held) < 40
    gone = [row["text"] for row in rows(folder / "dropped")]
    assert gone[0].startswith("Somebody asks")
    assert sorted(gone[1:]) == sorted(held)


def test_a_share_that_holds_out_nothing_leaves_out_nothing(tmp_path: Path) -> None:
    place = written(tmp_path, asked=None)
    write_lines(tmp_path / "poems.jsonl", [poem(1)])
    trivium.run(place, runs=tmp_path / "runs", only=["web"])
    assert len(rows(tmp_path / "runs" / "clean" / "web" / "data")) == 42


def test_what_is_replayed_or_watched_is_measured_as_well(tmp_path: Path) -> None:
    for name in ("old", "seen"):
        write_lines(tmp_path / f"{name}.jsonl", [poem(1)])
    replay = {"share": 0.2, "data": "./old.jsonl"}
    mid = {
        "kind": "midtrain",
        "from": "base",
        "data": "web",
        "replay": replay,
        "watch": "./seen.jsonl",
        "steps": 1,
    }
    found = {"./exam.jsonl", "./poems.jsonl", "./old.jsonl", "./seen.jsonl"}
    assert set(against(written(tmp_path, mid=mid | {"watch": "./seen.jsonl"}))) == found


def test_another_examination_is_another_curation(tmp_path: Path) -> None:
    place = written(tmp_path)
    before = fingerprint(place)
    asked = {"kind": "evaluate", "from": "base", "on": [{"task": "own", "data": "./exam.jsonl"}]}
    assert fingerprint(written(tmp_path, asked={**asked, "asking": {"max_new_tokens": 9}})) == before
    assert fingerprint(written(tmp_path, asked={**asked, "on": [*asked["on"], "facts"]})) != before
    written(tmp_path)
    write_lines(tmp_path / "exam.jsonl", [{"question": ASKED.replace("Peru", "Chile")}])
    assert fingerprint(place) != before


def test_a_bundle_makes_the_same_curation_again(tmp_path: Path) -> None:
    place = written(tmp_path)
    trivium.run(place, runs=tmp_path / "runs", only=["web"])
    write_bundle(tmp_path / "runs", "clean/web", tmp_path / "bundle")
    assert fingerprint(tmp_path / "bundle" / "recipe.yaml") == fingerprint(place)


def test_the_plan_says_what_is_searched_for(tmp_path: Path) -> None:
    found = planned(written(tmp_path), tmp_path / "runs").numbers["web"]["decontaminated against"]
    assert found == "./exam.jsonl; 0.3 of ./poems.jsonl"


def test_a_recipe_that_measures_on_nothing_is_one_sentence(tmp_path: Path) -> None:
    place = written(tmp_path, asked=None, base=None)
    with pytest.raises(TriviumError, match=r"stages\.web\.steps\.0.*measures on.*add an `evaluate` stage"):
        schema.load(place)


def test_what_is_made_of_the_curation_is_left_out(tmp_path: Path) -> None:
    other = {"kind": "curate", "data": "./poems.jsonl", "steps": AGAINST_RECIPE}
    corpus = {"kind": "corpus", "data": ["web", "other"], "tokenizer": "words"}
    place = written(tmp_path, other=other, corpus=corpus)
    assert against(place) == against(place, "other") == ["./exam.jsonl", "./poems.jsonl"]
    graph.build(schema.load(place))


def test_rows_for_fine_tuning_are_cleaned_by_a_synthesis_without_a_teacher(tmp_path: Path) -> None:
    chats = {"kind": "synthesize", "data": "./chats.jsonl", "steps": AGAINST_RECIPE}
    said = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (
            ("Which capital of Peru lies by the sea?", "Lima"),
            ("How are you?", "Well."),
        )
    ]
    write_lines(tmp_path / "chats.jsonl", [{"messages": one} for one in said])
    place = written(tmp_path, chats=chats)
    trivium.run(place, runs=tmp_path / "runs", only=["chats"])
    kept = (tmp_path / "runs" / "clean" / "chats" / "data" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"][0]["content"] for line in kept] == ["How are you?"]


def test_every_seed_of_an_experiment_is_searched_for_what_it_is_asked(tmp_path: Path) -> None:
    place = written(tmp_path, asked={"kind": "evaluate", "from": "base", "on": ["sums"]})
    recipe = yaml.safe_load(place.read_text())
    recipe["experiment"] = {
        "seeds": 2,
        "arms": {"plain": None, "longer": {"base": {"steps": 2}}, "shorter": {"base": {"context": 32}}},
        "measure": {"right": {"stage": "asked", "take": "sums: accuracy"}},
        "claims": [
            {
                "says": "more",
                "on": "right",
                "arm": "longer",
                "against": "plain",
                "above": 0,
                "control": "shorter",
            }
        ],
    }
    place.write_text(yaml.safe_dump(recipe, sort_keys=False))
    found = schema.load(place).stages
    assert {name for name in found if name.startswith("web")} == {"web.1", "web.2"}
    assert "world:sums?seed=2&limit=200" in against(place, "web.2")


EXAMPLES = {
    "calibration": "calibration?source=craft",
    "bits": "bits?sources=prose",
    "first_error": {"task": "first_error", "model": "./judge"},
    "positions": "positions?source=prose",
}
ELSEWHERE = {"passkey", "conversation", "pictures", "sounds"}
"""Tasks whose questions are made for the model, or are nothing without a picture or a sound."""


@pytest.mark.parametrize("name", task_names())
def test_every_task_says_what_it_asks(tmp_path: Path, name: str) -> None:
    data = write_lines(
        tmp_path / "rows.jsonl", [{"Body": "Two and two.", "Question": "How many?", "Answer": 4}]
    )
    needs = ("gsm8k", "svamp", "humaneval", "own", "replies", "pairs")
    spec = {"task": name, "data": str(data)} if name in needs else EXAMPLES.get(name, name)
    found = examined([spec], Settings(limit=3, seed=5)).sets
    assert bool(found) == (name not in ELSEWHERE)
    for one in found if name not in needs else []:
        assert len(list(items_of(one, None))) == 3
    if name == "svamp":
        assert next(items_of(found[0], None))[1:] == ["Two and two. How many?", "4"]


def test_what_is_not_known_here_is_said(tmp_path: Path) -> None:
    pairs = {"task": "pairs", "data": "./exam.jsonl", "held_out": 0.1}
    place = written(tmp_path, asked={"kind": "evaluate", "from": "base", "on": ["facts", pairs]})
    [notice] = schema.load(place).notices
    assert "cannot search for the questions of `pairs`" in notice
