"""Mix: rows of other sources among those that were made."""

from typing import ClassVar

from pydantic import Field

from trivium.data.sources import Source, read_documents
from trivium.kit.errors import TriviumError
from trivium.synthesize.row import Row, row_of
from trivium.synthesize.step import Room, Step


class Mix(Step):
    """Add rows from `data` so that they are `share` of all, and shuffle."""

    name: ClassVar[str] = "mix"
    short: ClassVar[str] = "data"

    data: str
    """Where the other rows are: a file, a folder, `world:NAME`, or a stage that makes data."""
    share: float = Field(default=0.5, gt=0, lt=1)
    """Which share of the result they are; each is taken once."""

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("data", self.data, ("data", "source"))]

    def finish(self, rows: list[Row], room: Room) -> list[Row]:
        wanted = round(len(rows) * self.share / (1 - self.share))
        source = Source(path=str(room.where.get(self.data, self.data)))
        if source.path.startswith("world:"):
            source = source.model_copy(update={"limit": wanted})
        others = [
            row_of(f"{self.name}:{one.id}", one.fields).note(self.name, source=self.data)
            for one in (read_documents(source) if wanted else [])
        ]
        if len(others) < wanted:
            raise TriviumError(
                f"`mix`: {self.data} has {len(others)} rows, and a share of {self.share:g} beside "
                f"{len(rows)} rows "
                f"takes {wanted}; lower `share`."
            )
        room.random("others").shuffle(others)
        mixed = [*rows, *others[:wanted]]
        room.random("all").shuffle(mixed)
        return mixed
