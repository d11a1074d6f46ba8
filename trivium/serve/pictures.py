"""The pictures and sounds of a request: fetched where that is allowed, and each read once."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trivium.generate.chat_fit import PARTS, Overflow, turns_of
from trivium.serve.failures import RequestRefused
from trivium.serve.limits import Limits
from trivium.tokens.parts import PICTURES, Forms, ReadPart, has_items, is_part, read_part
from trivium.tokens.pictures import PixelBudget

Message = Mapping[str, Any]


def url_of(part: Mapping[str, Any]) -> str | None:
    """The URL of a picture that has to be fetched; None where a part holds what it shows."""
    url = part["image_url"]["url"] if part["type"] == "image_url" else "data:"
    return None if url.startswith("data:") else url


def urls_in(messages: Iterable[Message]) -> list[str]:
    """The URLs of pictures that these messages name, each once."""
    parts = [part for one in messages if not isinstance(one["content"], str) for part in one["content"]]
    return list(dict.fromkeys(url for part in parts if (url := url_of(part)) is not None))


def refuse_to_fetch(urls: Sequence[str], limits: Limits) -> None:
    """Refuse URLs where the server fetches none, or not so many."""
    if urls and not limits.allow_fetch:
        problem = (
            "a picture is named by a URL, which this server does not fetch (it was started without "
            "--allow-fetch): send a data URL"
        )
        raise RequestRefused(problem, parameter="messages", code="invalid_image_url")
    if len(urls) > limits.fetched_pictures:
        problem = f"{len(urls)} pictures are named by URLs, at most {limits.fetched_pictures} are fetched"
        raise RequestRefused(problem, parameter="messages", code="array_above_max_length")


def with_fetched(message: Message, pictures: Mapping[str, bytes]) -> Message:
    """The message with the pictures that were fetched in place of their URLs."""
    if not urls_in([message]):
        return message
    parts = []
    for part in message["content"]:
        if (url := url_of(part)) is not None and url in pictures:
            data = base64.b64encode(pictures[url]).decode()
            part = {"type": "image_url", "image_url": {"url": f"data:image/*;base64,{data}"}}
        parts.append(part)
    return {**message, "content": parts}


class _TooManyTokens(Exception):
    """The items that were read so far do not fit into the context."""


class _Reader:
    """Reads items one by one, and stops at the first that would be too much."""

    def __init__(self, forms: Forms, most: int, limits: Limits) -> None:
        self._forms, self._most = forms, most
        self._budget = PixelBudget(limits.picture_pixels, limits.request_pixels)
        self._tokens = 0

    def read(self, message: Message) -> Message:
        if not has_items([message]):
            return message
        return {
            **message,
            "content": [self._part(one) if is_part(one) else one for one in message["content"]],
        }

    def _part(self, part: Mapping[str, Any]) -> ReadPart:
        picture = self._forms.picture if part["type"] in PICTURES else None
        # What a picture takes at least is known before anything of it is decoded.
        if self._tokens + (1 if picture is None else picture.tokens) > self._most:
            raise _TooManyTokens
        found = read_part(part, self._forms, self._budget)
        self._tokens += len(found.ids)
        if self._tokens > self._most:
            raise _TooManyTokens
        return found


def read_items(
    messages: Sequence[Message], forms: Forms | None, context: int, limits: Limits, overflow: Overflow
) -> list[Message]:
    """The messages with every picture and sound read, the newest turn first.

    With `drop`, turns whose items cannot fit any more are left out before those are read.
    """
    if forms is None or not has_items(messages):
        return list(messages)
    most = context
    if overflow == "slide":
        most = limits.prompt_tokens or sys.maxsize
    elif overflow == "summarise":
        most = PARTS * context
    reader = _Reader(forms, most, limits)
    system, turns = turns_of(messages)
    found: dict[int, Message] = {}
    for number, turn in enumerate([system, *reversed(turns)]):
        try:
            found |= {id(one): reader.read(one) for one in turn}
        except _TooManyTokens:
            # The system message and the newest turn always stay.
            if overflow == "drop" and number > 1:
                break
            problem = f"the pictures and sounds have more tokens than the {most} that can be read"
            raise RequestRefused(problem, parameter="messages", code="context_length_exceeded") from None
    return [found[id(one)] for one in messages if id(one) in found]
