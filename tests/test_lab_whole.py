"""The page of a whole recipe, with every figure it can have: what it says, and how it looks in a browser."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
from lab import report_of
from lab_whole import BEFORE, whole

from trivium.lab import findings as sentence
from trivium.lab.compare import summary_table
from trivium.lab.formatting import with_ci
from trivium.lab.page import page


def interval(low: float, value: float, high: float) -> dict:
    return {"value": value, "low": low, "high": high, "n": 50}


LOW, HIGH, WIDE = interval(0.1, 0.2, 0.3), interval(0.5, 0.6, 0.7), interval(0.1, 0.6, 0.9)


def _of(name: str, x: dict, y: dict) -> dict:
    return {"x": {name: x}, "y": {name: y}}


def _pair(before: dict, after: dict) -> list[dict]:
    return [{"model": "y", "kinds": {"chat": {"entropy before": before, "entropy": after}}}]


@pytest.fixture(scope="module")
def text() -> str:
    return page(report_of(whole()))


def test_every_figure_has_a_sentence(text: str):
    for title in re.findall(r"<h[23][^>]*>(.*?)</h[23]>", text):
        if title in (
            "Steps written",
            "Length, ending and form of the answers",
            "Distance from the model before",
        ):
            after = text.split(f"{title}</h3>")[1].split("<figure>")[0]
            assert 'class="see"' in after, title
    for figure in (
        "Several answers (pass@k)",
        "Where in the text they differ",
        "Win rate under a reward model",
        "64 tokens",
    ):
        assert figure in text, figure


@pytest.mark.parametrize(
    ("told", "claim"),
    [
        (lambda a, b: sentence.work(_of("steps", b, a), {"y": "x"}), "more steps than"),
        (lambda a, b: sentence.work(_of("valid steps", a, b), {"y": "x"}), "hold less often than"),
        (lambda a, b: sentence.work(_of("tokens per right answer", a, b), {"y": "x"}), "fewer tokens"),
        (lambda a, b: sentence.form(_of("in form", b, a), {"y": "x"}), "form more often"),
        (lambda a, b: sentence.form(_of("in form", a, b), {"y": "x"}), "form less often"),
        (lambda a, b: sentence.entropy(_pair(a, b)), "narrower for y on chat"),
        (lambda a, b: sentence.entropy(_pair(b, a)), "wider for y on chat"),
    ],
)  # fmt: skip
def test_work_form_and_entropy_claim_an_order_only_where_intervals_lie_apart(told, claim):
    assert claim in told(HIGH, LOW)
    assert claim not in told(WIDE, LOW)


def test_sameness_is_told_with_its_interval():
    told = sentence.form({"x": {}, "y": {"same": LOW}}, {"y": "x"})
    assert told.endswith("Answers are the same word for word in 20 % (10–30 %) of y's to x's.")


def test_every_number_comes_with_what_it_rests_on(text: str):
    report = report_of(whole())
    cells = re.findall(r'<td class="(?:better|worse|)"[^>]*>', text)
    assert cells
    assert all(re.search(r'title="n \d+"', cell) for cell in cells)
    spans = re.findall(r'<span class="number"[^>]*>', text)
    assert spans
    assert all(re.search(r'title="n \d+"', span) for span in spans)
    intervals = [
        cell for cell in re.findall(r"<td>([^<]*)</td>", text) if re.search(r"\(.*(–|to ).*\)", cell)
    ]
    differences = {with_ci(change["difference"]) for row in report["numbers"]["skills"]
                   for change in row["changes"].values()}  # fmt: skip
    assert intervals
    bare = [unescape(one) for one in intervals if ", n " not in one and unescape(one) not in differences]
    # What stages measured themselves has a column of its own for it.
    assert set(bare) <= {"1.2 (1.1 to 1.3)"}
    rows = summary_table(report)
    assert rows[0][-1] == "n"
    assert rows[1][-1] == "60"


def test_written_and_at_once_are_told_apart_where_both_were_asked():
    both, alone = page(report_of(whole())), page(report_of(whole(at_once=False)))
    assert "once for the result alone" in both
    assert 'class="key"' in both
    assert "direct answer</span>" in both
    assert "once for the result alone" not in alone
    assert "direct answer</span>" not in alone
    found = report_of(whole(at_once=False))["numbers"]["depth"]
    assert "writing them down helps" not in sentence.by_steps(found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_with_all_figures_fits_and_draws_them_in_a_browser(tmp_path: Path, width: int, text: str):
    from browser import Browser

    place = tmp_path / "page.html"
    place.write_text(text, encoding="utf-8")
    browser = Browser(width=width)
    try:
        browser.go(place.as_uri())
        assert browser.run("return document.documentElement.scrollWidth") <= width
        assert browser.run("return document.querySelector('h1').getBoundingClientRect().top") >= 24
        sizes = """
            const found = {};
            for (const [name, query] of Object.entries({
                road: "table.road", heat: "table.heat", panel: ".panel .plot > svg", whisker: "svg.whisker",
                example: ".example", bar: "svg.bar", answers: "#found > *",
            })) {
                const all = [...document.querySelectorAll(query)];
                const box = (one) => one.getBoundingClientRect();
                const drawn = all.filter((one) => box(one).width > 4 && box(one).height > 2);
                found[name] = [all.length, drawn.length];
            }
            return found;
        """
        found = browser.run(sizes)
        assert all(there > 0 and there == drawn for there, drawn in found.values()), found
        browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        assert browser.run("return document.querySelectorAll('.strip span').length") >= 20 * len(BEFORE)
        assert browser.run("return document.documentElement.scrollWidth") <= width, "unfolded"
        assert browser.log() == []
    finally:
        browser.close()
