"""Files that arrive from a shared store, and how they get their names: what tells of a whole entry last."""

import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from trivium.kit.files import bare_name, make_folder, sync
from trivium.kit.seals import COMPLETE, RECORD
from trivium.pipeline.lease import LEASE

LAST = ("metrics.jsonl", RECORD, COMPLETE)
"""What gets its name last when an entry arrives, so that half of one is never taken for work in progress."""


def landing(entry: Path) -> Path:
    """The folder in which an entry's files arrive; what a fetch that was cut off left there is used again."""
    beside = entry.with_name(f".{entry.name}.pull")
    make_folder(beside)
    return beside


def inside(manifest: str, name: str) -> Path:
    """A file's place in its entry; a name that leads elsewhere is refused."""
    for part in name.split("/"):
        bare_name(manifest, part)
    return Path(name)


def settle(beside: Path, folder: Path, names: Iterable[str]) -> None:
    """Give these files their names in an entry, in place of what is there; the caller holds its lock."""
    wanted = {beside / name for name in names}
    for path in sorted(beside.rglob("*"), reverse=True):
        if path.is_dir():
            sync(path)
        elif path not in wanted:
            # Of a fetch that was cut off, when the store held something else.
            path.unlink()
    (folder / COMPLETE).unlink(missing_ok=True)
    make_folder(folder)
    for old in sorted(folder.iterdir()):
        if old.name != "LOCK" and not old.name.startswith(LEASE):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    arrived = sorted(beside.iterdir(), key=lambda path: LAST.index(path.name) if path.name in LAST else -1)
    for path in arrived:
        os.rename(path, folder / path.name)
        if path.name in LAST:
            sync(folder)
    with suppress(OSError):
        beside.rmdir()
