"""The files below a folder or behind a pattern; a search that would go through a whole disk is refused."""

import glob
import os
import re
from collections.abc import Iterator
from fnmatch import translate
from pathlib import Path

from trivium.kit.errors import TriviumError

MOST_LISTED = 1_000_000


class _Count:
    """How many names have been listed for one search."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.listed = 0

    def add(self, names: int) -> None:
        self.listed += names
        if self.listed > MOST_LISTED:
            raise TriviumError(
                f"{self.place} goes through more than {MOST_LISTED:,} files; name a folder nearer to them."
            )


def files_below(folder: Path) -> Iterator[Path]:
    """Every file in a folder and the folders in it; links to other folders are not followed."""
    count = _Count(str(folder))
    for above, folders, names in os.walk(folder):
        count.add(len(folders) + len(names))
        for name in names:
            path = Path(above, name)
            if is_file(path):
                yield path


def is_file(path: Path) -> bool:
    """Whether a path is a file; one that this user may not look at is named."""
    try:
        return path.is_file()
    except OSError as error:
        raise TriviumError(f"{path} cannot be read: {error.strerror or error}.") from error


def is_pattern(name: str) -> bool:
    """Whether a name has signs that stand for other letters."""
    return glob.has_magic(name)


def matching(pattern: Path | str) -> Iterator[Path]:
    """What `glob.glob(pattern, recursive=True)` finds, one path at a time and each once."""
    parts = Path(pattern).parts
    start = parts[:1] if Path(pattern).is_absolute() else ()
    seen: set[str] = set()
    for place in _below("".join(start), list(parts[len(start) :]), _Count(str(pattern))):
        if place and place not in seen:
            seen.add(place)
            yield Path(place)


def _below(folder: str, parts: list[str], count: _Count) -> Iterator[str]:
    """The paths below a folder that fit the parts of a pattern."""
    if not parts:
        yield folder
        return
    part, rest = parts[0], parts[1:]
    if part == "**":
        yield from _below(folder, rest, count)
        for name, is_folder in _listed(folder, count):
            if name.startswith("."):
                continue
            if is_folder:
                yield from _below(os.path.join(folder, name), parts, count)
            elif not rest:
                yield os.path.join(folder, name)
    elif not glob.has_magic(part):
        place = os.path.join(folder, part)
        if os.path.isdir(place) if rest else os.path.lexists(place):
            yield from _below(place, rest, count)
    else:
        fits = re.compile(translate(part)).match
        for name, is_folder in _listed(folder, count):
            if fits(name) and (part.startswith(".") or not name.startswith(".")) and (is_folder or not rest):
                yield from _below(os.path.join(folder, name), rest, count)


def _listed(folder: str, count: _Count) -> list[tuple[str, bool]]:
    """The names in a folder and which of them are folders; none where it cannot be listed."""
    try:
        with os.scandir(folder or ".") as entries:
            names = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError:
        return []
    count.add(len(names))
    return names
