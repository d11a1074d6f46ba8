"""A short name for a value: equal values have equal fingerprints, on every machine."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal characters of blake2b over the value's canonical JSON."""
    canonical = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_plain
    )
    return hashlib.blake2b(canonical.encode("utf-8"), digest_size=8).hexdigest()


def seal_of(content: Mapping[str, Any]) -> str:
    """The fingerprint of an object as a JSON file gives it back, where a number need not be finite."""
    read_back = json.loads(json.dumps(content))
    canonical = json.dumps(read_back, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return value.as_posix()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    raise TypeError(f"a {type(value).__name__} has no canonical form")
