"""The parts of a message that are no text: found, read in whatever form they come, and marked in the text."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.tokens.control import MARK
from trivium.tokens.forms import Forms
from trivium.tokens.items import LIBRARY, MOST_TOKENS
from trivium.tokens.pictures import PixelBudget, data_bytes, file_bytes, opened_picture, picture_item
from trivium.tokens.sounds import opened_sound, sound_item

__all__ = ["Forms", "InOrder", "ReadPart", "has_items", "is_part", "read_part", "shown", "taken_out"]

PICTURES = ("image", "image_url", "input_image")
SOUNDS = ("audio", "input_audio", "audio_url")


class ReadPart(dict[str, Any]):
    """A part that was read already, with the tokens that stand for it; no JSON can hold one."""

    def __init__(self, kind: str, ids: list[int]) -> None:
        super().__init__(type=kind)
        self.ids = ids


_NUMBERED = re.compile(re.escape(MARK) + r"(\d+);")


def is_part(part: Any) -> bool:
    """Whether a part of a message's content is a picture or a sound."""
    return isinstance(part, Mapping) and part.get("type") in (*PICTURES, *SOUNDS)


def has_items(messages: Any) -> bool:
    """Whether some message holds a picture or a sound."""
    return isinstance(messages, (list, tuple)) and any(
        isinstance(one, Mapping)
        and isinstance(one.get("content"), (list, tuple))
        and any(map(is_part, one["content"]))
        for one in messages
    )


def bytes_of(part: Mapping[str, Any]) -> tuple[bytes, str]:
    """The file behind a part, and what to call it: a path, a data URL, or OpenAI's `input_audio`."""
    kind = part["type"]
    what = "picture" if kind in PICTURES else "sound"
    path = part.get("path") or part.get(kind if kind in ("image", "audio") else "")
    if isinstance(path, (str, Path)) and not str(path).startswith("data:"):
        return file_bytes(Path(path).expanduser(), what), str(path)
    inner = part.get(kind)
    if kind == "input_audio" and isinstance(inner, Mapping) and isinstance(inner.get("data"), str):
        return data_bytes(inner["data"], what), f"the {what} in a message"
    url = inner.get("url") if isinstance(inner, Mapping) else inner
    url = path if isinstance(path, str) and path.startswith("data:") else url or part.get("url")
    if isinstance(url, str) and url.startswith("data:") and ";base64," in url:
        return data_bytes(url.partition(";base64,")[2], what), f"the {what} in a message"
    if isinstance(url, str):
        raise TriviumError(
            f"A {what} of a message is at {url[:80]!r}, which is not fetched: give a path or a data URL."
        )
    raise TriviumError(
        f"A part of type {kind!r} has neither a `path` nor a data URL: write "
        f'{{"type": "{"image" if what == "picture" else "audio"}", "path": "..."}}.'
    )


def read_part(part: Mapping[str, Any], forms: Forms, budget: PixelBudget) -> ReadPart:
    """A picture or a sound in a form that is not read again, within what a request may decode."""
    return ReadPart(part["type"], ids_of_part(part, forms, budget))


def ids_of_part(part: Mapping[str, Any], forms: Forms, budget: PixelBudget | None = None) -> list[int]:
    """The tokens of a picture or a sound, which the library holds from here on."""
    if isinstance(part, ReadPart):
        return part.ids
    if part["type"] in PICTURES:
        if forms.picture is None:
            raise TriviumError("The model takes no pictures: train it on some in a `multimodal` stage.")
        pixels = opened_picture(*bytes_of(part), budget)
        item = picture_item(pixels, forms.picture)
        if budget is not None:
            # A small picture may be made large.
            budget.take((item.data.size - pixels.size) // 3)
        if forms.codebook is not None:
            return forms.codebook.ids(item.data[0])
    else:
        if forms.sound is None:
            raise TriviumError("The model takes no sounds: train it on some in a `multimodal` stage.")
        item = sound_item(opened_sound(*bytes_of(part), forms.sound.longest), forms.sound)
    if item.tokens > MOST_TOKENS:
        raise TriviumError(f"A picture or sound would be {item.tokens:,} tokens; at most {MOST_TOKENS:,}.")
    return LIBRARY.keep(item)


def taken_out(
    messages: Sequence[Mapping[str, Any]], forms: Forms | None
) -> tuple[list[Mapping[str, Any]], list[list[int]]]:
    """The messages with a mark in place of each picture and sound, and the tokens of each, in order.

    Where the template writes a token of its own for a part, the part stays and the template marks it.
    """
    if not has_items(messages):
        return list(messages), []
    if forms is None:
        raise TriviumError(
            "The conversation holds pictures or sounds, and the model takes only text: "
            "train it on some in a `multimodal` stage."
        )
    items: list[list[int]] = []
    marked: list[Mapping[str, Any]] = []
    for message in messages:
        content = message.get("content")
        if not has_items([message]):
            marked.append(message)
            continue
        assert isinstance(content, (list, tuple))
        parts: list[Any] = []
        for part in content:
            if not is_part(part):
                parts.append(part)
                continue
            own = forms.picture_token if part["type"] in PICTURES else forms.sound_token
            kind = "image" if part["type"] in PICTURES else "audio"
            parts.append({"type": kind} if own else {"type": "text", "text": f"{MARK}{len(items)};"})
            items.append(ids_of_part(part, forms))
        if any(isinstance(part, Mapping) and part.get("type") in ("image", "audio") for part in parts):
            marked.append({**message, "content": parts})
        else:
            said = "".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))
            marked.append({**message, "content": said})
    return marked, items


class InOrder:
    """The items of a conversation in the order in which its template wrote them.

    The template writes either the numbered marks of the messages or a control token of its own for each item.
    """

    def __init__(self, items: Sequence[list[int]], forms: Forms | None) -> None:
        self._items = items
        own = [one for one in (forms.picture_token, forms.sound_token) if one] if forms else []
        self._pattern = re.compile("|".join([_NUMBERED.pattern, *map(re.escape, own)]))
        self._found: list[list[int]] = []

    def marked(self, text: str) -> str:
        """The next piece of the text, with a bare mark for each item."""

        def bare(match: re.Match[str]) -> str:
            number = len(self._found) if match[1] is None else int(match[1])
            if number >= len(self._items):
                raise TriviumError("The chat template writes more pictures than the conversation holds.")
            self._found.append(self._items[number])
            return MARK

        return self._pattern.sub(bare, text)

    def all_of_them(self) -> list[list[int]]:
        """Every item, once the whole text was marked."""
        if len(self._found) != len(self._items):
            raise TriviumError(
                f"The chat template writes {len(self._found)} of the conversation's {len(self._items)} "
                "pictures and sounds: use a template that knows them."
            )
        return self._found


def shown(rendered: str) -> str:
    """A rendered text for people, with a word for each picture or sound."""
    return _NUMBERED.sub("<item>", rendered)
