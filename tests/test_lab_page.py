"""The page: it claims no more than the numbers, needs nothing from outside, and can be used."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from lab import TASKS, collected, report_of, two_models

from trivium.lab import findings as sentence
from trivium.lab.charts import Axis, Line, Row, Rows, axis, environment, upper
from trivium.lab.compare import compare
from trivium.lab.compare_examples import examples, marked
from trivium.lab.findings import (
    by_steps,
    divergence,
    places,
)
from trivium.lab.formatting import figure
from trivium.lab.page import page
from trivium.lab.sections import skills


def interval(low: float, value: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high, "n": 50}


@pytest.mark.slow
def test_equal_models_are_called_equal_on_the_whole_table():
    """Two hundred pages of two models with the same skill at three tasks."""
    calm = 0
    for repeat in range(200):
        random = np.random.default_rng(repeat)
        right = {}
        for task in ("facts", "instructions", "craft"):
            skill = random.uniform(0.1, 0.9, 60)
            right[task] = {model: random.random(60) < skill for model in ("a", "b")}
        rows = report_of(collected(right, {"b": "a"}))["numbers"]["skills"]
        calm += all(row["changes"]["b"]["better"] is None for row in rows)
    assert calm / 200 >= 0.93


def test_a_real_gain_is_claimed_and_a_small_one_is_not():
    worse, better = np.arange(60) < 10, np.arange(60) < 45
    raw = collected(
        {"facts": {"a": worse, "b": better}, "craft": {"a": worse, "b": np.arange(60) < 12}}, {"b": "a"}
    )
    report = report_of(raw)
    told = sentence.stage_in_short(report["numbers"]["skills"], "b", "a")
    assert told == "better than a at facts; no difference shown in 1 other."
    text = page(report)
    assert text.count('class="better"') == 1
    assert 'class="worse"' not in text


def test_nothing_is_compared_where_different_things_were_asked():
    raw = collected({"facts": {"a": np.arange(40) < 9, "b": np.arange(40) < 39}}, {"b": "a"})
    raw["tasks"]["facts"]["models"]["b"]["records"][3]["id"] = "another"
    report = report_of(raw)
    assert report["numbers"]["skills"][0]["changes"] == {}
    assert "nothing" in sentence.stage_in_short(report["numbers"]["skills"], "b", "a")


def test_a_model_that_was_not_asked_and_one_without_a_case_have_cells_that_say_so():
    right = {"a": np.arange(40) < 9, "b": np.arange(40) < 39}
    raw = collected({"facts": right, "craft": {"b": np.arange(30) < 9}, "gsm8k": right}, {"b": "a"})
    for record in raw["tasks"]["gsm8k"]["models"]["a"]["records"]:
        del record["scores"]["accuracy"]
    report = report_of(raw)
    told = {row["task"]: row for row in skills(raw, report["numbers"])["rows"]}
    assert [cell["text"] for cell in told["craft"]["cells"]] == ["not asked", "30 %"]
    assert [cell["text"] for cell in told["gsm8k"]["cells"]] == ["no case", "98 %"]
    assert [told[task]["items"] for task in ("facts", "craft", "gsm8k")] == ["40", "30", "40"]
    assert "no case" in page(report)


@pytest.mark.parametrize(
    ("told", "claim"),
    [
        (lambda a, b: divergence([_pair("x", a), _pair("y", b)]), "more than any other step"),
        (lambda a, b: places([{"model": "x", "fifths": {"sums": [a, b]}}]), "greater in the first"),
        (lambda a, b: by_steps(
            {"models": {"m": {"written": {"by steps": {"1": a, "4": b}}}}}), "more often with 1"),
    ],
)  # fmt: skip
def test_an_order_is_claimed_only_where_intervals_lie_apart(told, claim):
    assert claim in told(interval(0.5, 0.6, 0.7), interval(0.1, 0.2, 0.3))
    assert claim not in told(interval(0.2, 0.6, 0.9), interval(0.1, 0.2, 0.3))


def _pair(name: str, kl: dict) -> dict:
    return {"model": name, "before": "base", "all": {"kl": kl}, "why_not": None}


def test_what_models_say_cannot_become_part_of_the_page():
    raw = collected({"facts": {"a": np.arange(4) < 2, "b": np.arange(4) < 3}}, {"b": "a"}, title="<b>title")
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    for record in raw["tasks"]["facts"]["models"]["b"]["records"]:
        record["answers"][0]["answer"] = evil
        record["expected"] = raw["tasks"]["facts"]["models"]["a"]["records"][0]["expected"] = evil
    text = page(report_of(raw))
    assert "<img" not in text
    assert "<b>title" not in text
    assert len(re.findall(r"<script", text)) == 2


def test_the_page_asks_nothing_from_outside(tmp_path: Path):
    compare(two_models(tmp_path), runs=tmp_path, to=tmp_path / "page.html", on=TASKS)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=[\"'](?!#)|url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    named = set(re.findall(r'href="#([\w-]+)"', text))
    identities = re.findall(r'\bid="([\w-]+)"', text)
    assert named <= set(identities)
    assert len(identities) == len(set(identities)), "every id stands once"


def test_examples_show_what_changed_first():
    raw = collected({"facts": {"a": np.array([1, 0, 0, 1]) > 0, "b": np.array([0, 1, 0, 1]) > 0}}, {"b": "a"})
    found = {one["id"]: one["why"] for one in examples(raw)}
    assert found == {
        "q1": "became right from a to b", "q0": "became wrong from a to b", "q2": "wrong in every model",
    }  # fmt: skip


@pytest.mark.parametrize("tasks", [1, 2, 5, 9])
def test_examples_of_all_kinds_stand_on_a_page_with_many_tasks(tasks: int):
    random = np.random.default_rng(tasks)
    names = ("facts", "craft", "tongue", "instructions", "sums", "sql", "gsm8k", "svamp", "own")[:tasks]
    raw = collected({task: {model: random.random(60) < 0.5 for model in "ab"} for task in names}, {"b": "a"})
    whys = [one["why"] for one in examples(raw)]
    shown = [
        sum(why.startswith(kind) for why in whys) for kind in ("became right", "became wrong", "wrong in")
    ]
    assert shown == [min(tasks, 3)] * 3
    assert len({one["task"] for one in examples(raw)}) == tasks


def test_an_answer_nobody_could_judge_is_neither_right_nor_wrong():
    raw = collected({"humaneval": {"a": np.arange(4) < 2, "b": np.arange(4) < 4}}, {"b": "a"})
    del raw["tasks"]["humaneval"]["models"]["a"]["records"][2]["scores"]["accuracy"]
    del raw["tasks"]["humaneval"]["models"]["b"]["records"][0]["scores"]["accuracy"]
    assert {one["id"]: one["why"] for one in examples(raw)} == {"q3": "became right from a to b"}
    raw["tasks"]["humaneval"]["models"] |= {"c": deepcopy(raw["tasks"]["humaneval"]["models"]["a"])}
    raw["models"].append({**raw["models"][0], "name": "c"})
    for record in raw["tasks"]["humaneval"]["models"]["c"]["records"]:
        record["scores"].pop("accuracy", None)
    text = page(report_of(raw))
    assert "? not judged" in text


def test_only_what_is_new_is_marked():
    pieces = marked("12 + 3 = 15", "12 + 4 = 16")
    assert "".join(text for text, _ in pieces) == "12 + 4 = 16"
    assert [text for text, new in pieces if new] == ["4", "16"]


def test_axes_hold_their_values_between_round_ticks_that_are_told_apart():
    """Whatever the range: a step of 1, 2 or 5, every multiple of it, one beyond each end at most."""
    chance = np.random.default_rng(0)
    drawn = [(low, low + 10 ** chance.uniform(-3, 4))
             for low in chance.uniform(-5, 5, 500) * 10.0 ** chance.integers(-4, 5, 500)]  # fmt: skip
    for low, high in [(0.0, 0.033), (-3.0, 12.0), (5.0, 5.0), (0.2, 1234.0), (2.3455, 2.3462), *drawn]:
        found = axis([high, low])
        ticks = np.array(found.ticks)
        assert 3 <= len(ticks) <= 6
        step = np.diff(ticks).mean()
        assert np.allclose(np.diff(ticks), step)
        leading = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(leading - one) for one in (1, 2, 5)) < 1e-6
        assert np.allclose(ticks / step, np.round(ticks / step))
        slack = step * 1e-6
        assert ticks[0] - slack <= found.low <= low
        assert high <= found.high <= ticks[-1] + slack
        assert low < ticks[1] + slack
        assert high > ticks[-2] - slack
        assert 0 <= found.place(low) <= found.place(high) <= 100
        assert len({found.write(one) for one in found.ticks}) == len(ticks)
    narrow = axis([2.3455, 2.3462])
    assert [narrow.write(one) for one in narrow.ticks] == ["2.3455", "2.3460", "2.3465"]
    assert [figure(one) for one in (0.00001, 12345, 0.5)] == ["<0.001", "12.3k", "0.5"]
    # A learning rate of 2e-5 was "<0.001" on the page.
    assert [figure(one, "setting") for one in (0.00002, 0.0005)] == ["2e−05", "0.0005"]


def test_an_interval_that_is_not_known_is_drawn_as_such():
    """Neither as the whole axis nor as no width: a bare dot, and a short dashed line for each open end."""
    scale = Axis(0.0, 1.0, (0.0, 0.5, 1.0))
    template = environment().from_string("{% import 'charts.jinja' as charts %}{{ charts.rows([group]) }}")

    def drawn(low: float | None, high: float | None) -> tuple[list[tuple[float, float]], list, bool, str]:
        row = Row("a", {"value": 0.5, "low": low, "high": high, "n": 3})
        shown = template.render(group=Rows("how many", [row], scale))
        lines = [
            [
                (float(a), float(b))
                for a, b in re.findall(rf'class="{kind}" x1="([\d.]+)%" x2="([\d.]+)%"', shown)
            ]
            for kind in ("range", "unknown")
        ]
        said = re.search(r'<span class="number"[^>]*>(.*?)</span>', shown)
        assert said is not None
        return *lines, 'class="value bare"' in shown, said[1]

    assert drawn(0.4, 0.7) == ([(40, 70)], [], False, "0.5 (0.4 to 0.7)")
    assert drawn(None, None) == ([], [(43, 50), (50, 57)], True, "0.5 (interval unknown)")
    assert drawn(0.4, None) == ([(40, 50)], [(50, 57)], False, "0.5 (0.4 to ?)")
    assert drawn(None, 0.7) == ([(50, 70)], [(43, 50)], False, "0.5 (? to 0.7)")
    # nor does an axis or a band reach to where nothing is known
    assert upper({"value": 0.5, "low": None, "high": None, "n": 3}) == 0.5
    points = [(0.0, 0.2, 0.1, 0.3), (0.5, 0.5, None, None), (1.0, 0.6, 0.5, 0.7)]
    assert Line("a", points).band(scale, scale) == "0.00,70.00 100.00,30.00 100.00,50.00 0.00,90.00"
    assert Line("a", points[1:2]).band(scale, scale) is None


# For every row of every group: whether name and number stand on one line, and the bar between them or below.
ASIDE = """
return [...document.querySelectorAll('.rows .name')].map(name => {
  const bar = name.nextElementSibling, number = bar.nextElementSibling
  const middle = one => { const box = one.getBoundingClientRect(); return (box.top + box.bottom) / 2 }
  return [name.textContent, Math.abs(middle(name) - middle(number)) < 4, middle(bar) > middle(name) - 4,
          middle(bar) - middle(name) < 40]
})"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 390])
def test_a_name_stands_beside_its_own_number(tmp_path: Path, width: int):
    """On a narrow page the names of a second group once slid up into the gaps of the first."""
    from browser import Browser

    names = ("a", "b", "c")
    scale = Axis(0.0, 1.0, (0.0, 0.5, 1.0))
    groups = [
        Rows(title, [Row(f"{title} {name}", interval(0.2, 0.5, 0.8)) for name in names], scale)
        for title in ("one", "two")
    ]
    template = (
        "{% import 'charts.jinja' as charts %}<style>{{ file('style.css') }}</style>"
        "<meta name='viewport' content='width=device-width'>{{ charts.rows(groups) }}"
        "<div class='example'><pre>{{ 'One line of a document. ' * 40 }}</pre></div>"
    )
    place = tmp_path / "page.html"
    place.write_text(environment().from_string(template).render(groups=groups), encoding="utf-8")
    browser = Browser(width=width)
    try:
        browser.go(place.as_uri())
        assert browser.run(ASIDE) == [
            [f"{title} {name}", True, True, True] for title in ("one", "two") for name in names
        ]
        # A document that was left out is wrapped.
        assert browser.run("return document.querySelector('.example pre').scrollWidth") <= width
    finally:
        browser.close()


@pytest.mark.slow
def test_the_page_can_be_read_and_filtered(tmp_path: Path):
    from browser import Browser

    random = np.random.default_rng(0)
    right = {task: {model: random.random(40) < share for model, share in (("a", 0.3), ("b", 0.6))}
             for task in ("facts", "instructions")}  # fmt: skip
    place = tmp_path / "page.html"
    place.write_text(page(report_of(collected(right, {"b": "a"}))), encoding="utf-8")
    for width in (1280, 390):
        browser = Browser(width=width)
        try:
            browser.go(place.as_uri())
            assert browser.run("return document.documentElement.scrollWidth") <= width
            wrong = int(browser.run("return document.getElementById('count').textContent").split()[2])
            assert wrong == int((~right["facts"]["b"]).sum())
            browser.run(
                "const s = document.querySelector('[name=verdict]'); s.value = 'gained';"
                "s.dispatchEvent(new Event('input', {bubbles: true}))"
            )
            gained = int(browser.run("return document.getElementById('count').textContent").split()[2])
            assert gained == int((right["facts"]["b"] & ~right["facts"]["a"]).sum())
            assert browser.log() == []
        finally:
            browser.close()
