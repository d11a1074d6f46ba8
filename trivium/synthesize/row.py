"""One row on its way: its columns, how it came to be, and the forms in which training stages read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trivium.kit.errors import TriviumError

Form = Literal["messages", "completion"]
Messages = list[dict[str, Any]]
PROMPTS = ("prompt", "question", "problem", "instruction")
ANSWERS = ("answer", "solution", "gold", "target")
CANDIDATES = "candidates"
"""The column of several answers to one prompt, each {text, score, reason}."""


@dataclass
class Row:
    """The columns of a row, and one entry of provenance for every step that made something of it."""

    id: str
    fields: dict[str, Any]
    provenance: list[dict[str, Any]] = field(default_factory=list)

    def child(self, mark: str = "", without: tuple[str, ...] = (), /, **columns: Any) -> Row:
        """A row that comes of this one, with other columns; `mark` tells it from others of the same."""
        fields = {name: value for name, value in self.fields.items() if name not in without}
        return Row(f"{self.id}{mark}", {**fields, **columns}, list(self.provenance))

    def note(self, step: str, **facts: Any) -> Row:
        """Add to the provenance."""
        self.provenance.append(
            {"step": step, **{name: one for name, one in facts.items() if one is not None}}
        )
        return self


def row_of(name: str, fields: Mapping[str, Any]) -> Row:
    """A row of data, with the provenance that an earlier stage wrote."""
    # A parquet file has every column in every row, and every key in every entry.
    known = {column: value for column, value in fields.items() if value is not None}
    earlier = known.pop("provenance", None)
    entries = [one for one in earlier if isinstance(one, dict)] if isinstance(earlier, list) else []
    return Row(
        name, known, [{key: one for key, one in entry.items() if one is not None} for entry in entries]
    )


def asked(row: Row) -> Messages:
    """The conversation up to where the assistant answers."""
    found = row.fields.get("messages")
    if isinstance(found, list) and "prompt" not in row.fields:
        messages = [dict(one) for one in found]
        while messages and messages[-1].get("role") == "assistant":
            messages.pop()
        if messages:
            return messages
    for name in PROMPTS:
        value = row.fields.get(name)
        if isinstance(value, list) and value:
            return [dict(one) for one in value]
        if isinstance(value, str) and value.strip():
            return [{"role": "user", "content": value}]
    columns = ", ".join(row.fields) or "none"
    raise TriviumError(
        f"The row {row.id} has no prompt to answer, only the columns {columns}; name it with `columns: "
        "{prompt: ...}` where the data is named, or let a step write it."
    )


def prompt_text(row: Row) -> str:
    """What the user says last."""
    return str(asked(row)[-1].get("content") or "")


def answer_text(row: Row) -> str | None:
    """The answer that a row has: what was written, what its data came with, or None."""
    for name in ("completion", "response", *ANSWERS):
        if isinstance(row.fields.get(name), str | int | float):
            return str(row.fields[name])
    messages = row.fields.get("messages")
    if isinstance(messages, list) and messages and messages[-1].get("role") == "assistant":
        return str(messages[-1].get("content") or "")
    text = row.fields.get("text")
    return text if isinstance(text, str) else None


def whole_text(row: Row) -> str:
    """All that a row would teach, for comparisons between rows."""
    if isinstance(row.fields.get("text"), str) and "completion" not in row.fields:
        return str(row.fields["text"])
    parts = [asked_text(row)]
    parts += [str(row.fields[name]) for name in ("completion", "chosen") if name in row.fields]
    return "\n".join(parts)


def asked_text(row: Row) -> str:
    """All that is said up to where the assistant answers; nothing where nothing is asked."""
    try:
        return "\n".join(str(one.get("content") or "") for one in asked(row))
    except TriviumError:
        return ""


def compared_text(row: Row) -> str:
    """What rows are compared by: what is asked, since answers follow from it; else the text itself."""
    return asked_text(row) or str(row.fields.get("text") or row.fields.get("completion") or "")


def expanded(row: Row) -> list[Row]:
    """A row for every candidate, where no step has chosen among several."""
    several = row.fields.get(CANDIDATES)
    if several is None or "completion" in row.fields or "chosen" in row.fields:
        return [row.child("", (CANDIDATES,))]
    return [
        row.child(f"#{place}", (CANDIDATES,), completion=one["text"]) for place, one in enumerate(several)
    ]


def as_written(row: Row, form: Form) -> dict[str, Any]:
    """The columns of a row in `rows.jsonl`."""
    fields = {**row.fields, "id": row.id, "provenance": row.provenance}
    if "chosen" in fields:
        return _prompted(fields, row, form)
    completion = fields.get("completion")
    if isinstance(completion, str):
        said: Mapping[str, Any] = {"role": "assistant", "content": completion}
        if form == "messages":
            for name in (*PROMPTS, "completion"):
                fields.pop(name, None)
            return {**fields, "messages": [*asked(row), said]}
        return _prompted(fields, row, form)
    return fields


def _prompted(fields: dict[str, Any], row: Row, form: Form) -> dict[str, Any]:
    """With one column `prompt`, as text or as messages, and the answers in the same form."""
    messages = asked(row)
    for name in (*PROMPTS, "messages"):
        fields.pop(name, None)
    if form == "completion":
        return {**fields, "prompt": str(messages[-1].get("content") or "")}
    for name in ("chosen", "rejected"):
        if isinstance(fields.get(name), str):
            fields[name] = [{"role": "assistant", "content": fields[name]}]
    return {**fields, "prompt": messages}
