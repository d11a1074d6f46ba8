"""A model's text as it arrives, separated into what it thought, what it says and which tools it calls."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal

from trivium.generate.streaming import ReasoningStream, beginning_at_end

CALL, END_CALL = "<tool_call>", "</tool_call>"
# What some models write before a list of calls, unless it is one of their control tokens.
MARK = "[TOOL_CALLS]"
CallKind = Literal["tags", "object", "list"]


@dataclass(frozen=True)
class Thoughts:
    """Text the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True)
class Called:
    """A tool the model wants to be called, with its arguments as JSON text."""

    id: str
    name: str
    arguments: str


Part = Thoughts | Said | Called


class CallStream:
    """Takes `<tool_call>` blocks out of a stream of text; a block that is no call stays text."""

    def __init__(self, *, inside: bool = False) -> None:
        """`inside`: the prompt has already opened a block."""
        self._held, self._inside, self._called = "", inside, False

    def feed(self, text: str, *, last: bool = False) -> list[Said | Called]:
        """Give a new piece of text; get back what is settled."""
        parts: list[Said | Called] = []
        self._held += text
        while True:
            before, found, after = self._held.partition(END_CALL if self._inside else CALL)
            if not found:
                break
            if self._inside:
                parts.append(_call(before) or Said(CALL + before + END_CALL))
            elif words := before.rstrip():
                parts.append(Said(words))
            self._inside, self._held = not self._inside, after
        if self._inside:
            if last:
                parts.append(_call(self._held) or Said(CALL + self._held))
        else:
            kept = 0 if last else beginning_at_end(self._held, (CALL,))
            ready = self._held[: len(self._held) - kept]
            # space waits for what follows it: before a call it belongs to no answer
            if not last or (self._called and not ready.strip()):
                ready = ready.rstrip()
            if ready:
                parts.append(Said(ready))
                self._held = self._held[len(ready) :]
        self._called |= any(isinstance(part, Called) for part in parts)
        return parts


class BareCallStream:
    """Takes an answer that is nothing but calls as JSON: objects one after the other, or a list of them."""

    def __init__(self, kind: CallKind, names: frozenset[str]) -> None:
        self._begin = "{" if kind == "object" else "["
        self._kind, self._names = kind, names
        self._held, self._words = "", False

    def feed(self, text: str, *, last: bool = False) -> list[Said | Called]:
        """Give a new piece of text; get back what is settled."""
        self._held += text
        begun = self._held.lstrip()
        self._words |= bool(begun) and not begun.startswith(self._begin)
        if not self._words and not last:
            return []
        calls = None if self._words else self._calls(begun.removeprefix(MARK))
        held, self._held = self._held, ""
        return list(calls) if calls else [Said(held)] if held else []

    def _calls(self, text: str) -> list[Called] | None:
        """The calls a text consists of, or None where it is anything else."""
        decoder, found, place = json.JSONDecoder(), list[Any](), 0
        while rest := text[place:].lstrip(" \t\r\n;"):
            try:
                value, place = decoder.raw_decode(text, len(text) - len(rest))
            except (ValueError, RecursionError):
                return None
            found += value if isinstance(value, list) else [value]
        calls = [_called(value, self._kind) for value in found]
        known = [call for call in calls if call is not None and call.name in self._names]
        return known if len(known) == len(found) else None


def _call(block: str) -> Called | None:
    try:
        return _called(json.loads(block))
    except (ValueError, RecursionError):
        return None


def _called(call: Any, kind: CallKind = "tags") -> Called | None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    key = "arguments" if kind == "tags" or "arguments" in call else "parameters"
    if kind != "tags" and not isinstance(call.get(key), dict):
        return None
    arguments = call.get(key, {})
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    # templates that write lists of calls refuse ids of another length than nine
    identity = secrets.token_hex(5)[:9] if kind == "list" else f"call_{secrets.token_hex(12)}"
    return Called(identity, call["name"], written)


class PartStream:
    """One sample's text turned into parts while it arrives."""

    def __init__(
        self,
        *,
        reasoning: bool,
        opened: bool,
        calls: CallKind | None = None,
        names: frozenset[str] = frozenset(),
        forced: bool = False,
        single: bool = False,
    ) -> None:
        """`calls`: the form they come in; `names`: of the tools; `single`: only the first call counts."""
        self._reasoning = ReasoningStream(opened=opened) if reasoning else None
        self._calls: CallStream | BareCallStream | None = None
        if calls is not None:
            self._calls = CallStream(inside=forced) if calls == "tags" else BareCallStream(calls, names)
        self._single, self._called = single, False
        self._fresh: dict[type, bool] = {Thoughts: True, Said: False}

    def feed(self, text: str, *, last: bool = False) -> list[Part]:
        """Give a new piece of text; get back what is settled."""
        divided = [("answer", text)] if self._reasoning is None else self._reasoning.feed(text, last=last)
        parts: list[Part] = []
        for kind, piece in divided:
            if kind == "thoughts":
                self._fresh[Said] = True
                parts += self._trimmed(Thoughts(piece))
            else:
                said = [Said(piece)] if self._calls is None else self._calls.feed(piece)
                for part in said:
                    parts += self._trimmed(part)
        if last and self._calls is not None:
            for part in self._calls.feed("", last=True):
                parts += self._trimmed(part)
        return parts

    def _trimmed(self, part: Part) -> list[Part]:
        """White space between the tags and the words they enclose is nobody's text."""
        if isinstance(part, Called):
            spare, self._called = self._single and self._called, True
            return [] if spare else [part]
        kind = type(part)
        text = part.text.lstrip() if self._fresh[kind] else part.text
        if not text:
            return []
        self._fresh[kind] = False
        return [kind(text)]
