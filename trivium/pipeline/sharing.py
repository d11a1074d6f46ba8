"""A store that several machines share: results by fingerprint, each seen only when all of it is there.

    parts/<2>/<checksum>               what files are made of, at most 32 MiB each, named by their content
    results/<fingerprint>/COMPLETE     names, sizes and checksums of an entry's files, created last
    results/<fingerprint>/LEASE.<n>    who makes it (`lease`)

A part has the name of its content, so a push that was cut off goes on with what is missing, and two machines
can never write different content under one name. COMPLETE is created only where there is none: the first
whole result stays, and nothing is ever overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import bare_name, checksum, make_folder, sync
from trivium.kit.fingerprint import seal_of
from trivium.kit.numbers import short
from trivium.kit.places import Place, place_at
from trivium.kit.processes import world
from trivium.kit.seals import COMPLETE, RECORD, compare, read_seal
from trivium.pipeline.holder import Busy
from trivium.pipeline.lease import Lease, LeaseLost
from trivium.pipeline.store import Entry, Store

PART_BYTES = 32 << 20
"""Small enough that one request writes a part, and that what is cut off loses little."""
THREADS = 4
LAST = ("metrics.jsonl", RECORD, COMPLETE)
"""What gets its name last when an entry arrives, so that half of one is never taken for work in progress."""


@dataclass
class Moved:
    """What a push or a pull came to."""

    became: str
    files: int = 0
    bytes: int = 0
    """What really went over the wire."""


class SharedStore:
    """Results in a place that other machines reach, too."""

    def __init__(self, url: str | Path | Place) -> None:
        self.place = place_at(url) if isinstance(url, (str, Path)) else url

    def lease(self, fingerprint: str) -> Lease:
        """The right to make this result; taken by one machine at a time."""
        return Lease(self.place, _folder(fingerprint))

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """What COMPLETE says of a result, or None where it is not there, or not whole yet."""
        name = f"{_folder(fingerprint)}/{COMPLETE}"
        content = self.place.read(name)
        if content is None:
            return None
        try:
            found = json.loads(content)
            sealed = found.pop("sealed")
            entry, files, parts = found["entry"], found["seal"]["files"], found["parts"]
        except (ValueError, KeyError, TypeError, AttributeError):
            sealed, found, entry, files, parts = None, {}, "", {}, {}
        if sealed != seal_of(found) or files.keys() != parts.keys():
            raise DamagedError(f"{self.place.url}/{name} is damaged; {_REMEDY}")
        bare_name(f"{self.place.url}/{name}", entry)
        return found

    def push(self, entry: Entry, fingerprint: str, may: Callable[[], None] = lambda: None) -> Moved:
        """Copy a finished entry there, only what is missing; `may` raises if it must not be published."""
        if self.place.size(f"{_folder(fingerprint)}/{COMPLETE}") is not None:
            return Moved("there before")
        return self._push(entry, fingerprint, may)

    def repair(self, entry: Entry, fingerprint: str) -> Moved:
        """The same, and of a result that is there already every part that is missing."""
        manifest = self.manifest(fingerprint)
        if manifest is None:
            return self._push(entry, fingerprint, lambda: None)
        wanted = sorted({digest for parts in manifest["parts"].values() for digest in parts})
        missing = self._missing(wanted)
        if not missing:
            return Moved("there before")
        moved, seal = Moved("repaired", len(missing)), read_seal(entry.folder)
        for name in seal["files"]:
            self._push_file(entry.folder, seal, name, moved)
        if missing := self._missing(missing):
            raise DamagedError(
                f"{self.place.url}/{_part(missing[0])} of {manifest['entry']} is missing, and another run of"
                f" the same stage lies here; remove {_folder(fingerprint)}/{COMPLETE} there and push again."
            )
        return moved

    def _missing(self, digests: list[str]) -> list[str]:
        with ThreadPoolExecutor(THREADS) as threads:
            sizes = threads.map(self.place.size, map(_part, digests))
            return [digest for digest, size in zip(digests, sizes, strict=True) if size is None]

    def _push(self, entry: Entry, fingerprint: str, may: Callable[[], None]) -> Moved:
        seal = read_seal(entry.folder)
        if not seal["sizes"]:
            raise TriviumError(
                f"{entry.folder} was sealed by an older version; run its recipe again to share it."
            )
        moved = Moved("pushed", len(seal["files"]))
        parts = {name: self._push_file(entry.folder, seal, name, moved) for name in seal["files"]}
        content: dict[str, Any] = {"entry": entry.folder.name, "fingerprint": fingerprint}
        content |= {"seal": json.loads((entry.folder / COMPLETE).read_text(encoding="utf-8")), "parts": parts}
        content["sealed"] = seal_of(content)
        may()
        if not self.place.create(f"{_folder(fingerprint)}/{COMPLETE}", json.dumps(content).encode()):
            return Moved("there before")
        return moved

    def _push_file(self, folder: Path, seal: Mapping[str, Any], name: str, moved: Moved) -> list[str]:
        """The names of a file's parts, once all of them are there; the file is compared on the way."""
        whole, parts = hashlib.blake2b(digest_size=16), []
        with open(folder / name, "rb") as file, ThreadPoolExecutor(THREADS) as threads:
            sent = []
            while content := file.read(PART_BYTES):
                whole.update(content)
                parts.append(_digest(content))
                sent.append(threads.submit(self._push_part, parts[-1], content))
                # No more than a few parts are held in memory.
                if len(sent) >= THREADS:
                    moved.bytes += sent.pop(0).result()
            moved.bytes += sum(one.result() for one in sent)
        if whole.hexdigest() != seal["files"][name]:
            compare(folder, dict(seal), name)
            raise DamagedError(f"{folder / name} changed while it was read; run the same command again.")
        return parts

    def _push_part(self, digest: str, content: bytes) -> int:
        name = _part(digest)
        if self.place.size(name) == len(content):
            return 0
        self.place.write(name, content)
        return len(content)

    def pull(self, store: Store, fingerprint: str, target: Entry | None = None) -> Moved:
        """Bring a result into a store of this machine, whose lock on the entry the caller holds.

        Files are compared as they arrive; those of an earlier pull that was cut off are not fetched again.
        """
        manifest = self.manifest(fingerprint)
        if manifest is None:
            return Moved("not there")
        entry = target or Entry(store.folder / manifest["entry"])
        seal, moved = manifest["seal"], Moved("pulled", len(manifest["parts"]))
        beside = store.folder / f".{entry.folder.name}.pull"
        make_folder(beside)
        for name, parts in manifest["parts"].items():
            path = beside / _inside(f"{self.place.url}/{_folder(fingerprint)}/{COMPLETE}", name)
            if not (path.is_file() and checksum(path) == seal["files"][name]):
                moved.bytes += self._pull_file(path, parts, seal["files"][name], manifest["entry"])
        (beside / COMPLETE).write_text(
            json.dumps(seal, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        sync(beside / COMPLETE)
        _settle(beside, entry.folder)
        entry.expose()
        return moved

    def _pull_file(self, path: Path, parts: list[str], expected: str, entry: str) -> int:
        make_folder(path.parent)
        whole = hashlib.blake2b(digest_size=16)
        with open(path, "wb") as file:
            for content in self._parts(parts, entry):
                whole.update(content)
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if whole.hexdigest() != expected:
            raise DamagedError(f"{path.name} of {entry} at {self.place.url} is damaged; {_REMEDY}")
        return path.stat().st_size

    def _parts(self, digests: list[str], entry: str) -> Iterator[bytes]:
        """The content of parts in order, a few of them fetched ahead, each compared with its name."""
        with ThreadPoolExecutor(THREADS) as threads:
            ahead = [threads.submit(self.place.read, _part(digest)) for digest in digests[:THREADS]]
            for number, digest in enumerate(digests):
                content = ahead.pop(0).result()
                if number + THREADS < len(digests):
                    ahead.append(threads.submit(self.place.read, _part(digests[number + THREADS])))
                if content is None or _digest(content) != digest:
                    state = "missing" if content is None else "damaged"
                    raise DamagedError(f"{self.place.url}/{_part(digest)} of {entry} is {state}; {_REMEDY}")
                yield content


def obtain(
    shared: SharedStore,
    store: Store,
    entry: Entry,
    fingerprint: str,
    make: Callable[[Callable[[], None]], str],
    say: Callable[[str], None],
    wait: bool,
) -> str:
    """Pull a result, or make it under a lease and push it; what another machine is making is waited for.

    The caller holds the lock of the entry on this machine. `make` gets a function that it calls before it
    completes the entry, and which raises if the lease was lost meanwhile.
    """
    while True:
        lease = shared.lease(fingerprint)
        if _taken(shared, lease, fingerprint, entry, say, wait):
            lease.start(interrupts=threading.current_thread() is threading.main_thread())
            published = False
            try:
                became = make(lease.check)
                published = shared.push(entry, fingerprint, lease.check).became == "pushed"
                if published:
                    return became
            except (LeaseLost, KeyboardInterrupt):
                if not lease.lost or world().size > 1:
                    raise
                say(f"{entry.folder.name} was taken over by another machine; its result will be used")
            finally:
                lease.release(published)
        else:
            moved = shared.pull(store, fingerprint, entry)
            if moved.became == "pulled":
                say(f"{entry.folder.name}: pulled from {shared.place.url} ({short(moved.bytes)}B)")
                return "pulled"


def _taken(
    shared: SharedStore,
    lease: Lease,
    fingerprint: str,
    entry: Entry,
    say: Callable[[str], None],
    wait: bool,
) -> bool:
    """Whether this process is to make the result; False once it is there."""
    said = False
    while shared.manifest(fingerprint) is None:
        other = lease.take()
        if other is None:
            if shared.manifest(fingerprint) is None:
                return True
            # It was finished between the two looks.
            lease.release(finished=True)
        elif not wait:
            raise Busy(f"{entry.folder.name} is being made by {other}; wait for it.")
        else:
            if not said:
                say(f"{entry.folder.name} is being made by {other}; waiting for it")
            said = True
            time.sleep(min(2.0, lease.seconds / 8))
    return False


def _settle(beside: Path, folder: Path) -> None:
    """Give an entry's files their names, what tells of a whole entry last; the caller holds the lock."""
    (folder / COMPLETE).unlink(missing_ok=True)
    make_folder(folder)
    for old in sorted(folder.iterdir()):
        if old.name != "LOCK" and not old.name.startswith("LEASE."):
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    arrived = sorted(beside.iterdir(), key=lambda path: LAST.index(path.name) if path.name in LAST else -1)
    for path in arrived:
        os.rename(path, folder / path.name)
        if path.name in LAST:
            sync(folder)
    with suppress(OSError):
        beside.rmdir()


def _inside(manifest: str, name: str) -> Path:
    """A file's place in its entry; a name that leads elsewhere is refused."""
    for part in name.split("/"):
        bare_name(manifest, part)
    return Path(name)


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _folder(fingerprint: str) -> str:
    return f"results/{fingerprint}"


def _part(digest: str) -> str:
    return f"parts/{digest[:2]}/{digest}"


_REMEDY = "remove it there and push again from a machine that has this result."
