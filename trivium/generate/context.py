"""What to do when a conversation is longer than the window."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from trivium.generate.engine import Engine
from trivium.generate.prompting import Message, with_instruction
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer

Overflow = Literal["refuse", "drop", "slide", "summarise"]
Summarise = Callable[[Sequence[Message]], str]

REQUEST_TO_SUMMARISE = (
    "Summarise the conversation above in a few sentences: "
    "names, numbers, what was decided, what is still open."
)
SUMMARY_HEADING = "Summary of the earlier conversation:"


@dataclass(frozen=True)
class Fitted:
    """A conversation that fits: what is left of it, its tokens, and what had to go."""

    messages: list[dict[str, Any]]
    tokens: list[int]
    left_out: int = 0
    summary: str | None = None


def turns_of(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """System messages, and the rest in turns: a user's message with everything up to the next one."""
    system = [message for message in messages if message.get("role") in ("system", "developer")]
    turns: list[list[Message]] = []
    for message in messages:
        if message.get("role") in ("system", "developer"):
            continue
        if message.get("role") == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return system, turns


def fit_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    room: int,
    *,
    overflow: Overflow = "refuse",
    summarise: Summarise | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_arguments: Mapping[str, Any] | None = None,
) -> Fitted:
    """Bring a conversation to at most `room` prompt tokens; system messages always stay."""

    def tokens_of(conversation: Sequence[Message]) -> list[int]:
        return tokenizer.encode_chat(
            [dict(message) for message in conversation],
            tools=tools,
            add_generation_prompt=True,
            template_arguments=template_arguments,
        ).ids

    whole = tokens_of(messages)
    if len(whole) <= room or overflow == "slide":
        return Fitted([dict(message) for message in messages], whole)
    if overflow == "refuse":
        raise TriviumError(
            f"the conversation has {len(whole)} tokens and the window leaves room for {room}: "
            "shorten it, ask for fewer new tokens, or choose overflow drop, slide or summarise."
        )
    system, turns = turns_of(messages)
    if overflow == "summarise":
        assert summarise is not None, "the policy summarise needs a summariser"
        return _summarised(system, turns, tokens_of, room, summarise)
    gone, kept, tokens = _drop(system, turns, tokens_of, room)
    return Fitted(kept, tokens, left_out=gone)


def _drop(
    system: list[Message],
    turns: list[list[Message]],
    tokens_of: Callable[[Sequence[Message]], list[int]],
    room: int,
) -> tuple[int, list[dict[str, Any]], list[int]]:
    """Leave out as few of the oldest turns as will do."""
    low, high = 0, len(turns) - 1
    while low < high:
        middle = (low + high) // 2
        fits = len(tokens_of(_flat(system, turns[middle:]))) <= room
        low, high = (low, middle) if fits else (middle + 1, high)
    kept = _flat(system, turns[low:])
    tokens = tokens_of(kept)
    if len(tokens) > room:
        raise TriviumError(
            f"the system message and the last turn alone have {len(tokens)} tokens and the window leaves "
            f"room for {room}: shorten the last message."
        )
    return sum(len(turn) for turn in turns[:low]), kept, tokens


def _summarised(
    system: list[Message],
    turns: list[list[Message]],
    tokens_of: Callable[[Sequence[Message]], list[int]],
    room: int,
    summarise: Summarise,
) -> Fitted:
    """Replace the oldest turns by a summary of them, kept in the system message."""
    gone, _, _ = _drop(system, turns, tokens_of, room)
    first = next(index for index in range(len(turns)) if sum(map(len, turns[: index + 1])) >= gone) + 1
    while first < len(turns):
        old = _flat([], turns[:first])
        summary = summarise(old).strip()
        kept = with_instruction(_flat(system, turns[first:]), f"{SUMMARY_HEADING} {summary}")
        tokens = tokens_of(kept)
        if len(tokens) <= room:
            return Fitted(kept, tokens, left_out=len(old), summary=summary)
        first += 1
    gone, kept, tokens = _drop(system, turns, tokens_of, room)
    return Fitted(kept, tokens, left_out=gone)


def _flat(system: Sequence[Message], turns: Sequence[Sequence[Message]]) -> list[dict[str, Any]]:
    return [dict(message) for message in system] + [dict(message) for turn in turns for message in turn]


def summariser(engine: Engine, *, most: int = 200) -> Summarise:
    """A summariser that asks the model itself, in at most `most` tokens."""

    def summarise(messages: Sequence[Message]) -> str:
        asking = [*messages, {"role": "user", "content": REQUEST_TO_SUMMARISE}]
        room = engine.window - most
        fitted = fit_conversation(asking, engine.tokenizer, room, overflow="drop")
        sampling = Sampling(temperature=0, max_new_tokens=most)
        return engine.generate([Request(fitted.tokens, sampling)])[0][0].text

    return summarise
