"""Pairs: the best and the worst answer to a prompt by score, as preference data."""

from typing import ClassVar

from pydantic import Field

from trivium.synthesize.row import CANDIDATES, Row
from trivium.synthesize.step import Room, Step


class Pairs(Step):
    """Make `chosen` and `rejected` of the scored answers that `verify` or `judge` kept with `every: true`."""

    name: ClassVar[str] = "pairs"
    short: ClassVar[str] = "gap"

    gap: float = Field(default=0.0, ge=0)
    """The scores have to differ by more than this."""

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        found = []
        for row in rows:
            scored = [one for one in row.fields.get(CANDIDATES, []) if one.get("score") is not None]
            ranked = sorted(scored, key=lambda one: -one["score"])
            if len(ranked) < 2:
                room.drop(
                    row, f"one answer: {len(ranked)} scored answers make no pair; ask for more `samples`"
                )
                continue
            best, worst = ranked[0], ranked[-1]
            if best["score"] - worst["score"] <= self.gap:
                room.drop(row, f"alike: all answers score within {self.gap:g} of {best['score']:g}")
                continue
            pair = row.child(
                "", (CANDIDATES, "completion"), chosen=best["text"], rejected=worst["text"],
                score_chosen=best["score"], score_rejected=worst["score"],
            )  # fmt: skip
            found.append(pair.note(self.name))
        return found
