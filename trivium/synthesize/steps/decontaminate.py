"""Decontaminate: rows that hold items of an examination, found by the index of curation."""

from typing import ClassVar

import pyarrow as arrow
from pydantic import Field, PrivateAttr

from trivium.curate.batch import BASE, Batch, schema_of
from trivium.curate.steps import decontaminate as curation
from trivium.synthesize.row import Row, whole_text
from trivium.synthesize.step import Room, Step


class Decontaminate(Step):
    """Leave out rows that hold what the model will be examined with."""

    name: ClassVar[str] = "decontaminate"
    short: ClassVar[str] = "against"

    against: curation.Against
    """The examinations: `recipe` (all it measures on), files or folders of rows, `world:NAME`, stages."""
    overlap: float = Field(default=0.8, gt=0, le=1)
    """How much of a question has to be found, its runs of words weighted by their rarity among the items."""
    gram: int = Field(default=5, ge=2, le=32)
    """Words of a run."""

    _index: curation.Decontaminate | None = PrivateAttr(default=None)

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return curation.mentions_of(self.against)

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        if self._index is None:
            self._index = curation.Decontaminate(
                against=self.against, overlap=self.overlap, gram=self.gram, answer="ignored"
            )
            self._index._place = room.scratch / f"examinations-{room.place}.json"
            self._index.prepare(self._index._place, room.where)
        if not rows:
            return rows
        records = [
            {"id": row.id, "source": "", "line": 0, "text": whole_text(row), "fields": "{}"} for row in rows
        ]
        batch = Batch(arrow.RecordBatch.from_pylist(records, schema=schema_of(BASE)))
        kept = []
        for row, reason in zip(rows, self._index.run(batch).reasons or [], strict=True):
            if reason is None:
                kept.append(row)
            else:
                room.drop(row, reason)
        return kept
