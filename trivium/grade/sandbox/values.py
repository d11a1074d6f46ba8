"""Plain values as JSON and back, so that two processes can pass them without either trusting the other."""

import json
import math
import os
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

LARGEST_FRAME = 8 << 20
_DEEPEST = 100
Special = Callable[[Any], Any]
CHANGEABLE = (list, dict, set, bytearray)
_DICTIONARIES = (dict, OrderedDict, defaultdict, Counter)


class Unplain(Exception):
    """The value is not made of numbers, text, lists, tuples, sets and dictionaries."""


class TooLarge(ValueError):
    """The value does not fit into a message."""


def encode(value: Any, special: Special | None = None, depth: int = 0) -> Any:
    """A plain value in the form that JSON can carry without losing its type; `special` encodes others."""
    kind = type(value)
    if depth > _DEEPEST:
        raise ValueError("a value is nested too deeply to be passed")

    def inner(item: Any) -> Any:
        return encode(item, special, depth + 1)

    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if -(1 << 53) < value < 1 << 53 else {"int": hex(value)}
    if kind is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if kind is complex:
        return {"complex": [repr(value.real), repr(value.imag)]}
    if kind in (bytes, bytearray):
        return {kind.__name__: value.hex()}
    if kind is list:
        return [inner(item) for item in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [inner(item) for item in value]}
    if kind is range:
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    if kind in _DICTIONARIES:
        return {"dict": [[inner(key), inner(item)] for key, item in value.items()]}
    found = special(value) if special is not None else None
    if found is None:
        raise Unplain(f"a value of type {kind.__name__}")
    return found


def decode(value: Any, special: Special | None = None) -> Any:
    """The value that `encode` wrote; ValueError or TypeError for anything else."""

    def inner(item: Any) -> Any:
        return decode(item, special)

    if isinstance(value, list):
        return [inner(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) != 1:
        raise ValueError("a tagged value has one tag")
    ((tag, content),) = value.items()
    if tag == "int":
        return int(content, 16)
    if tag == "float":
        return float(content)
    if tag == "complex":
        return complex(float(content[0]), float(content[1]))
    if tag in ("bytes", "bytearray"):
        return (bytes if tag == "bytes" else bytearray).fromhex(content)
    if tag == "dict":
        return {inner(key): inner(item) for key, item in content}
    if tag == "range":
        return range(*(inner(part) for part in content))
    if tag in ("tuple", "set", "frozenset"):
        return {"tuple": tuple, "set": set, "frozenset": frozenset}[tag](inner(item) for item in content)
    if special is not None:
        return special({tag: content})
    raise ValueError(f"no such tag as {tag!r}")


def identical(expected: Any, given: Any) -> bool:
    """Equality that also asks for the same types all the way down; only a list may stand for a tuple."""
    if isinstance(expected, list | tuple) and isinstance(given, list | tuple):
        return len(expected) == len(given) and all(map(identical, expected, given))
    if type(expected) is not type(given):
        return False
    if isinstance(expected, dict):
        # Equal keys of different types (1 and True) are told apart by the keys themselves.
        kinds = {(type(key), key) for key in expected}
        return kinds == {(type(key), key) for key in given} and all(
            identical(expected[key], given[key]) for key in expected
        )
    if isinstance(expected, set | frozenset):
        return {(type(item), item) for item in expected} == {(type(item), item) for item in given}
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(given)
    return bool(expected == given)


def frame(message: Any) -> bytes:
    """One message as bytes, its length first."""
    content = json.dumps(message).encode()
    if len(content) > LARGEST_FRAME:
        raise TooLarge("a value that is too large")
    return len(content).to_bytes(4, "big") + content


def write_frame(opened: int, message: Any) -> None:
    """Write one message."""
    write(opened, frame(message))


def write(opened: int, content: bytes) -> None:
    """Write all of it."""
    while content:
        content = content[os.write(opened, content) :]


def read_frame(opened: int) -> Any:
    """Read one message; EOFError where the other side is gone or sends what is no message."""
    length = int.from_bytes(_read(opened, 4), "big")
    if length > LARGEST_FRAME:
        raise EOFError("a message is too long")
    try:
        return json.loads(_read(opened, length))
    except (ValueError, RecursionError) as error:
        raise EOFError("what was sent is no message") from error


def _read(opened: int, length: int) -> bytes:
    pieces = []
    while length:
        piece = os.read(opened, min(length, 1 << 16))
        if not piece:
            raise EOFError("the other side is gone")
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)
