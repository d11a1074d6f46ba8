"""One process at a time works on an entry of the store; one that died does not block the next."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from trivium.kit.errors import TriviumError


@dataclass(frozen=True)
class Holder:
    """The process that works on an entry; its start time tells it from a later one with the same number."""

    pid: int
    host: str
    started: str
    since: float

    def is_gone(self) -> bool:
        """Whether that process has ended; one on another machine cannot be asked and counts as alive."""
        return self.host == socket.gethostname() and _started(self.pid) != self.started

    def __str__(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host} (since {since})"


def holder(entry: Path) -> Holder | None:
    """Who works on an entry right now, if anybody."""
    found = _read(entry / "LOCK")
    return None if found is None or found.is_gone() else found


@contextmanager
def locked(entry: Path, say: Callable[[str], None], wait: bool = True) -> Iterator[None]:
    """Hold an entry; while another process does, wait for it, or name it and stop."""
    entry.mkdir(parents=True, exist_ok=True)
    told = False
    while (other := _take(entry)) is not None:
        place = f"{entry.name} is being made by {other}"
        if not wait:
            raise TriviumError(f"{place}; wait for it, or delete {entry / 'LOCK'} if that machine is gone.")
        if not told:
            say(f"{place}; waiting for it (delete {entry / 'LOCK'} if that machine is gone)")
            told = True
        time.sleep(0.2)
    try:
        yield
    finally:
        (entry / "LOCK").unlink(missing_ok=True)


def _take(entry: Path) -> Holder | None:
    """Put this process into the lock file unless a living one stands there, who is returned."""
    path = entry / "LOCK"
    with open(entry / ".guard", "w") as guard:
        # The guard is held for microseconds and freed by the kernel, so reading and writing are one step.
        fcntl.flock(guard, fcntl.LOCK_EX)
        other = _read(path)
        if other is not None and not other.is_gone():
            return other
        me = Holder(os.getpid(), socket.gethostname(), _started(os.getpid()) or "", time.time())
        path.write_text(json.dumps(asdict(me)))
    return None


def _read(path: Path) -> Holder | None:
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        # Absent, or cut off while being written by a process that died: nobody's lock.
        return None


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the system's own words; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return answer.stdout.strip() or None
