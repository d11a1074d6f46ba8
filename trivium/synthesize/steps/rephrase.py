"""Rephrase: a text or a prompt in other words, in named styles and languages (Maini et al., 2024, WRAP)."""

from typing import ClassVar

from pydantic import Field

from trivium.kit.numbers import Count
from trivium.synthesize.prompted import PromptedStep, Wanted, ways_of_writing
from trivium.synthesize.row import Row
from trivium.synthesize.step import Room, needs_column


class Rephrase(PromptedStep):
    """Write a column of every row again."""

    name: ClassVar[str] = "rephrase"
    short: ClassVar[str] = "styles"

    column: str = "text"
    """The column that is written again."""
    per_row: Count = Field(default=1, ge=1)
    """How many versions of a row."""
    styles: list[str] = []
    """How to write, as in `like an encyclopedia`; each version has one."""
    languages: list[str] = []
    """In which language; each version has one."""
    keep: bool = False
    """Keep the original as a row of its own."""
    template: str = (
        "Write the following text again in other words{% if style %}, {{ style }}{% endif %}"
        "{% if language %}, in {{ language }}{% endif %}. Keep all facts and numbers, add none, and answer "
        "with "
        "the new text alone.\n\n{{ original }}"
    )
    """The prompt; `original`, `style` and `language` are filled in."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        return rows * (self.per_row + self.keep), rows * self.per_row, self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        wanted = [
            Wanted(row, {"original": needs_column(row, self.column, self.name), **way}, sample)
            for row in rows
            for sample, way in enumerate(
                ways_of_writing(self.per_row, self.styles, self.languages, room.random(row.id))
            )
        ]
        found = list(rows) if self.keep else []
        for one, reply in zip(wanted, self.replies(wanted, room), strict=True):
            mark = f"~{one.sample}"
            if reply.failure is not None:
                room.drop(one.row.child(mark), reply.failure)
                continue
            way = {name: one.columns[name] for name in ("style", "language") if one.columns[name]}
            row = one.row.child(mark, **{self.column: reply.text.strip(), **way})
            found.append(row.note(self.name, **self.source(room, sample=one.sample, of=one.row.id, **way)))
        return found
