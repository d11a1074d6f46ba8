"""How many bytes of UTF-8 each token stands for, so that bits per byte are exact."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_letters() -> dict[str, int]:
    """The letter by which byte-level vocabularies write each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in printable}
    rest = (byte for byte in range(256) if byte not in set(printable))
    return {**letters, **{chr(0x100 + index): byte for index, byte in enumerate(rest)}}


def _kinds(decoder: Any) -> set[str]:
    if not isinstance(decoder, Mapping):
        return set()
    inner = [kind for part in decoder.get("decoders") or [] for kind in _kinds(part)]
    return {str(decoder.get("type")), *inner}


def byte_lengths(
    tokenizer: Mapping[str, Any],
    pieces: Mapping[str, int],
    control: frozenset[int],
    size: int,
    decode: Callable[[int], str],
) -> np.ndarray:
    """The number of bytes of each id in decoded text; control tokens have none."""
    kinds = _kinds(tokenizer.get("decoder"))
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    letters = byte_letters()
    lengths = np.zeros(size, dtype=np.int64)
    for piece, identity in pieces.items():
        if identity in control:
            continue
        if piece in added:
            lengths[identity] = len(piece.encode())
        elif "ByteLevel" in kinds and all(letter in letters for letter in piece):
            lengths[identity] = len(piece)
        elif "ByteFallback" in kinds and _BYTE.fullmatch(piece):
            lengths[identity] = 1
        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
            lengths[identity] = len(piece.replace("▁", " ").encode())
        else:
            lengths[identity] = len(decode(identity).encode())
    return lengths
