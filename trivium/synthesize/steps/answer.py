"""Answer: the model answers every row's prompt, once or several times."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from trivium.kit.numbers import Count
from trivium.synthesize.prompted import PromptedStep, Wanted
from trivium.synthesize.row import CANDIDATES, Row, asked
from trivium.synthesize.step import Room


class Answer(PromptedStep):
    """Answer each prompt; of several answers `verify`, `judge` or `pairs` choose, else each makes a row."""

    name: ClassVar[str] = "answer"
    short: ClassVar[str] = "samples"

    samples: Count = Field(default=1, ge=1)
    """How many answers to a prompt."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        return rows, rows * self.samples, self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        wanted = [
            Wanted(row, sample=sample, messages=self._asked(row, room))
            for row in rows for sample in range(self.samples)
        ]  # fmt: skip
        replies = self.replies(wanted, room)
        found = []
        for place, row in enumerate(rows):
            mine = replies[place * self.samples : (place + 1) * self.samples]
            good = [
                {"text": one.text.strip(), "sample": sample}
                for sample, one in enumerate(mine)
                if one.failure is None
            ]
            for sample, one in enumerate(mine):
                if one.failure is not None and (good or sample):
                    room.drop(row.child(f"#{sample}", completion=one.text), one.failure)
            if not good:
                room.drop(row, mine[0].failure or "")
                continue
            made = row.child("", ("completion", "response", CANDIDATES))
            if self.samples == 1:
                made.fields["completion"] = good[0]["text"]
            else:
                made.fields[CANDIDATES] = good
            found.append(made.note(self.name, **self.source(room, samples=len(good))))
        return found

    def _asked(self, row: Row, room: Room) -> list[dict[str, str]] | None:
        return asked(row) if not self.template else None
