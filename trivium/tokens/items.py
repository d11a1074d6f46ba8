"""Pictures and sounds among the tokens: ids above every vocabulary, which name an item by its content.

An id is FIRST + content × 2^14 + place: which item it is, by a hash of its pixels or samples, and which of
its tokens. So packing, masks, prefix sharing and the prefix cache treat items as they treat text: prompts
share a prefix if and only if their pictures are the same. What an id stands for is held in the library, once
for each content; the model looks it up there when it embeds.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trivium.kit.errors import TriviumError

FIRST = 1 << 61
"""Ids from here on are of items; every vocabulary ends far below."""
_PLACE_BITS, _CONTENT_BITS = 14, 46
MOST_TOKENS = 1 << _PLACE_BITS
"""How many tokens one item has at most."""
Kind = Literal["picture", "sound"]


@dataclass(frozen=True, eq=False)
class Item:
    """A picture, uint8 [tiles, height, width, 3], or a sound, int16 [samples], and how many tokens it is."""

    kind: Kind
    data: np.ndarray
    tokens: int

    @property
    def digest(self) -> bytes:
        """A hash of everything that the model sees of it."""
        shape = json.dumps([self.kind, list(self.data.shape), self.tokens]).encode()
        return hashlib.blake2b(shape + np.ascontiguousarray(self.data).tobytes(), digest_size=16).digest()


def content_of_digest(digest: bytes) -> int:
    """The part of a hash that is in an item's ids."""
    return int.from_bytes(digest[:8], "big") >> (64 - _CONTENT_BITS)


def ids_of(content: int, tokens: int) -> list[int]:
    """The ids of an item's tokens, in order."""
    start = FIRST + (content << _PLACE_BITS)
    return list(range(start, start + tokens))


def is_item(token: int) -> bool:
    """Whether an id is of an item."""
    return token >= FIRST


def content_of(token: int) -> int:
    """Which item an id is of."""
    return (token - FIRST) >> _PLACE_BITS


def place_of(token: int) -> int:
    """Which of its item's tokens an id is."""
    return (token - FIRST) & (MOST_TOKENS - 1)


def contents_in(tokens: np.ndarray) -> list[int]:
    """The items among these ids, each once, in the order in which they come."""
    if not len(tokens) or tokens.max() < FIRST:
        return []
    found = (tokens[tokens >= FIRST] - FIRST) >> _PLACE_BITS
    return list(dict.fromkeys(found.tolist()))


def text_only(tokens: np.ndarray) -> np.ndarray:
    """The ids that are of text."""
    return tokens[tokens < FIRST]


class Library:
    """Every item that ids of this process may name, by content.

    Items of tokenised data are read from its folder when they are asked for. Those that arrive otherwise stay
    in memory; the least recently used of them leave once there are more than `limit` bytes.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._held: OrderedDict[int, tuple[bytes, Item]] = OrderedDict()
        self._bytes = 0
        self._stored: dict[int, tuple[Path, dict[str, Any]]] = {}
        self._new: set[int] | None = None
        self._lock = threading.Lock()

    def keep(self, item: Item) -> list[int]:
        """Hold an item, and return the ids that stand for it."""
        digest = item.digest
        content = content_of_digest(digest)
        with self._lock:
            other = self._held.pop(content, None)
            if other is not None and other[0] != digest:
                self._held[content] = other
                raise TriviumError(
                    "Two different pictures or sounds have the same short hash, which happens once in 2^46: "
                    "change one of them a little."
                )
            self._held[content] = (digest, item)
            if other is None:
                self._bytes += item.data.nbytes
                if self._new is not None:
                    self._new.add(content)
            while self.limit is not None and self._bytes > self.limit and len(self._held) > 1:
                _, (_, oldest) = self._held.popitem(last=False)
                self._bytes -= oldest.data.nbytes
        return ids_of(content, item.tokens)

    def get(self, content: int) -> Item:
        """The item of this content."""
        with self._lock:
            held = self._held.get(content)
            if held is not None:
                self._held.move_to_end(content)
                return held[1]
            stored = self._stored.get(content)
        if stored is None:
            raise TriviumError("A picture or sound of the prompt is no longer held in memory: send it again.")
        return _read(*stored)

    @contextmanager
    def passing(self) -> Iterator[Callable[[], None]]:
        """Items that arrive within this block leave at its end, or when what it yields is called.

        So data that is tokenised does not stay in memory. What was held before stays.
        """

        def forget() -> None:
            with self._lock:
                for content in self._new or ():
                    held = self._held.pop(content, None)
                    self._bytes -= 0 if held is None else held[1].data.nbytes
                self._new = set()

        before, self._new = self._new, set()
        try:
            yield forget
        finally:
            forget()
            self._new = before

    def add_stored(self, file: Path, index: Mapping[str, Mapping[str, Any]]) -> None:
        """Let ids name the items in a file of tokenised data."""
        with self._lock:
            for content, facts in index.items():
                self._stored.setdefault(int(content), (file, dict(facts)))


LIBRARY = Library()
"""Items are immutable and named by what they are, so that one library serves a whole process."""


def _read(file: Path, facts: Mapping[str, Any]) -> Item:
    dtype = np.dtype(np.uint8 if facts["kind"] == "picture" else "<i2")
    size = int(np.prod(facts["shape"]))
    try:
        data = np.fromfile(file, dtype, count=size, offset=facts["offset"]).reshape(facts["shape"])
    except (OSError, ValueError) as error:
        raise TriviumError(f"{file} is damaged or gone ({error}): make the stage's data again.") from error
    return Item(facts["kind"], data, facts["tokens"])


class ItemsFile:
    """Writes the items of tokenised data one after the other into a file, each content once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.index: dict[str, dict[str, Any]] = {}
        self._offset = 0

    def add(self, items: Mapping[int, Item]) -> None:
        """Write those that are not in the file yet."""
        new = {content: item for content, item in items.items() if str(content) not in self.index}
        if not new:
            return
        with self.path.open("ab") as file:
            for content, item in new.items():
                data = np.ascontiguousarray(item.data).tobytes()
                file.write(data)
                self.index[str(content)] = {
                    "kind": item.kind, "shape": list(item.data.shape), "tokens": item.tokens,
                    "offset": self._offset,
                }  # fmt: skip
                self._offset += len(data)


def items_of(tokens: np.ndarray) -> dict[int, Item]:
    """The items that these ids name."""
    return {content: LIBRARY.get(content) for content in contents_in(tokens)}


def expanded(
    ids: Sequence[int], turns: Sequence[int], mark: int, items: Iterable[Sequence[int]]
) -> tuple[list[int], list[int]]:
    """Ids and turns with each `mark` replaced by the ids of the next item."""
    coming = iter(items)
    found: list[int] = []
    in_turns: list[int] = []
    for identity, turn in zip(ids, turns, strict=True):
        piece = list(next(coming)) if identity == mark else [identity]
        found += piece
        in_turns += [turn] * len(piece)
    return found, in_turns
