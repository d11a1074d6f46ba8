"""Columns: made of others by templates, with no model asked."""

from typing import ClassVar

import jinja2
from pydantic import Field, field_validator

from trivium.synthesize.prompted import compiled, rendered
from trivium.synthesize.row import Row
from trivium.synthesize.step import Room, Step


class Columns(Step):
    """Fill a template for each named column, as in `{prompt: "Ask for: {{ answer }}"}`."""

    name: ClassVar[str] = "columns"
    short: ClassVar[str] = ""

    make: dict[str, str] = Field(min_length=1)
    """Columns with their jinja templates over the row's columns as they were."""
    drop: list[str] = []
    """Columns that go."""

    @field_validator("make")
    @classmethod
    def _are_templates(cls, make: dict[str, str]) -> dict[str, str]:
        for name, source in make.items():
            try:
                compiled(source)
            except jinja2.TemplateError as error:
                raise ValueError(f"the template of `{name}` cannot be read: {error}") from None
        return make

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        return [
            row.child(
                "", (*self.drop, *self.make),
                **{name: rendered(one, row.fields, self.name, row.id) for name, one in self.make.items()},
            )
            for row in rows
        ]  # fmt: skip
