"""What a model will be examined with: questions and texts that documents are searched for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from trivium import world
from trivium.data.sources import Source, read_documents, world_call
from trivium.data.split import HELD_OUT, MOST_READ, in_validation, text_hash

_MOST_ASKED = 1000
QUESTIONS = ("question", "prompt", "problem", "query", "instruction", "text")
_ANSWERS = ("answer", "completion", "solution", "output", "response")


class Examination(Source):
    """Rows with questions, the test questions of a source of the world, or texts."""

    held_out: float = Field(default=0.0, ge=0, lt=1)
    """Only what a stage with this share for validation holds out; all where it is 0."""
    texts: bool = False
    """Of a source of the world its documents, not its questions."""

    def __str__(self) -> str:
        share = f"{self.held_out:.3g} of " if self.held_out else "texts of " if self.texts else ""
        return share + self.path


@dataclass(frozen=True)
class Examined:
    """What the stages of a recipe measure on, and what they ask that cannot be searched for."""

    sets: list[Examination]
    unknown: tuple[str, ...] = ()


def held_out_of(sources: Iterable[Source], share: float | None = None) -> Examined:
    """What is held out of these sources, each by its own share or all by the same."""
    sets = []
    for source in sources:
        part = getattr(source, "validation", 0.0) if share is None else share
        if part:
            sets.append(Examination(**source.at(source.path).model_dump(), held_out=part))
    return Examined(sets)


def items_of(examination: Examination | str, place: Path | None) -> Iterator[list[str]]:
    """The items of an examination as [id, question, answer]; `place` says where a stage's data lies."""
    source = Examination(path=examination) if isinstance(examination, str) else examination
    if source.path.startswith("world:") and not source.texts and not source.held_out:
        name, options = world_call(source.path)
        options = {"limit": _MOST_ASKED, **options}
        for asked in world.questions(name, options.pop("split", "test"), **options):
            yield [asked.id, asked.question, asked.answer]
        return
    if place is not None:
        # Of a stage that sets part of its data aside to be asked, that part.
        apart = place.parent / HELD_OUT
        asked_of = apart if isinstance(examination, Examination) and apart.is_dir() else place
        source = source.model_copy(update={"path": str(asked_of)})
    found = read_documents(source.model_copy(update={"on_bad": "skip"}))
    if source.held_out:
        documents = islice(found, MOST_READ)
        found = (one for one in documents if in_validation(text_hash(one), source.held_out))
    for document in found:
        question, answer = _asked(document.fields)
        if question:
            yield [document.id, question, answer]


def _asked(fields: Mapping[str, Any]) -> tuple[str, str]:
    messages = next((fields[name] for name in ("messages", "prompt") if _is_list(fields.get(name))), None)
    if messages is not None:
        said = {str(one.get("role")): one.get("content") for one in messages if isinstance(one, dict)}
        return str(said.get("user") or ""), str(said.get("assistant") or "")
    texts = {name: value for name, value in fields.items() if isinstance(value, str | int | float)}
    if "Body" in texts and "Question" in texts:
        # SVAMP's rows.
        return f"{texts['Body']} {texts['Question']}", str(texts.get("Answer", ""))
    question = next((str(texts[name]) for name in QUESTIONS if name in texts), "")
    return question, next((str(texts[name]) for name in _ANSWERS if name in texts), "")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)
