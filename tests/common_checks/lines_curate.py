"""What a curate stage says of its documents and how they are worked on."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pyarrow.parquet as parquet
from lines import moves
from tiny_run import Seen


def rows(seen: Seen, folder: str = "data") -> list[dict[str, Any]]:
    files = sorted((seen.folder / folder).glob("*.parquet"))
    return [row for path in files for row in parquet.read_table(path).to_pylist()]


def same(before: Seen, after: Seen) -> None:
    assert rows(before) == rows(after)


SOURCE = {"path": "texts.jsonl"}


def source(name: str, value: Any, before: dict[str, Any], after: dict[str, Any], **more: Any) -> Any:
    return moves(
        f"data.{name}", value, kinds=["curate"], both={"data": [before]}, beside={"data": [after]},
        moved=False, **more,
    )  # fmt: skip


@source("path", "others.jsonl", SOURCE, {"path": "others.jsonl"})
def path(before: Seen, after: Seen) -> None:
    assert {row["source"] for row in rows(after)} == {"others.jsonl"}


@source("limit", 6, SOURCE, {**SOURCE, "limit": 6})
def limit(before: Seen, after: Seen) -> None:
    assert len(rows(after)) == 6 < len(rows(before))


@source("columns", {"text": "other"}, SOURCE, {**SOURCE, "columns": {"text": "other"}})
def columns(before: Seen, after: Seen) -> None:
    assert all("zz" in row["text"] for row in rows(after))


@source("split", "test", {"path": "halves-texts"}, {"path": "halves-texts", "split": "test"})
def split(before: Seen, after: Seen) -> None:
    assert all("test" in row["id"] for row in rows(after))
    assert any("train" in row["id"] for row in rows(before))


@source("separator", "|", {"path": "notes.txt"}, {"path": "notes.txt", "separator": "|"})
def separator(before: Seen, after: Seen) -> None:
    assert len(rows(before)) == 1 < len(rows(after))


DAMAGED = {"path": "damaged-texts.jsonl"}
source("subset", "en", SOURCE, {**SOURCE, "subset": "en"},
       refused="names a part of a data set on the hub")(None)  # fmt: skip
source("on_bad", "stop", DAMAGED, {**DAMAGED, "on_bad": "stop"}, refused="damaged-texts.jsonl:")(None)


@source("on_bad", "skip", DAMAGED, {**DAMAGED, "on_bad": "skip"})
def on_bad(before: Seen, after: Seen) -> None:
    """A line that cannot be read is a counted reject, unless the recipe says `stop`."""
    for seen in (before, after):
        assert any(row["step"] == "read" for row in rows(seen, "dropped"))


@moves("steps", [{"sample": {"documents": 3}}], kinds=["curate"])
def steps(before: Seen, after: Seen) -> None:
    assert len(rows(after)) == 3 < len(rows(before))
    assert all(row["step"] == "sample" for row in rows(after, "dropped"))


@moves("workers", 2, kinds=["curate"])
def workers(before: Seen, after: Seen) -> None:
    same(before, after)


@moves("seed", 2, kinds=["curate"])
def seed(before: Seen, after: Seen) -> None:
    same(before, after)


@moves("most_lost", 0.5, kinds=["curate"])
def most_lost(before: Seen, after: Seen) -> None:
    """Nothing is lost here; that it stops is tested where sources are curated."""
    same(before, after)


if find_spec("ray") is None:
    moves("engine", "ray", kinds=["curate"], refused="`engine: ray` needs Ray")(None)
else:
    moves("engine", "ray", kinds=["curate"])(same)
