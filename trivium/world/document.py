"""What the world hands out: documents with their truth, and questions with their answers."""

from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "validation", "test"]
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
