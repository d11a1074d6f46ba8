"""A SentencePiece model (`tokenizer.model`) as the content of a `tokenizer.json` that gives the same ids.

Older checkpoints ship this file alone. It is a protocol buffer: a list of pieces with a score and a type
each, whether they are merged (BPE) or chosen by the likeliest path (Unigram), and how text is normalised. The
few fields needed are read here, so that neither SentencePiece nor protobuf has to be installed.
"""

import base64
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.kit.errors import DamagedError, TriviumError
from trivium.tokens.gguf import (
    BYTE,
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Json,
    added_token,
    begin_with,
    bpe_model,
    complete,
    merges_by_score,
)

UNIGRAM, BPE = 1, 2
PIECES, TRAINER, NORMALISER = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK = 3, 35
IDS = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
"""The numbers of the fields that hold the ids of named pieces, and their defaults."""
CHARACTER_MAP, DUMMY_PREFIX, EXTRA_SPACES = 2, 3, 4


@dataclass
class SentencePiece:
    """What a file says."""

    pieces: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    trainer: dict[int, Any] = field(default_factory=dict)
    normaliser: dict[int, Any] = field(default_factory=dict)

    def named(self, role: str) -> str | None:
        """The piece that ends texts, begins them, or stands for what is unknown or padded."""
        number, default = IDS[role]
        identity = _signed(self.trainer.get(number, default))
        return self.pieces[identity] if 0 <= identity < len(self.pieces) else None


def read_sentencepiece(path: Path) -> SentencePiece:
    """The file's pieces and settings."""
    found = SentencePiece()
    try:
        for number, value in _fields(path.read_bytes()):
            if number == PIECES:
                piece = dict(_fields(value))
                found.pieces.append(piece[1].decode())
                found.scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                found.types.append(piece.get(3, 1))
            elif number == TRAINER:
                found.trainer = dict(_fields(value))
            elif number == NORMALISER:
                found.normaliser = dict(_fields(value))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, struct.error):
        raise DamagedError(
            f"{path} is no SentencePiece model: put the model's tokenizer.json beside its weights."
        ) from None
    if not found.pieces or len(set(found.pieces)) != len(found.pieces):
        raise DamagedError(f"{path} lists no pieces, or one twice: download it again.")
    return found


def tokenizer_json(path: Path, settings: Mapping[str, Any]) -> tuple[Json, Json]:
    """The content of `tokenizer.json`, and the settings with the names of special tokens filled in.

    `settings` is the content of `tokenizer_config.json`, if there is one: tokens that were added later stand
    there alone, and whether a text begins with a token.
    """
    found = read_sentencepiece(path)
    kind = found.trainer.get(MODEL_TYPE, UNIGRAM)
    if kind not in (UNIGRAM, BPE):
        raise TriviumError(
            f"{path}: only SentencePiece's BPE and Unigram models are read; put a tokenizer.json beside it."
        )
    has_bytes = bool(found.trainer.get(BYTE_FALLBACK, BYTE in found.types))
    unknown = found.named("unk_token")
    if kind == BPE:
        vocabulary = {piece: identity for identity, piece in enumerate(found.pieces)}
        # A piece of another type is never made of others.
        scores = [
            score if kind in (1, BYTE) else float("-inf")
            for score, kind in zip(found.scores, found.types, strict=True)
        ]
        merges = [
            one for one in merges_by_score(found.pieces, scores) if scores[vocabulary["".join(one)]] > -1e30
        ]
        model = bpe_model(vocabulary, merges, byte_fallback=has_bytes, fuse_unk=True)
        model["unk_token"] = unknown
    else:
        model = {
            "type": "Unigram", "unk_id": None if unknown is None else found.pieces.index(unknown),
            "vocab": [[piece, score] for piece, score in zip(found.pieces, found.scores, strict=True)],
            "byte_fallback": has_bytes,
        }  # fmt: skip
    content = {**_spaces(found), "model": model, "added_tokens": _added(found, settings)}
    named = {role: piece for role in IDS if (piece := found.named(role)) is not None}
    settings = {**named, **{key: value for key, value in settings.items() if value is not None}}
    if settings.get("add_bos_token", "bos_token" in named) and named.get("bos_token"):
        content["post_processor"] = begin_with(named["bos_token"], found.pieces)
    settings.pop("tokenizer_class", None)
    return complete(content), settings


def _spaces(found: SentencePiece) -> Json:
    """How text is normalised: characters mapped, spaces counted, written as a letter, one put in front."""
    steps: list[Json] = []
    table = found.normaliser.get(CHARACTER_MAP)
    if table:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()})
    if found.normaliser.get(EXTRA_SPACES, 1):
        steps += [
            {"type": "Strip", "strip_left": True, "strip_right": True},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if found.normaliser.get(DUMMY_PREFIX, 1):
        steps.append({"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoders},
    }


def _added(found: SentencePiece, settings: Mapping[str, Any]) -> list[Json]:
    """Control tokens and those that are always taken whole, and what was added behind the pieces."""
    added = [
        added_token(identity, piece, kind != USER_DEFINED)
        for identity, (piece, kind) in enumerate(zip(found.pieces, found.types, strict=True))
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    later = settings.get("added_tokens_decoder") or {}
    for identity, token in sorted((int(name), token) for name, token in later.items()):
        if identity >= len(found.pieces):
            added.append(added_token(identity, token["content"], bool(token.get("special"))))
    return added


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer's message: numbers, four bytes, or bytes."""
    place = 0
    while place < len(content):
        key, place = _number(content, place)
        kind = key & 7
        if kind == 0:
            value, place = _number(content, place)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, place = _number(content, place)
        if size is None or place + size > len(content):
            raise ValueError("no such field")
        yield key >> 3, content[place : place + size]
        place += size


def _number(content: bytes, place: int) -> tuple[int, int]:
    """A whole number of seven bits to the byte, and where it ends."""
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
        if shift > 63:
            raise ValueError("a number that is too long")


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
