"""Held-out documents that are trained on under another name: found by their tokens, so none is measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trivium.data.encoding import encode_text
from trivium.data.shards import Shards, marks
from trivium.data.sources import Document
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenisedData:
    """Documents that are trained on, and the folder of their tokenizer where it may be another one."""

    shards: Shards
    tokenizer: Path | None = None


def also_in(
    held: Mapping[str, Shards], learnt: Sequence[TokenisedData], tokenizer: Tokenizer
) -> dict[str, set[int]]:
    """Which documents of held-out splits are, character for character, among those that are trained on."""
    found: dict[str, set[int]] = {name: set() for name in held}
    homes = {name: shards.folder.resolve() for name, shards in held.items()}
    encodings: dict[str, tuple[Places, list[np.ndarray]]] = {}
    for folder, one in {one.shards.folder.resolve(): one for one in learnt}.items():
        # What one reading wrote is apart by the text itself, so only other folders can hold the same text.
        if set(homes.values()) <= {folder}:
            continue
        vocabulary = one.shards.manifest["tokenizer"]
        if vocabulary not in encodings:
            other = None if vocabulary == tokenizer.fingerprint else one.tokenizer
            encodings[vocabulary] = _marked_alike(held, tokenizer, other)
        places, held_marks = encodings[vocabulary]
        # One look at all tokens leaves few documents to be compared.
        for index in np.flatnonzero(np.isin(one.shards.marks, held_marks)).tolist():
            for name, number in places.get(one.shards.document(index).tobytes(), ()):
                if homes[name] != folder:
                    found[name].add(number)
    return found


Places = dict[bytes, list[tuple[str, int]]]
"""Where each text is held out, as a name and a number, by its tokens."""


def _marked_alike(
    held: Mapping[str, Shards], tokenizer: Tokenizer, other: Path | None
) -> tuple[Places, list[np.ndarray]]:
    """Where each text is held out, and the marks of all, as `other` encodes them if it is given."""
    places: Places = {}
    encoder = None if other is None else Tokenizer.load(other)
    for name, shards in held.items():
        for index in range(len(shards)):
            tokens = shards.document(index)
            if encoder is not None:
                text = Document(tokenizer.decode(tokens.tolist()), {}, "")
                tokens = encode_text(text, encoder).tokens
            places.setdefault(tokens.tobytes(), []).append((name, index))
    return places, [marks(np.frombuffer(tokens, dtype=np.int64), np.array([0])) for tokens in places]
