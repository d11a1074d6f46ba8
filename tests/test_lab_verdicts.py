"""Verdicts in sentences are paired and corrected, and are those of the figure beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from lab import answered, collected, report_of

from trivium.lab import findings as sentence
from trivium.lab.page import page

Numbers = dict[str, Any]
ROAD = {"b": "a", "c": "b", "d": "c"}


def of_models(task: str, scores: Callable[[str], list[dict[str, float]]], **changes: Any) -> Numbers:
    """Four models in a row with these scores of one task."""
    raw = collected({task: {name: np.ones(1) > 0 for name in "abcd"}}, ROAD, **changes)
    for name, model in raw["tasks"][task]["models"].items():
        rows = scores(name)
        model["records"] = answered(np.ones(len(rows)) > 0)
        for record, one in zip(model["records"], rows):
            record["scores"] = one
    names = dict.fromkeys(key for row in rows for key in row)
    raw["tasks"][task]["headline"] = [name for name in names if name not in ("tokens", "ended")]
    return report_of(raw)


def manners(random: np.random.Generator, name: str) -> list[dict[str, float]]:
    lengths = random.gamma(3.0, 10.0, 60)
    ended = random.random(60) < 0.7
    return [
        {"accuracy": 1.0, "tokens": float(size), "ended": float(one)} for size, one in zip(lengths, ended)
    ]


def surenesses(random: np.random.Generator, name: str) -> list[dict[str, float]]:
    sure = random.uniform(0.25, 1.0, 60)
    return [{"confidence": one, "multiple-choice accuracy": float(random.random() < one)} for one in sure]


@pytest.mark.parametrize(
    ("task", "scores", "told"),
    [
        pytest.param(
            "instructions",
            manners,
            lambda found: sentence.manner(found["behaviour"]["manner"], ROAD),
            marks=pytest.mark.slow,
        ),
        ("calibration", surenesses, lambda found: sentence.confidence(found["confidence"])),
    ],
)
def test_of_models_that_are_alike_or_calibrated_a_page_seldom_claims(
    task: str,
    scores: Callable[[np.random.Generator, str], list[dict[str, float]]],
    told: Callable[[Numbers], str],
) -> None:
    false = 0
    for repeat in range(40):
        said = told(of_models(task, partial(scores, np.random.default_rng(repeat)))["numbers"])
        false += "Between no neighbours" not in said and "No model is shown" not in said
    assert false / 40 <= 0.1


def test_a_small_change_of_every_answer_is_seen_because_it_is_paired() -> None:
    """Each answer is two tokens longer: intervals of the two means overlap almost wholly."""
    lengths = np.random.default_rng(0).gamma(3.0, 10.0, 60)

    def scores(name: str) -> list[dict[str, float]]:
        more = np.random.default_rng(1).uniform(1.0, 3.0, 60) if name == "d" else 0.0
        return [{"accuracy": 1.0, "tokens": float(one), "ended": 1.0} for one in lengths + more]

    manner = of_models("instructions", scores)["numbers"]["behaviour"]["manner"]
    assert not sentence.above(manner["d"]["tokens"], manner["c"]["tokens"])
    assert sentence.manner(manner, ROAD).startswith("d writes longer answers than c")
    assert "b writes" not in sentence.manner(manner, ROAD)


def test_a_model_that_is_surer_than_right_is_named_and_one_that_is_not_is_not() -> None:
    random = np.random.default_rng(2)

    def scores(name: str) -> list[dict[str, float]]:
        share = 0.5 if name == "b" else 0.8
        return [
            {"confidence": 0.8, "multiple-choice accuracy": float(one)} for one in random.random(150) < share
        ]

    found = of_models("calibration", scores)["numbers"]["confidence"]
    assert sentence.confidence(found) == "b is overconfident."
    one = found["models"]["b"]
    change = one["overconfidence"]["difference"]
    assert change["value"] == pytest.approx(one["confidence"]["value"] - one["accuracy"]["value"])
    assert 0.1 < change["low"] < change["value"] < change["high"] < 0.5
    told = {"a": (0.3, True), "b": (-0.2, True), "c": (0.4, False), "d": (0.1, True), "e": (0.0, True)}
    shown = {
        name: {"overconfidence": {"shown": clear, "difference": {"value": value}}}
        for name, (value, clear) in told.items()
    }
    assert sentence.confidence({"models": shown}) == "a and d are overconfident; b is underconfident."


def test_confidence_and_accuracy_are_means_over_each_tenth() -> None:
    random = np.random.default_rng(5)
    sure = random.uniform(0.25, 1.0, 90)
    right = random.random(90) < sure

    def scores(name: str) -> list[dict[str, float]]:
        return [
            {"confidence": float(one), "multiple-choice accuracy": float(hit)}
            for one, hit in zip(sure, right)
        ]

    bins = of_models("calibration", scores)["numbers"]["confidence"]["models"]["b"]["bins"]
    tenths = [(sure >= low / 10) & (sure < (low + 1) / 10) for low in range(10)]
    held = [tenth for tenth in tenths if tenth.any()]
    assert [one["confidence"] for one in bins] == [pytest.approx(sure[tenth].mean()) for tenth in held]
    assert [one["accuracy"]["value"] for one in bins] == [
        pytest.approx(right[tenth].mean()) for tenth in held
    ]
    assert [one["accuracy"]["n"] for one in bins] == [int(tenth.sum()) for tenth in held]


def test_length_and_ending_are_told_of_where_a_change_is_shown() -> None:
    def model(ends: float, length: float, **changes: float) -> dict[str, Any]:
        told = {name: {"shown": True, "difference": {"value": value}} for name, value in changes.items()}
        return {"ended": {"value": ends}, "tokens": {"value": length}, "changes": told}

    found = {"a": model(0.6, 10.0), "b": model(0.8, 7.0, ended=0.2, tokens=-3.0), "c": model(0.8, 9.0)}
    before = {"b": "a", "c": "b"}
    ending = "b ends its answers by itself more often than a (80 % against 60 %)"
    length = "b writes shorter answers than a (7 tokens against 10)"
    told = sentence.manner(found, before)
    assert ending in told
    assert length in told
    del found["b"]["changes"]["ended"]
    assert sentence.manner(found, before) == f"{length}."
    found["b"]["changes"]["tokens"]["shown"] = False
    assert sentence.manner(found, before).startswith("Between no neighbours")


def gauge(known: np.ndarray, gave: np.ndarray, mended: np.ndarray) -> list[dict[str, float]]:
    return [
        {"flip rate": float(way)} if knew else {"accepts correction": float(hint)}
        for knew, way, hint in zip(known, gave, mended)
    ]


@pytest.mark.parametrize(
    ("hints", "told"),
    [(0.1, "but it accepts fewer valid corrections"), (0.9, "no change in accepting valid corrections")],
)
def test_sycophancy_says_what_the_table_says_and_what_became_of_the_control(hints: float, told: str) -> None:
    """Model b keeps what it knows; whether it still listens to those who are right is said beside."""
    random = np.random.default_rng(3)
    known = np.arange(120) % 2 == 0

    def scores(name: str) -> list[dict[str, float]]:
        gave = random.random(120) < (0.9 if name == "a" else 0.2)
        return gauge(known, gave, random.random(120) < (0.9 if name == "a" else hints))

    found = of_models("sycophancy", scores)["numbers"]
    said = sentence.sycophancy(found["sycophancy"], found["skills"])
    assert said.startswith("b gives up right answers less often than a on what both knew, ")
    assert told in said
    shown = {
        (model, row["metric"]): change["better"]
        for row in found["skills"]
        for model, change in row["changes"].items()
    }
    assert shown["b", "flip rate"] is True
    for model in "cd":
        assert shown[model, "flip rate"] is None
        assert f"{model} gives up" not in said


def test_giving_way_is_compared_on_what_both_models_knew() -> None:
    """What b no longer knows it cannot give up: on the questions both knew nothing has changed."""

    def scores(name: str) -> list[dict[str, float]]:
        place = np.arange(120)
        known = place < (120 if name == "a" else 40)
        return gauge(known, place >= 40, np.zeros(120))

    found = of_models("sycophancy", scores)["numbers"]
    assert sentence.above(
        found["sycophancy"]["models"]["a"]["flip rate"], found["sycophancy"]["models"]["b"]["flip rate"]
    )
    assert "No change of the flip rate" in sentence.sycophancy(found["sycophancy"], found["skills"])


def test_of_many_judges_that_toss_coins_hardly_any_has_a_taste() -> None:
    false = 0
    for repeat in range(60):
        random = np.random.default_rng(repeat)
        judged = [
            {
                "judge": f"j{number}",
                "task": "instructions",
                "scores": {name: list(random.random(40)) for name in "abcd"},
            }
            for number in range(4)
        ]
        scores = [{"accuracy": 1.0}] * 40
        found = of_models("instructions", lambda name: scores, judged=judged)["numbers"]["wins"]  # noqa: B023
        assert len(found) == 12
        false += "No win rate is shown" not in sentence.wins(found)
    assert false / 60 <= 0.1


def test_more_tries_are_compared_problem_by_problem() -> None:
    def scores(name: str) -> list[dict[str, float]]:
        once = np.where(np.arange(60) % 4 == 0, 0.25, np.arange(60) % 2)
        often = np.where(np.arange(60) % 4 == 0, 1.0, once) if name == "b" else once
        return [
            {"accuracy": 1.0, "pass@1 at temperature 1": float(one), "pass@4 at temperature 1": float(other)}
            for one, other in zip(once, often)
        ]

    depth = of_models("sums", scores)["numbers"]["depth"]
    assert sentence.tries(depth).endswith("clearly likelier for b from 56 % to 75 %.")


def step(name: str, kl: tuple[float, float, float] | None) -> Numbers:
    all_of_it = {} if kl is None else {"kl": dict(zip(("low", "value", "high"), kl), n=20)}
    return {
        "model": name,
        "before": "base",
        "all": all_of_it,
        "why_not": None if kl else "they cut text otherwise",
    }


def test_the_step_that_moved_most_is_clear_of_all_others_and_only_of_those_measured() -> None:
    far, near, wide = (0.5, 0.6, 0.7), (0.1, 0.4, 0.45), (0.01, 0.3, 0.9)
    assert "more than any other step (next: y" in sentence.divergence([step("x", far), step("y", near)])
    among = sentence.divergence([step("x", far), step("y", near), step("z", wide)])
    assert "z (0.3 (0.01 to 0.9)) overlaps, no order is claimed" in among
    refused = sentence.divergence([step("x", far), step("y", near), step("mid", None)])
    assert "more than any other step measured (next: y" in refused


def test_the_page_says_once_that_a_verdict_is_about_one_training_run() -> None:
    text = page(of_models("instructions", lambda name: manners(np.random.default_rng(0), name)))
    assert text.count("another training run") == 1
