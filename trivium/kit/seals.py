"""Seals: one checksum over what a file or a finished folder holds, compared before any of it is used."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from trivium.kit.errors import DamagedError
from trivium.kit.files import checksum, read_object, readable, sync, write_json
from trivium.kit.fingerprint import fingerprint, seal_of

COMPLETE, RECORD = "COMPLETE", "stage.yaml"
_DEEPEST = 4
_THREADS = 4
# The same safe reader in C, where PyYAML was built with it: ten times as fast.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What this process compared already: hashing the weights of a large model takes minutes.
_checked: set[tuple[str, str, int, int, int]] = set()


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with a checksum of itself."""
    write_json(path, {**content, "seal": seal_of(content)})


def read_sealed(path: Path, remedy: str = "make it again.") -> dict[str, Any]:
    """Read what `write_sealed` wrote, or name it as damaged."""
    content = read_object(path)
    if content.pop("seal", None) != seal_of(content):
        raise DamagedError(f"{path} is damaged: it is not what was written; {remedy}")
    return content


def sealed_bytes(content: dict[str, Any]) -> bytes:
    """A JSON object with a checksum of itself, as it is sent to a shared store."""
    return json.dumps({**content, "sealed": seal_of(content)}).encode()


def unsealed(content: bytes, damaged: str) -> dict[str, Any]:
    """What `sealed_bytes` made; `damaged` is said where it is not what was sent."""
    try:
        found: dict[str, Any] = json.loads(content)
        sealed = found.pop("sealed")
    except (ValueError, KeyError, TypeError, AttributeError):
        sealed, found = None, {}
    if sealed != seal_of(found):
        raise DamagedError(damaged)
    return found


def seal_folder(folder: Path, files: Iterable[Path], result: Iterable[Path]) -> None:
    """Write COMPLETE last: the size and checksum of every file, and one checksum of the files in `result`."""
    paths = sorted(files)
    names = [path.relative_to(folder).as_posix() for path in paths]
    # Logs grow row by row: only now do they have to outlive a power cut.
    folders = {above for path in paths for above in path.parents if folder in (above, *above.parents)}
    for place in (*paths, *sorted(folders)):
        sync(place)
    with ThreadPoolExecutor(_THREADS) as threads:
        sums = dict(zip(names, threads.map(checksum, paths), strict=True))
    sizes = {name: path.stat().st_size for name, path in zip(names, paths, strict=True)}
    made = {name: sums[name] for name in sorted(path.relative_to(folder).as_posix() for path in result)}
    write_sealed(folder / COMPLETE, {"files": sums, "sizes": sizes, "result": fingerprint(made)})


def read_seal(folder: Path) -> dict[str, Any]:
    """What COMPLETE says of a finished folder."""
    content = read_object(folder / COMPLETE)
    if content.keys() == {"files"} and isinstance(content["files"], dict):
        # Written by a version that covered the product alone and kept neither sizes nor a seal.
        return {"files": content["files"], "sizes": {}}
    return read_sealed(folder / COMPLETE, f"delete {folder} and run again to make it again.")


def compare(folder: Path, seal: dict[str, Any], name: str) -> None:
    """Name a file of a finished folder that is not what was written; it is read once in a process."""
    path, expected = folder / name, seal["files"][name]
    remedy = f"delete {folder} and run again to make it again."
    with readable(path):
        if not path.is_file():
            raise DamagedError(f"{path} is missing; {remedy}")
        facts = path.stat()
        size = seal["sizes"].get(name, facts.st_size)
        if facts.st_size != size:
            raise DamagedError(f"{path} is damaged: it has {facts.st_size} bytes instead of {size}; {remedy}")
        key = (str(path.absolute()), expected, facts.st_size, facts.st_mtime_ns, facts.st_ino)
        if key not in _checked:
            if checksum(path) != expected:
                raise DamagedError(f"{path} is damaged: its checksum differs; {remedy}")
            _checked.add(key)


def compared(path: Path) -> Path:
    """The same path, once its content is known to be what a finished stage wrote; other files pass."""
    place = path.absolute()
    for folder in list(place.parents)[:_DEEPEST]:
        if (folder / COMPLETE).is_file() and (folder / RECORD).is_file():
            seal, name = read_seal(folder), place.relative_to(folder).as_posix()
            if name in seal["files"]:
                compare(folder, seal, name)
            elif seal["sizes"]:
                raise DamagedError(f"{path} was not written by the stage whose folder holds it; remove it.")
            break
    return path


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """YAML; a record is asked for often, and to parse it takes far longer than to copy it."""
    return yaml.load(text, Loader=_LOADER)


def read_record(folder: Path) -> dict[str, Any]:
    """What a stage wrote of itself in `stage.yaml`, or the file is named as damaged."""
    path = folder / RECORD
    with readable(path):
        try:
            content = copy.deepcopy(_parsed(compared(path).read_text(encoding="utf-8")))
        except (yaml.YAMLError, ValueError, RecursionError):
            content = None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} is damaged: it is no mapping in YAML; delete {folder} and run again.")
    return content
