"""Who works on a result: a process of this machine or another, as it wrote itself down."""

import os
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trivium.kit.errors import TriviumError

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
