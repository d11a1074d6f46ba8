"""A store that several machines share: results by fingerprint, each seen only when all of it is there.

    parts/<2>/<checksum>               what files are made of, at most 32 MiB each, named by their content
    results/<fingerprint>/COMPLETE     names, sizes and checksums of an entry's files, created last
    results/<fingerprint>/LEASE.<n>    who makes it (`lease`)
    checkpoints/<fingerprint>/         what it goes on from while it is made (`states`)

A part has the name of its content, so a push that was cut off goes on with what is missing, and two machines
can never write different content under one name. COMPLETE is created only where there is none: the first
whole result stays, and nothing is ever overwritten.
"""

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import bare_name, checksum, sync
from trivium.kit.numbers import short
from trivium.kit.places import Place, place_at
from trivium.kit.processes import world
from trivium.kit.seals import COMPLETE, compare, read_seal, sealed_bytes, unsealed
from trivium.pipeline.lease import Busy, Lease, LeaseLost
from trivium.pipeline.parts import Parts, inside, landing, settle
from trivium.pipeline.states import SavedStates
from trivium.pipeline.store import Entry, Store


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
        self._parts = Parts(self.place, _part, _REMEDY)

    def lease(self, fingerprint: str) -> Lease:
        """The right to make this result; taken by one machine at a time."""
        return Lease(self.place, _folder(fingerprint))

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """What COMPLETE says of a result, or None where it is not there, or not whole yet."""
        name = f"{_folder(fingerprint)}/{COMPLETE}"
        content = self.place.read(name)
        if content is None:
            return None
        damaged = f"{self.place.url}/{name} is damaged; {_REMEDY}"
        found = unsealed(content, damaged)
        try:
            entry, is_whole = found["entry"], found["seal"]["files"].keys() == found["parts"].keys()
        except (KeyError, TypeError, AttributeError):
            raise DamagedError(damaged) from None
        if not is_whole:
            raise DamagedError(damaged)
        if found.get("fingerprint") != fingerprint:
            raise DamagedError(f"{self.place.url}/{name} tells of another result; {_REMEDY}")
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
        missing = self._parts.missing(wanted)
        if not missing:
            return Moved("there before")
        moved, seal = Moved("repaired", len(missing)), read_seal(entry.folder)
        for name in seal["files"]:
            self._push_file(entry.folder, seal, name, moved)
        if missing := self._parts.missing(missing):
            raise DamagedError(
                f"{self.place.url}/{_part(missing[0])} of {manifest['entry']} is missing, and another run of"
                f" the same stage lies here; remove {_folder(fingerprint)}/{COMPLETE} there and push again."
            )
        return moved

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
        may()
        if not self.place.create(f"{_folder(fingerprint)}/{COMPLETE}", sealed_bytes(content)):
            return Moved("there before")
        return moved

    def _push_file(self, folder: Path, seal: Mapping[str, Any], name: str, moved: Moved) -> list[str]:
        """The names of a file's parts, once all of them are there; the file is compared on the way."""
        sent = self._parts.push(folder / name)
        if sent.checksum != seal["files"][name]:
            compare(folder, dict(seal), name)
            raise DamagedError(f"{folder / name} changed while it was read; run the same command again.")
        moved.bytes += sent.bytes
        return sent.parts

    def pull(self, store: Store, fingerprint: str, target: Entry | None = None) -> Moved:
        """Bring a result into a store of this machine, whose lock on the entry the caller holds.

        Files are compared as they arrive; those of an earlier pull that was cut off are not fetched again.
        """
        manifest = self.manifest(fingerprint)
        if manifest is None:
            return Moved("not there")
        entry = target or Entry(store.folder / manifest["entry"])
        seal, moved = manifest["seal"], Moved("pulled", len(manifest["parts"]))
        beside = landing(entry.folder)
        for name, parts in manifest["parts"].items():
            path = beside / inside(f"{self.place.url}/{_folder(fingerprint)}/{COMPLETE}", name)
            if not (path.is_file() and checksum(path) == seal["files"][name]):
                moved.bytes += self._parts.pull(path, parts, seal["files"][name], manifest["entry"])
        (beside / COMPLETE).write_text(
            json.dumps(seal, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        sync(beside / COMPLETE)
        settle(beside, entry.folder, [*manifest["parts"], COMPLETE])
        entry.expose()
        return moved


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
        lease, published = shared.lease(fingerprint), False
        if _taken(shared, lease, fingerprint, entry, say, wait):
            lease.start(interrupts=threading.current_thread() is threading.main_thread())
            states = SavedStates(shared.place, fingerprint)
            try:
                try:
                    states.fetch(entry.folder, say)
                    with states.following(entry.folder, lease, say):
                        became = make(lease.check)
                    published = shared.push(entry, fingerprint, lease.check).became == "pushed"
                    if published:
                        states.clear()
                        return became
                finally:
                    lease.release(published)
            except (LeaseLost, KeyboardInterrupt):
                if not lease.lost or world().size > 1:
                    raise
                say(f"{entry.folder.name} was taken over by another machine; its result will be used")
        else:
            moved = shared.pull(store, fingerprint, entry)
            if moved.became == "pulled":
                say(f"{entry.folder.name}: pulled from {shared.place.url} ({short(moved.bytes)}B)")
                return "pulled"


def _taken(
    shared: SharedStore, lease: Lease, fingerprint: str, entry: Entry, say: Callable[[str], None], wait: bool
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


def _folder(fingerprint: str) -> str:
    return f"results/{fingerprint}"


def _part(digest: str) -> str:
    return f"parts/{digest[:2]}/{digest}"


_REMEDY = "remove it there and push again from a machine that has this result."
