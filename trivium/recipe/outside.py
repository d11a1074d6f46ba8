"""What a recipe uses but does not make (folders, models on the hub, data) and its fingerprints."""

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from trivium.data.opening import kind_of
from trivium.data.sources import Source, named_items, read_documents
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import checksum, expanded
from trivium.kit.fingerprint import fingerprint
from trivium.kit.listing import files_below, is_file, is_pattern, matching
from trivium.kit.seals import read_sealed, write_sealed

_SAMPLED = 8
CONVERSATIONS = (".jsonl", ".ndjson", ".json")
"""Endings of files whose rows may name pictures and sounds."""


class Checksums:
    """Checksums of outside files, remembered by size and times of change so that a plan stays quick."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, Any] = {}
        self._changed = False
        if path and path.is_file():
            # What is damaged is no loss: it is found out again.
            with suppress(DamagedError):
                self._known = read_sealed(path)

    def of(self, file: Path) -> str:
        """The checksum of a file, read only if the file changed since the last time."""
        return str(self._found(file, str(file), checksum))

    def items(self, file: Path) -> list[str]:
        """The pictures and sounds that a file names, looked for only if the file changed."""
        if kind_of(file) not in CONVERSATIONS:
            return []
        return list(self._found(file, f"items {file}", named_items))

    def _found(self, file: Path, name: str, find: Callable[[Path], Any]) -> Any:
        facts = file.stat()
        # A copy may bring an old time of change with it; the time at which it took its place is its own.
        key = [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]
        known = self._known.get(name)
        if known is None or known[:-1] != key:
            known = [*key, find(file)]
            self._known[name] = known
            self._changed = True
        return known[-1]

    def keep(self) -> None:
        """Remember for the next process."""
        if self._path and self._changed:
            write_sealed(self._path, self._known)


def locate(name: str, base: Path) -> Path | None:
    """The existing file, folder or pattern a name means, seen from the recipe's folder."""
    if name.startswith("world:"):
        return None
    path = base / expanded(name)
    try:
        found = path.exists() or (is_pattern(str(path)) and next(matching(path), None) is not None)
    except (OSError, ValueError):
        # Too long for a path, or with a letter that none can have.
        return None
    return path if found else None


def is_elsewhere(name: str) -> bool:
    """Whether a name is found when the stage runs: `world:`, a URL, or owner/name on the hub."""
    if name.startswith("world:") or "://" in name:
        return True
    return is_on_the_hub(name)


def is_on_the_hub(name: str) -> bool:
    """Whether a name that is no path here reads `owner/name` or `owner/name@revision`."""
    repository = name.partition("@")[0]
    named = repository.count("/") == 1 and not repository.startswith((".", "/", "~"))
    return named and "://" not in name and ":" not in repository and not name.endswith(("/", "@"))


def check_world(name: str, read: Source | None = None) -> None:
    """Refuse a source of `world:` that could not be read when its turn comes."""
    if name.startswith("world:"):
        read = read or Source(path=name, limit=1)
        once = read if read.limit is None else read.model_copy(update={"limit": min(read.limit, 1)})
        next(read_documents(once), None)


def content_fingerprint(
    name: str,
    base: Path,
    checksums: Checksums,
    splits: Collection[str | None] = (None,),
    pinned: str | None = None,
) -> str:
    """Changes when the content behind a name does; for what lies elsewhere, when its commit or name does."""
    path = locate(name, base)
    if path is None:
        if pinned is not None:
            return fingerprint(["hub", pinned])
        return fingerprint(["elsewhere", name, *(_sample(name, split) for split in splits)])
    files = files_behind(path)
    if not files:
        raise TriviumError(f"{path} is empty; put the data there or name another place.")
    root = path if path.is_dir() else path.parent
    try:
        contents = [[_relative(file, root), checksums.of(file)] for file in files]
        for file in files:
            for item in map(Path, checksums.items(file)):
                if not item.is_file():
                    raise TriviumError(
                        f"{file} names {item}, which is not there: add it or take the row out."
                    )
                contents.append([_relative(item, root), checksums.of(item)])
        return fingerprint(contents)
    except OSError as error:
        raise TriviumError(f"{error.filename or path} cannot be read: {error.strerror or error}.") from error


def files_behind(path: Path) -> list[Path]:
    """The files that a file, folder or pattern stands for, in order."""
    return [path] if path.is_file() else sorted(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return [one for one in files_below(path) if not one.name.startswith(".")]
    return [one for one in matching(path) if is_file(one)]


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def _sample(name: str, split: str | None) -> list[str]:
    """The first documents of `world:`, which tell whether the generator still writes the same."""
    if not name.startswith("world:"):
        return []
    source = Source(path=name, split=split, limit=_SAMPLED)
    return [repr(document) for document in read_documents(source)]
