"""What the world hands out: documents with their truth, and questions with their answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from trivium.kit.errors import TriviumError

Split = Literal["train", "validation", "test"]
Share = Annotated[float, "from 0 to 1"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class WorldDocument:
    """One generated document: plain text or fields in TRL's formats, and what is true about it."""

    id: str
    text: str | None
    fields: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One thing to ask a model, as text to continue and as a conversation, with the right answer."""

    id: str
    prompt: str
    question: str
    answer: str
    messages: tuple[dict[str, Any], ...] = ()
    choices: tuple[str, ...] = ()
    check: dict[str, Any] = field(default_factory=dict)
    truth: dict[str, Any] = field(default_factory=dict)


def in_form(form: str, source: str, question: Callable[[], Question]) -> WorldDocument | None:
    """A source's question and its answer as a chat to learn from, or None where a document is wanted."""
    if form == "document":
        return None
    if form != "chat":
        raise TriviumError(f"world:{source} has no form '{form}'; use document or chat.")
    asked = question()
    messages = [{"role": "user", "content": asked.question}, {"role": "assistant", "content": asked.answer}]
    return WorldDocument("", None, {"messages": messages}, {**asked.truth, "answer": asked.answer})
