"""The whole of a synthesis: seeds through the steps in rounds, until they, the budget or what is new run out.

The steps are a pure function of seeds and answers, and every answer is on disk as soon as it is there. So a
synthesis that was cut off is resumed by doing all of it again: what was answered is not asked again.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_json, write_text
from trivium.synthesize.diversity import cell_of, measured
from trivium.synthesize.row import Form, Row, as_written, compared_text, expanded
from trivium.synthesize.step import Room, Step
from trivium.synthesize.steps.diversify import Diversify
from trivium.synthesize.steps.seed import LISTS, Seed

REPORT = "synthesis.json"
SHOWN = 20


@dataclass
class Synthesis:
    """What is made, how, and where the results lie."""

    steps: Sequence[Step]
    room: Room
    per_round: int = 256
    most: int | None = None
    """Draw at most so many seeds."""
    form: Form = "messages"
    file_format: str = "jsonl"
    coverage_by: Sequence[str] = ()
    progress: Callable[[int, int], None] = lambda done, all_seeds: None
    funnel: list[list[int]] = field(default_factory=list)
    """Rows into and out of each step."""

    def run(self) -> list[Row]:
        """The rows that are kept, in order."""
        first = self.steps[0] if self.steps else None
        seeds = first.seeds(self.room) if isinstance(first, Seed) else list(self.room.data)
        if not seeds:
            raise TriviumError("`data` holds no row to start from; name some, or begin with the step `seed`.")
        self.seeds = len(seeds)
        self.columns = self._columns(seeds)
        self.possible = len({cell_of(row, self.columns) for row in seeds})
        self.funnel = [[0, 0] for _ in self.steps]
        steering = next((one for one in self.steps if isinstance(one, Diversify) and one.steer), None)
        kept: list[Row] = []
        self.rounds = 0
        while seeds and not self.room.asker.ledger.refused:
            count = self.per_round
            if self.most is not None:
                count = min(count, self.most - (self.seeds - len(seeds)))
            if count < 1:
                break
            if steering is not None:
                some = steering.choose(seeds, count, self._chance())
            else:
                some, seeds = seeds[:count], seeds[count:]
            kept += self._round(some)
            self.rounds += 1
            self.progress(self.seeds - len(seeds), self.seeds)
            if steering is not None and steering.saturated:
                self.room.say(
                    f"hardly anything new in {self.rounds} rounds: {len(seeds):,} seeds are not drawn"
                )
                break
        self.left = len(seeds)
        for place, step in enumerate(self.steps):
            self._enter(place)
            before = len(kept)
            kept = step.finish(kept, self.room)
            self.funnel[place][1] += len(kept) - before
        return [one for row in kept for one in expanded(row)]

    def _round(self, rows: list[Row]) -> list[Row]:
        for place, step in enumerate(self.steps):
            self._enter(place)
            self.funnel[place][0] += len(rows)
            rows = step.run(rows, self.room)
            self.funnel[place][1] += len(rows)
        return rows

    def _enter(self, place: int) -> None:
        self.room.place, self.room.title = place, f"{place + 1} {self.steps[place].name}"

    def _chance(self) -> random.Random:
        self.room.place = -1
        return self.room.random("round", self.rounds)

    def _columns(self, seeds: Sequence[Row]) -> list[str]:
        """The columns that coverage is measured over: those named, else those that steer, else the seed's."""
        steered = [one.steer.by for one in self.steps if isinstance(one, Diversify) and one.steer is not None]
        wanted = self.coverage_by or (steered[0] if steered else list(LISTS.values()))
        found = [name for name in wanted if any(name.partition(".")[0] in row.fields for row in seeds)]
        if missing := [name for name in self.coverage_by if name not in found]:
            there = ", ".join(seeds[0].fields) or "none"
            raise TriviumError(
                f"`coverage_by` names {missing[0]}, a column of no row to start from; they have {there}."
            )
        return found

    def report(self, rows: Sequence[Row]) -> dict[str, Any]:
        """The numbers of the report, and some rows to read."""
        texts = [compared_text(row) for row in rows]
        chance = random.Random(self.room.seed)
        shown = chance.sample(list(rows), min(SHOWN, len(rows)))
        lost = chance.sample(self.room.dropped, min(SHOWN, len(self.room.dropped)))
        ledger = self.room.asker.ledger
        return {
            "seeds": self.seeds, "not_drawn": self.left, "rounds": self.rounds, "rows": len(rows),
            "dropped": len(self.room.dropped),
            "steps": [
                {
                    "step": f"{place + 1} {step.name}",
                    "in": self.funnel[place][0], "out": self.funnel[place][1],
                    "reasons": dict(self.room.reasons.get(place, Counter()).most_common()),
                    "facts": step.facts(),
                }
                for place, step in enumerate(self.steps)
            ],
            "cost": {"tokens": ledger.spent.tokens, "requests": ledger.spent.requests,
                     "money": round(ledger.spent.money, 6)},
            "out_of_budget": ledger.refused,
            "diversity": measured(rows, self.columns, self.possible, texts),
            "examples": [as_written(row, self.form) for row in shown],
            "examples_dropped": [{"step": step, "reason": why, **as_dropped(row)} for row, step, why in lost],
        }  # fmt: skip

    def write(self, rows: Sequence[Row], data: Path, folder: Path) -> dict[str, Any]:
        """Put `dropped.jsonl`, the report and last the folder of data in place; returns the report."""
        if not rows:
            most = self.room.reasons
            ranked = sorted(
                (
                    (count, f"{self.steps[place].name}: {why}")
                    for place, some in most.items()
                    for why, count in some.items()
                ),
                reverse=True,
            )
            said = ", ".join(f"{why} {count:,}" for count, why in ranked[:4]) or "no step made any"
            raise TriviumError(f"No row is left ({said}); look at {folder / 'dropped.jsonl'} and the steps.")
        report = self.report(rows)
        write_json(folder / REPORT, report)
        with whole_folder(data) as made:
            written = [as_written(row, self.form) for row in rows]
            if self.file_format == "parquet":
                parquet.write_table(_table(written), made / "rows.parquet")
            else:
                write_text(made / "rows.jsonl", _lines(written))
        return report

    def write_dropped(self, folder: Path) -> None:
        lines = [{"step": step, "reason": why, **as_dropped(row)} for row, step, why in self.room.dropped]
        write_text(folder / "dropped.jsonl", _lines(lines))


def as_dropped(row: Row) -> dict[str, Any]:
    """The columns of a row in `dropped.jsonl`."""
    return {**row.fields, "id": row.id, "provenance": row.provenance}


def _table(rows: Sequence[dict[str, Any]]) -> arrow.Table:
    """The rows as columns; a column whose values are of no one type holds JSON texts."""
    names = dict.fromkeys(name for row in rows for name in row)
    return arrow.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> arrow.Array:
    try:
        column = arrow.array(values)
        # Parquet has no record without a key.
        parquet.write_table(arrow.table({"": column}), arrow.BufferOutputStream())
        return column
    except (arrow.ArrowException, ValueError, OverflowError):
        return arrow.array([None if value is None else json.dumps(value) for value in values])


def _lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
