"""Seed: the rows that everything starts from: data, or topics × personas × styles × languages, or both."""

from itertools import product
from typing import Any, ClassVar

from pydantic import Field

from trivium.kit.numbers import Count
from trivium.synthesize.row import Row
from trivium.synthesize.step import Room, Step

LISTS = {
    "topics": "topic",
    "personas": "persona",
    "styles": "style",
    "languages": "language",
    "lengths": "length",
}


class Seed(Step):
    """Combine the rows of `data` with every topic, persona, style, language and length, in random order."""

    name: ClassVar[str] = "seed"
    short: ClassVar[str] = "topics"

    topics: list[str] = []
    """What it is about; the column `topic`."""
    personas: list[str] = []
    """Who writes or asks; the column `persona`."""
    styles: list[str] = []
    """How it is written; the column `style`."""
    languages: list[str] = []
    """In which language; the column `language`."""
    lengths: list[str] = []
    """How long it is to be, in words such as `one sentence`; the column `length`."""
    count: Count | None = Field(default=None, ge=1)
    """How many rows; combinations come round again where there are fewer. Each once where it is left out."""
    characters: Count | None = Field(default=None, ge=50)
    """Cut the `text` of documents into passages of at most so many characters, at the ends of lines."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        for name in LISTS:
            rows = max(rows, 1) * max(1, len(getattr(self, name)))
        return float(self.count or rows), 0.0, 0

    def seeds(self, room: Room) -> list[Row]:
        """The rows, in an order that follows from the seed."""
        data = room.data or [Row("seed", {})]
        if self.characters is not None:
            data = [piece for row in data for piece in _pieces(row, self.characters)]
        columns = [name for name in LISTS if getattr(self, name)]
        combined = list(product(*(getattr(self, name) for name in columns)))
        rows = [
            row.child(
                "".join(f"/{value}" for value in values),
                **{LISTS[name]: value for name, value in zip(columns, values, strict=True)},
            )
            for row in data for values in combined
        ]  # fmt: skip
        room.random("seeds").shuffle(rows)
        wanted = self.count or len(rows)
        return [_again(rows[place % len(rows)], place // len(rows)) for place in range(wanted)]


def _again(row: Row, turn: int) -> Row:
    """The same combination once more, as a row that is asked for with another seed."""
    return row if turn == 0 else row.child(f"/{turn}", draw=turn)


def _pieces(row: Row, most: int) -> list[Row]:
    text: Any = row.fields.get("text")
    if not isinstance(text, str) or len(text) <= most:
        return [row]
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), most):
            part = line[start : start + most]
            if piece and len(piece) + len(part) > most:
                found.append(piece)
                piece = ""
            piece += part
    found.append(piece)
    kept = [one.strip() for one in found if one.strip()]
    return [row.child(f"@{place}", text=one) for place, one in enumerate(kept)]
