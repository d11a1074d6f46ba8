"""Leases: one machine at a time works on a result, and one that died or sleeps does not block the others.

A lease is a numbered object, `LEASE.1`, `LEASE.2`, ...; the highest number holds. To take one is to create
the next number, which exactly one machine can do. Its holder writes it again every few seconds (the
heartbeat). Another machine that has watched it unchanged for as long as it is good takes the next number: no
clocks are compared. The number is the fencing token: a machine that wakes after its lease was taken over
finds a higher number before it publishes, and publishes nothing.
"""

import json
import math
import os
import signal
import socket
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.places import Place

BOOT, NAMESPACE = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"


class Busy(TriviumError):
    """Another process works on the same result, and this one is not to wait for it."""


@dataclass(frozen=True)
class Holder:
    """The process that works on an entry, as it wrote itself down."""

    pid: int
    host: str
    started: str
    """When it started, in the system's own words; a later process with the same number has another."""
    since: float
    boot: str = ""
    """The boot id of its machine."""
    namespace: str = ""
    """The PID namespace in which its number counts."""
    leased: bool = False
    """Whether it also holds a lease with a heartbeat, which decides where locks do not reach."""

    def __str__(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        who = f"process {self.pid}" if self.pid else "a process"
        return f"{who} on {self.host} (since {since})"


def myself(leased: bool = False) -> Holder:
    """This process."""
    boot, namespace = "", ""
    with suppress(OSError):
        boot, namespace = Path(BOOT).read_text().strip(), os.readlink(NAMESPACE)
    pid = os.getpid()
    return Holder(pid, socket.gethostname(), started(pid) or "", time.time(), boot, namespace, leased)


def has_ended(other: Holder) -> bool:
    """Whether a process is known to be gone: it was one of this machine and of these process numbers."""
    me = myself()
    is_near = bool(me.boot) and (other.boot, other.namespace) == (me.boot, me.namespace)
    return is_near and started(other.pid) != other.started


def started(pid: int) -> str | None:
    """When a process of this machine started, in the system's own words; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return answer.stdout.strip() or None


LEASE = "LEASE."
VARIABLE, SECONDS = "TRIVIUM_LEASE_SECONDS", 60.0
BEATS = 4
"""Heartbeats in the time that a lease is good."""


def lease_seconds() -> float:
    """How long a lease is good after its last heartbeat."""
    written = os.environ.get(VARIABLE, str(SECONDS))
    found = _positive(written)
    if found is None:
        raise TriviumError(f"{VARIABLE}={written} is no time; write seconds, such as {VARIABLE}=60.")
    return found


class LeaseLost(TriviumError):
    """Another machine took the work over, because this one was not heard of for too long."""


class Lease:
    """The right to make one result, as the objects in `folder` of a place say."""

    def __init__(self, place: Place, folder: str, seconds: float = 0.0) -> None:
        self.place, self.folder = place, folder
        self.seconds = seconds or lease_seconds()
        self.number = 0
        """The fencing token, or 0 while another machine or none holds the lease."""
        self._nonce, self._beat, self._renewed = uuid.uuid4().hex, 0, 0.0
        self._seen: tuple[int, bytes | None, float] = (0, None, 0.0)
        self._lost = threading.Event()
        self._done = threading.Event()
        self._ending = threading.Lock()
        self._thread: threading.Thread | None = None

    def take(self) -> Holder | None:
        """Try once to take the lease: None where that succeeded, else who holds it."""
        newest = self._newest()
        content = self.place.read(self._name(newest)) if newest else None
        written = _read(content)
        if newest and not written.get("released"):
            other = _holder(written)
            if self._seen[:2] != (newest, content):
                self._seen = (newest, content, time.monotonic())
            good_for = _positive(written.get("seconds")) or self.seconds
            is_over = time.monotonic() - self._seen[2] >= good_for
            if not is_over and not has_ended(other):
                return other
        self._beat += 1
        now = time.monotonic()
        if not self.place.create(self._name(newest + 1), self._content()):
            return _holder(_read(self.place.read(self._name(newest + 1))))
        self.number, self._renewed = newest + 1, now
        for number in range(1, newest + 1):
            self.place.remove(self._name(number))
        return None

    def start(self, interrupts: bool = False) -> None:
        """Send heartbeats from a thread until the lease is released or lost.

        With `interrupts`, the main thread is interrupted as by Ctrl-C once the lease is lost, so that it does
        not go on with work that is no longer its own.
        """
        self._thread = threading.Thread(target=self._beats, args=(interrupts,), daemon=True)
        self._thread.start()

    def _beats(self, interrupts: bool) -> None:
        while not self._done.wait(self.seconds / BEATS):
            try:
                self._renew()
            except (TriviumError, OSError):
                # The network may come back before the lease is over.
                if time.monotonic() - self._renewed >= self.seconds:
                    self._lost.set()
            if self._lost.is_set():
                with self._ending:
                    if interrupts and not self._done.is_set():
                        os.kill(os.getpid(), signal.SIGINT)
                return

    def _renew(self) -> None:
        now = time.monotonic()
        if self._newest() != self.number:
            self._lost.set()
            return
        self._beat += 1
        self.place.write(self._name(self.number), self._content())
        self._renewed = now

    @property
    def lost(self) -> bool:
        """Whether a heartbeat found that another machine has taken over, or was not heard for too long."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise `LeaseLost` unless this machine still holds the lease; asked of the place itself."""
        newest = self._newest()
        if self._lost.is_set() or newest != self.number:
            self._lost.set()
            other = _read(self.place.read(self._name(newest))) if newest > self.number else {}
            who = f" by {_holder(other)}" if other else ""
            raise LeaseLost(
                f"{self.place.url}/{self.folder} was taken over{who}, because this process was not heard of"
                f" for {self.seconds:g} seconds; nothing was written. Run the same command again."
            )

    def release(self, finished: bool) -> None:
        """Let the lease go: removed with the work finished, else marked, so that its number stays taken."""
        with self._ending:
            self._done.set()
        if self._thread is not None:
            self._thread.join(timeout=self.seconds)
        if not self.number or self._lost.is_set() or self._newest() != self.number:
            return
        if finished:
            self.place.remove(self._name(self.number))
        else:
            self.place.write(self._name(self.number), self._content(released=True))
        self.number = 0

    def _newest(self) -> int:
        found = (name.removeprefix(LEASE) for name in self.place.names(self.folder) if name.startswith(LEASE))
        return max((int(number) for number in found if number.isdigit()), default=0)

    def _name(self, number: int) -> str:
        return f"{self.folder}/{LEASE}{number}".lstrip("/")

    def _content(self, **more: Any) -> bytes:
        facts = {
            **asdict(myself(leased=True)),
            "seconds": self.seconds,
            "beat": self._beat,
            "nonce": self._nonce,
        }
        return json.dumps({**facts, **more}).encode()


def _read(content: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(content or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _positive(written: Any) -> float | None:
    """A number of seconds above 0, or None."""
    try:
        found = float(written)
    except (TypeError, ValueError):
        return None
    return found if 0 < found < math.inf else None


def _holder(written: dict[str, Any]) -> Holder:
    known = {name: written[name] for name in Holder.__dataclass_fields__ if name in written}
    try:
        return Holder(**known)
    except TypeError:
        return Holder(0, "another machine", "", time.time())
