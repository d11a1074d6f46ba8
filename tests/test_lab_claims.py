"""Sentences of the page over many simulated pages: what is alike is seldom told apart, however many looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from lab import collected, report_of

from trivium.lab import findings as sentence
from trivium.lab.compare_numbers import apart_by, passkey, records_of
from trivium.lab.page import page as page_from

Right = dict[str, np.ndarray]


def page_of(task: str, right: Right, groups: Callable[[int], dict[str, str]], before: dict[str, str]) -> Any:
    """A collection of one task whose items belong to these groups, and its records."""
    raw = collected({task: right}, before)
    for model in raw["tasks"][task]["models"].values():
        for place, record in enumerate(model["records"]):
            record["groups"] = groups(place)
    return raw, {task: {model: records_of(raw, task, model) for model in right}}


def told_of_kinds(right: np.ndarray, kinds: int) -> str:
    raw, answers = page_of("instructions", {"m": right}, lambda place: {"kind": f"k{place % kinds}"}, {})
    return sentence.helpfulness(apart_by(raw, answers, "instructions", "kind", "accuracy"))


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(("share", "kinds", "each"), [(0.5, 16, 6), (0.7, 16, 6), (0.3, 16, 6), (0.5, 12, 8)])
def test_among_kinds_that_are_alike_an_order_is_seldom_claimed(share: float, kinds: int, each: int) -> None:
    claims = 0
    for repeat in range(100):
        right = np.random.default_rng(repeat).random(kinds * each) < share
        claims += "more often than" in told_of_kinds(right, kinds)
    assert claims / 100 <= 0.09


def test_a_kind_that_is_never_followed_beside_one_that_always_is_gives_an_order() -> None:
    right = np.arange(96) % 4 != 0
    told = told_of_kinds(right, 16)
    assert "more often than" in told
    assert "0 % of 6" in told


def told_of_keys(right: Right) -> str:
    def groups(place: int) -> dict[str, str]:
        length, depth = (128, 256, 512)[place % 3], place // 3 % 4
        return {"length": str(length), "length and depth": f"{length} {depth / 4:g}", "kind": "passkey"}

    raw, answers = page_of("passkey", right, groups, {})
    (found,) = passkey(raw, answers)
    return sentence.passkey(found)


def test_keys_found_every_other_time_are_seldom_called_found() -> None:
    """Twelve cells of five keys for each of three models."""
    claims = 0
    for repeat in range(200):
        random = np.random.default_rng(repeat)
        claims += "clearly" in told_of_keys({name: random.random(60) < 0.5 for name in ("a", "b", "c")})
    assert claims / 200 <= 0.06


def test_keys_are_found_up_to_the_length_before_the_first_that_fails() -> None:
    short = np.arange(60) % 3 == 0
    long = np.arange(60) % 3 == 2
    assert "by m up to 128 tokens (100 % of 20 there)" in told_of_keys({"m": short | long})
    assert "not even in the shortest" in told_of_keys({"m": long})
    assert "m up to 512 tokens" in told_of_keys({"m": np.ones(60) > 0})


def test_kinds_of_hidden_things_and_several_tasks_stay_apart() -> None:
    right = {"m": np.arange(60) % 2 == 0}

    def groups(place: int) -> dict[str, str]:
        kind = "passkey" if place % 2 == 0 else "needle"
        return {"length": "128", "length and depth": f"128 {place % 4 // 2}", "kind": kind}

    raw, answers = page_of("passkey", right, groups, {})
    again, more = page_of("passkey", {"m": np.zeros(12) > 0}, groups, {})
    raw["tasks"]["keys"] = again["tasks"]["passkey"]
    answers["keys"] = more["passkey"]
    parts = passkey(raw, answers)
    assert [(one["task"], one["kind"]) for one in parts] == [
        ("passkey", "passkey"), ("passkey", "needle"), ("keys", "passkey"), ("keys", "needle"),
    ]  # fmt: skip
    found = [{cell: one["value"] for cell, one in part["models"]["m"].items()} for part in parts]
    assert found == [{"128 0": 1, "128 1": 1}, *[{"128 0": 0, "128 1": 0}] * 3]
    numbers = report_of(raw)["numbers"]
    page = page_from({"collected": raw, "numbers": {**numbers, "passkey": parts}})
    page = page[page.index('<section id="long_context"') : page.index('<section id="answers"')]
    assert page.count('<table class="heat">') == 4
    assert page.count("A pass key is hidden") == 2
    assert page.count("by m up to 128 tokens") == 1
