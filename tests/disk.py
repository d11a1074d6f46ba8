"""A disk that loses what was not synchronised: what a power cut would leave, after every fsync of a run."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

Loses = Literal["names and content", "content"]


@dataclass(frozen=True)
class Moment:
    """The disk after one fsync: names by folder, as synchronised and as they are, and content."""

    synchronised: Mapping[int, Mapping[str, tuple[int, bool]]]
    names: Mapping[int, Mapping[str, tuple[int, bool]]]
    content: Mapping[int, bytes]


class LossyDisk:
    """Watches every fsync below a folder; a file or folder is known by its inode, as a disk knows it."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.moments: list[Moment] = []
        self._synchronised: dict[int, dict[str, tuple[int, bool]]] = {}
        self._content: dict[int, bytes] = {}
        self._fsync = os.fsync
        patch.setattr(os, "fsync", self._watch)

    def _watch(self, descriptor: int) -> None:
        self._fsync(descriptor)
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            self._synchronised[facts.st_ino] = _names(f"/proc/self/fd/{descriptor}")
        else:
            self._content[facts.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()
        names = {}
        # A folder may be renamed or removed by another thread meanwhile.
        for folder, _, _ in os.walk(self.root):
            with suppress(FileNotFoundError):
                names[Path(folder).stat().st_ino] = _names(folder)
        self.moments.append(Moment(dict(self._synchronised), names, dict(self._content)))

    def after(self, moment: int, place: Path, loses: Loses) -> Path:
        """Write what is left after a power cut at that moment to another place."""
        known = self.moments[moment]
        listed = known.synchronised if loses == "names and content" else known.names
        _rebuild(self.root.stat().st_ino, listed, known.content, place)
        return place


def _names(folder: str | Path) -> dict[str, tuple[int, bool]]:
    with os.scandir(folder) as entries:
        return {one.name: (one.inode(), one.is_dir()) for one in entries if not one.is_symlink()}


def _rebuild(
    inode: int,
    listed: Mapping[int, Mapping[str, tuple[int, bool]]],
    content: Mapping[int, bytes],
    place: Path,
) -> None:
    place.mkdir(parents=True)
    for name, (inside, is_folder) in listed.get(inode, {}).items():
        if is_folder:
            _rebuild(inside, listed, content, place / name)
        else:
            (place / name).write_bytes(content.get(inside, b""))
