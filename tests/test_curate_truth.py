"""Curation against a web whose truth is known: every kind of dirt is found, and the good pages stay."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from curating import Rows, curation, rows

from trivium import world
from trivium.data.sources import Source

PAGES = 2000
STEPS = [
    {"language": {"keep": ["en"]}},
    {"deduplicate": "exact"},
    # Pages of some twenty words, one in fifteen changed: short shingles and many bands.
    {"deduplicate": {"method": "minhash", "shingle": 2, "bands": 28, "rows": 4, "threshold": 0.55,
                     "digits": "as written"}},
    {"decontaminate": {"against": ["world:facts?limit=800", "world:sums?limit=1000"]}},
]  # fmt: skip


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Rows, dict[str, Rows]]:
    folder = tmp_path_factory.mktemp("web")
    curation(folder, [Source(path="world:web", limit=PAGES)], STEPS).run()
    dropped: dict[str, Rows] = defaultdict(list)
    for row in rows(folder / "dropped"):
        dropped[row["step"]].append(row)
    pages = {page.id: page for page in world.documents("web", limit=PAGES)}
    return pages, rows(folder / "data"), dropped


def origin(pages: dict[str, Any], name: str) -> str:
    truth = pages[name].truth
    return truth["of"] if truth["label"] in ("duplicate", "near duplicate") else name


def kept_in_place(row: dict[str, Any]) -> str:
    return row["reason"].partition("of ")[2]


@pytest.mark.slow
def test_other_languages_are_found_and_no_other_page_is(web) -> None:
    pages, _, dropped = web
    gone = {row["id"] for row in dropped["language"]}
    foreign = {name for name, page in pages.items() if page.truth["label"] == "language"}
    good = {name for name, page in pages.items() if page.truth["label"] not in ("language", "noise", "spam")}
    assert len(foreign & gone) >= 0.99 * len(foreign) > 80
    assert len(good & gone) <= 0.01 * len(good)


def test_every_exact_copy_is_found_and_nothing_else(web) -> None:
    pages, kept, dropped = web
    for row in dropped["deduplicate exact"]:
        assert pages[row["id"]].text == pages[kept_in_place(row)].text
    later = [*dropped["deduplicate minhash"], *dropped["decontaminate"]]
    left = [row["text"] for row in [*kept, *later]]
    assert len(left) == len(set(left))
    assert len(dropped["deduplicate exact"]) > 200


def test_near_copies_are_found(web) -> None:
    """Spam is left out of the count: pages of it differ in a word or two and are copies of each other."""
    pages, kept, dropped = web
    near = [row for row in dropped["deduplicate minhash"] if pages[row["id"]].truth["label"] != "spam"]
    right = sum(origin(pages, row["id"]) == origin(pages, kept_in_place(row)) for row in near)
    assert right >= 0.98 * len(near)
    groups: dict[str, list[str]] = defaultdict(list)
    gone = {row["id"] for row in near}
    for row in [*kept, *near, *dropped["decontaminate"]]:
        groups[origin(pages, row["id"])].append(row["id"])
    copies = sum(len(group) - 1 for group in groups.values())
    left = sum(max(sum(name not in gone for name in group) - 1, 0) for group in groups.values())
    assert copies > 100
    assert left <= 0.05 * copies


def test_every_leak_is_found_and_no_clean_page_is_one(web) -> None:
    pages, kept, dropped = web
    gone = {row["id"]: row["reason"] for row in dropped["decontaminate"]}
    present = [*(row["id"] for row in kept), *gone]
    leaks = {name for name in present if pages[name].truth["label"] == "leak"}
    assert leaks <= gone.keys()
    assert len(leaks) > 50
    assert len(gone.keys() - leaks) <= 0.001 * len(present)
    for name in leaks:
        assert pages[name].truth["of"] in gone[name]
