"""Saved states in a shared store: a machine that takes a stage over goes on where the other one was.

    checkpoints/<fingerprint>/<lease>.STATE        the files of the newest saved state, and their parts
    checkpoints/<fingerprint>/<lease>.<checksum>   the parts

A state is what a killed process would have left on this disk, so what goes on from it comes to the same bits.
Each holder of the lease writes under its own number alone, and so one that was taken over while it slept
spoils nothing. All of it is removed when the result is there.
"""

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import checksum
from trivium.kit.numbers import short
from trivium.kit.places import Place
from trivium.kit.seals import COMPLETE, sealed_bytes, unsealed
from trivium.pipeline.lease import LEASE, Lease, LeaseLost
from trivium.pipeline.parts import Parts, inside, landing, settle

STATE = "STATE"
SAVED = "checkpoints"
"""The folder of an entry in which every kind of stage saves what it goes on from."""
LOOK = 2.0
"""Seconds between two looks for a new state."""
REST = 9.0
"""Sending takes at most one part in this many and one of the time."""
_REMEDY = "an earlier one is used, or the stage begins at the start."


class Stopped(Exception):
    """The stage ended while a state of it was sent."""


class SavedStates:
    """The saved states of one result, as the machines that worked on it left them."""

    def __init__(self, place: Place, fingerprint: str) -> None:
        self._place, self._folder = place, f"checkpoints/{fingerprint}"
        self._sent: list[Any] = []
        self._has_failed = False
        self._done = threading.Event()

    def fetch(self, entry: Path, say: Callable[[str], None]) -> None:
        """Bring the newest state here if it is ahead of what is here; the caller holds lock and lease."""
        for number in sorted(self._numbers(), reverse=True):
            name = f"{self._folder}/{number}.{STATE}"
            try:
                files = self._read(name)
                if files is None or progress(files) <= progress(_names(entry)):
                    continue
                beside, moved = landing(entry), 0
                for file, (expected, digests) in files.items():
                    path = beside / inside(f"{self._place.url}/{name}", file)
                    if not (path.is_file() and checksum(path) == expected):
                        moved += self._parts(number).pull(path, digests, expected, entry.name)
            except DamagedError as error:
                say(str(error))
                continue
            settle(beside, entry, files)
            say(f"{entry.name}: what another machine saved is used ({short(moved)}B)")
            return

    @contextmanager
    def following(self, entry: Path, lease: Lease, say: Callable[[str], None]) -> Iterator[None]:
        """Send every state that the stage saves meanwhile, from a thread; one that stops sends its last."""
        self._done.clear()
        thread = threading.Thread(target=self._follow, args=(entry, lease, say), daemon=True)
        thread.start()
        try:
            yield
        except KeyboardInterrupt:
            self._end(thread)
            if not lease.lost:
                self._done.clear()
                self._try_to_send(entry, lease, say)
            raise
        finally:
            self._end(thread)

    def clear(self) -> None:
        """Remove all states: the result is there."""
        for name in self._place.names(self._folder):
            self._place.remove(f"{self._folder}/{name}")

    def _end(self, thread: threading.Thread) -> None:
        self._done.set()
        thread.join()

    def _follow(self, entry: Path, lease: Lease, say: Callable[[str], None]) -> None:
        pause = LOOK
        while not self._done.wait(pause) and not lease.lost:
            begun = time.monotonic()
            self._try_to_send(entry, lease, say)
            pause = max(LOOK, REST * (time.monotonic() - begun))

    def _try_to_send(self, entry: Path, lease: Lease, say: Callable[[str], None]) -> None:
        """Send the state; where that fails, the stage goes on all the same."""
        # The stage may put a newer file in place of one that is sent, and the next look finds that.
        with suppress(Stopped, LeaseLost, FileNotFoundError):
            try:
                self._send(entry, lease)
            except LeaseLost:
                raise
            except TriviumError as error:
                if not self._has_failed:
                    say(f"{entry.name}: its saved state could not be shared ({error})")
                self._has_failed = True

    def _send(self, entry: Path, lease: Lease) -> None:
        """Send the state that is saved now, unless it was sent before."""

        def may() -> None:
            if self._done.is_set():
                raise Stopped
            lease.check()

        saved = _signature(entry)
        if not saved or saved == self._sent:
            return
        parts = self._parts(lease.number)
        with _linked(entry) as copy:
            sent = {name: parts.push(copy / name, may) for name in _names(copy)}
        content = sealed_bytes({"files": {name: [one.checksum, one.parts] for name, one in sent.items()}})
        may()
        self._place.write(f"{self._folder}/{lease.number}.{STATE}", content)
        self._sent = saved
        ours = [STATE, *(digest for one in sent.values() for digest in one.parts)]
        kept = {f"{lease.number}.{one}" for one in ours}
        for name in self._place.names(self._folder):
            if _number(name) <= lease.number and name not in kept:
                self._place.remove(f"{self._folder}/{name}")

    def _parts(self, number: int) -> Parts:
        return Parts(self._place, lambda digest: f"{self._folder}/{number}.{digest}", _REMEDY)

    def _numbers(self) -> set[int]:
        return {_number(name) for name in self._place.names(self._folder) if name.endswith(f".{STATE}")}

    def _read(self, name: str) -> dict[str, tuple[str, list[str]]] | None:
        content = self._place.read(name)
        if content is None:
            return None
        found = unsealed(content, f"{self._place.url}/{name} is damaged; {_REMEDY}")
        return {file: (expected, digests) for file, (expected, digests) in found["files"].items()}


def progress(names: Iterable[str]) -> int:
    """How far a state is: the steps of its newest checkpoint, 0 where it counts none, -1 without a state."""
    found = -1
    for name in names:
        folder, _, rest = name.partition("/")
        if folder == SAVED and rest:
            step = rest.partition("/")[0].removeprefix("step-")
            found = max(found, int(step) if step.isdigit() else 0)
    return found


def _number(name: str) -> int:
    number = name.partition(".")[0]
    return int(number) if number.isdigit() else 0


def _names(folder: Path) -> list[str]:
    """The files from which a stage goes on; of several checkpoints the newest alone."""
    old = set(sorted((folder / SAVED).glob("step-*"))[:-1])
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        is_hidden = any(part.startswith(".") for part in parts)
        is_left = not is_hidden and parts[0] not in ("LOCK", COMPLETE) and not parts[0].startswith(LEASE)
        if is_left and path.is_file() and not path.is_symlink() and not old.intersection(path.parents):
            found.append("/".join(parts))
    return found


def _signature(folder: Path) -> list[Any]:
    """What changes when a stage saves something."""
    files = [folder / name for name in _names(folder) if name.startswith(f"{SAVED}/")]
    return [(str(path), facts.st_mtime_ns, facts.st_size) for path in files for facts in (path.stat(),)]


@contextmanager
def _linked(entry: Path) -> Iterator[Path]:
    """The files as they are now under other names, which the stage does not remove while they are sent."""
    copy = entry.with_name(f".{entry.name}.state")
    shutil.rmtree(copy, ignore_errors=True)
    try:
        for name in _names(entry):
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(entry / name, target)
            except FileNotFoundError:
                raise
            except OSError:
                shutil.copyfile(entry / name, target)
        yield copy
    finally:
        with suppress(OSError):
            shutil.rmtree(copy)
