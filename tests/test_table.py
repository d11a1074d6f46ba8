"""Tables of the terminal: nothing is cut, no line is too long, and a pipe gets whole lines."""

from __future__ import annotations

import io

import pytest

from trivium.kit import table as tables
from trivium.kit.table import table

MODELS = ["base", "mid", "forgetful", "stretched", "long", "sft", "dpo", "rl"]
WIDE = [["task", *MODELS, "n"]] + [
    [f"task {number}: accuracy", *(f"{number}{place} % (10–{place}0) +" for place in range(8)), "100"]
    for number in range(4)
]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_wide_table_is_shown_in_pages_that_fit(width):
    text = table(WIDE, width)
    assert max(map(len, text.splitlines())) <= width
    assert all(any(name in line for line in text.splitlines()) for name in MODELS)
    assert all(cell in text for row in WIDE[1:] for cell in row)
    assert text.count("task 0: accuracy") == text.count("task 3: accuracy") > 1


def test_a_long_cell_is_wrapped_and_not_cut():
    words = "layers 4, width 128, heads 4, parameters 1.05M, batch 4k, tokens 1.2M, steps 300, flops 8.1e12"
    text = table([["stage", "kind", "derived"], ["base", "pretrain", words]], 60)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 60
    assert " ".join(" ".join(lines[1:]).split()) == f"base pretrain {words}"


def test_what_fits_is_one_line_a_row_and_a_pipe_gets_pages_of_whole_cells(monkeypatch):
    narrow = [["stage", "tokens"], ["base", "1.2M"]]
    assert table(narrow, 80) == "stage  tokens\nbase   1.2M\n"
    monkeypatch.setattr(tables.sys, "stdout", out := io.StringIO())
    tables.print_table(WIDE)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= tables.PIPED
    assert all(sum(cell in line for line in lines) for row in WIDE for cell in row), "no cell is cut"


def test_a_few_long_cells_take_two_lines_before_a_column_moves_to_a_page_of_its_own():
    rows = [["result", "state", "loss", "base"], ["mine/aaaaaaaaaa", "cut off, earlier settings", "", ""]]
    rows += [[f"mine/{place}", "done", "1.234", "mine/base-of-all"] for place in range(6)]
    lines = table(rows, 60).splitlines()
    assert len(lines) == len(rows) + 1
    assert max(map(len, lines)) <= 60
    assert lines[2].split() == ["settings"]
    assert len(table(rows, 45).splitlines()) > 2 * len(rows), "no cell takes three lines"


def test_a_line_too_long_for_the_terminal_goes_on_below_its_text(monkeypatch):
    line = "  code      trivium 0.1.0; changed since: trivium.kit, trivium.model, trivium.learn"
    assert tables.hanging(line, 12) == line, "a pipe gets whole lines"
    monkeypatch.setattr(tables.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(tables, "_width", lambda: 50)
    first, *others = tables.hanging(line, 12).splitlines()
    assert first.startswith("  code      trivium")
    assert others
    assert all(other.startswith(" " * 12 + "trivium") for other in others)
    assert max(map(len, [first, *others])) <= 50


def test_a_column_of_nothing_beside_long_ones_is_shown():
    rows = [["stage", "", "what"], ["base", "", "a sentence that is long " * 8], ["sft", "", "short"]]
    shown = table(rows, 60)
    assert "base" in shown
    assert "short" in shown
