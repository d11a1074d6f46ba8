"""Teacher: a template asks a model for something, which becomes a column, or several by a JSON schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator

from trivium.generate.endpoint import parsed
from trivium.grade.fences import fenced_anywhere
from trivium.grade.schema import violation
from trivium.kit.numbers import Count
from trivium.synthesize.prompted import PromptedStep, Wanted
from trivium.synthesize.row import Row
from trivium.synthesize.step import Room


class Teacher(PromptedStep):
    """Ask what `template` says about every row."""

    name: ClassVar[str] = "teacher"
    short: ClassVar[str] = "template"

    to: str = "completion"
    """The column that takes the answer."""
    samples: Count = Field(default=1, ge=1)
    """How many answers, each a row of its own."""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    """Ask for JSON of this schema, whose properties become columns; what breaks it is dropped."""

    @model_validator(mode="after")
    def _asks_something(self) -> Teacher:
        if not self.template.strip():
            raise ValueError('`template` says what to ask, as in "Ask something about {{ topic }}."')
        return self

    def answers(self, rows: float) -> tuple[float, float, int]:
        return rows * self.samples, rows * self.samples, self.max_new_tokens

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        wanted = [Wanted(row, sample=sample) for row in rows for sample in range(self.samples)]
        found = []
        for one, reply in zip(wanted, self.replies(wanted, room, self.json_schema), strict=True):
            mark = f".{one.sample}" if self.samples > 1 else ""
            if reply.failure is not None:
                room.drop(one.row.child(mark), reply.failure)
                continue
            columns: dict[str, Any] | str = {self.to: reply.text.strip()}
            if self.json_schema is not None:
                columns = read_object(reply.text, self.json_schema)
            if isinstance(columns, str):
                room.drop(one.row.child(mark, said=reply.text), f"no JSON of the schema: {columns}")
                continue
            facts = self.source(room, sample=one.sample, wrote=sorted(columns))
            found.append(one.row.child(mark, **columns).note(self.name, **facts))
        return found


def read_object(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | str:
    """The JSON object in an answer, fenced or not, or what is wrong with it."""
    blocks = [inside for _, inside in fenced_anywhere(text)]
    for candidate in (text, *blocks, text[text.find("{") : text.rfind("}") + 1]):
        try:
            value = parsed(candidate)
        except (ValueError, RecursionError):
            continue
        if not isinstance(value, dict):
            return f"it is a {type(value).__name__}, not an object"
        return violation(value, schema) or value
    return "it holds no JSON"
