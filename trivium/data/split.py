"""One rule for what is held out: a hash below the share, so that copies never straddle the border."""

import hashlib
import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

import numpy as np

from trivium.data.sources import Document, as_written, items_in, read_documents

Item = TypeVar("Item")
HELD_OUT = "held_out"
"""Where a stage that makes data leaves the part that is to be asked, beside its data."""
MOST_READ = 50_000
"""So many rows of a file are looked at for those that were held out."""


def text_hash(document: Document) -> bytes:
    """Sixteen bytes that equal documents share, wherever they come from."""
    content = document.text
    if content is None:
        said = document.fields.get("messages", document.fields)
        if any(items_in(document.fields)):
            said = as_written(said)
        content = json.dumps(said, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def in_validation(digest: bytes, share: float) -> bool:
    """Whether what has this hash is held out, where `share` of all is."""
    return int.from_bytes(digest[:8], "big") < share * 2.0**64


def prompt_hash(prompt: np.ndarray) -> bytes:
    """Eight bytes that all pairs with the same prompt, token ids [tokens], share."""
    return hashlib.blake2b(np.ascontiguousarray(prompt, dtype="<i8").tobytes(), digest_size=8).digest()


def unseen(data: str, share: float, limit: int) -> list[Document]:
    """The first documents that a stage with this share holds out; all are taken where it holds out none."""
    return first_held(islice(read_documents(data), MOST_READ), text_hash, share, limit)


def first_held(
    items: Iterable[Item], digest: Callable[[Item], bytes], share: float, limit: int
) -> list[Item]:
    """The first items that a share holds out, or of all where that is none; what comes after is not read."""
    first: list[Item] = []
    held: list[Item] = []
    for one in items:
        if len(first) < limit:
            first.append(one)
        if in_validation(digest(one), share):
            held.append(one)
        if len(held if share else first) >= limit:
            break
    return held or first
