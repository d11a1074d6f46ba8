"""Ways of asking: worked examples before the question, and thinking before the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer

Message = Mapping[str, Any]
Reasoning = Literal["off", "ask", "open"]

THINK, END_THINK = "<think>", "</think>"
REQUEST_TO_THINK = (
    f"Think the task through step by step between {THINK} and {END_THINK}, then give the answer alone."
)


@dataclass(frozen=True)
class Reasoned:
    """A model's text divided into what it thought and what it answered."""

    thoughts: str | None
    answer: str


def with_instruction(messages: Sequence[Message], instruction: str) -> list[dict[str, Any]]:
    """The conversation with a sentence added to its system message, which is created if there is none."""
    copied = [dict(message) for message in messages]
    if copied and copied[0].get("role") == "system":
        copied[0]["content"] = f"{copied[0]['content']}\n\n{instruction}"
        return copied
    return [{"role": "system", "content": instruction}, *copied]


def ask_to_reason(messages: Sequence[Message], reasoning: Reasoning) -> tuple[list[dict[str, Any]], str]:
    """The messages, and the text the answer shall begin with (`open` writes the tag for the model)."""
    if reasoning == "off":
        return [dict(message) for message in messages], ""
    return with_instruction(messages, REQUEST_TO_THINK), f"{THINK}\n" if reasoning == "open" else ""


def opens_thinking(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether a prompt ends where the model has begun to think."""
    return tokenizer.decode(prompt[-8:], skip_control=False).rstrip().endswith(THINK)


def split_reasoning(text: str, *, opened: bool = False) -> Reasoned:
    """Separate the thinking from the answer; thinking that never ended leaves an empty answer."""
    head, tag, rest = text.partition(THINK)
    if not tag:
        if not opened:
            # some templates write the opening tag in the prompt, so only the closing one is generated
            thoughts, closing, answer = text.partition(END_THINK)
            return Reasoned(thoughts.strip(), answer.lstrip()) if closing else Reasoned(None, text)
        head, rest = "", text
    elif opened:
        head, rest = "", head + rest
    thoughts, _, answer = rest.partition(END_THINK)
    before = head.strip()
    return Reasoned(thoughts.strip(), f"{before}\n{answer.lstrip()}" if before else answer.lstrip())


class ReasoningStream:
    """Separates thinking from answer while the text is still arriving."""

    def __init__(self, *, opened: bool = False) -> None:
        self._thinking, self._held = opened, ""

    def feed(self, text: str, *, last: bool = False) -> list[tuple[Literal["thoughts", "answer"], str]]:
        """Give a new piece of text; get back what is settled, each piece with its kind."""
        pieces: list[tuple[Literal["thoughts", "answer"], str]] = []
        self._held += text
        while True:
            tag = END_THINK if self._thinking else THINK
            kind: Literal["thoughts", "answer"] = "thoughts" if self._thinking else "answer"
            before, found, after = self._held.partition(tag)
            if found:
                if before:
                    pieces.append((kind, before))
                self._thinking, self._held = not self._thinking, after
                continue
            kept = 0 if last else beginning_at_end(self._held, (tag,))
            ready = self._held[: len(self._held) - kept]
            if ready:
                pieces.append((kind, ready))
            self._held = self._held[len(ready) :]
            return pieces


def beginning_at_end(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of the text may be the beginning of one of the marks."""
    longest = 0
    for mark in marks:
        for length in range(min(len(mark) - 1, len(text)), longest, -1):
            if text.endswith(mark[:length]):
                longest = length
                break
    return longest


def few_shot(
    examples: Sequence[tuple[str, str]], question: str, *, system: str | None = None
) -> list[dict[str, Any]]:
    """A conversation in which the examples were already asked and answered."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for asked, answered in examples:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]


def few_shot_text(
    examples: Sequence[tuple[str, str]], question: str, *, asked: str = "Question:", answered: str = "Answer:"
) -> str:
    """The same for a model that only continues text; the prompt ends where the answer begins."""
    blocks = [f"{asked} {one}\n{answered} {other}" for one, other in examples]
    return "\n\n".join([*blocks, f"{asked} {question}\n{answered}"])
