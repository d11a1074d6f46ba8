"""Files, listeners and a process put out by the client, so that a probe can show whether it reaches them."""

import contextlib
import ctypes
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_CONTENT = "bait"
_REMOVE = 0
_NAMES = ("file", "other", "folder", "link", "socket")
# Root's workers are this user: what would be root's own is out of their reach even without isolation.
_NOBODY = 65534
_SLEEPS = """
import ctypes, os, sys, time
try:
    if os.geteuid() == 0:
        user = int(sys.argv[1])
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        # No process may look into one that was another user's, until that one allows it (PR_SET_DUMPABLE).
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
except OSError:
    pass
os.write(1, b"+")
time.sleep(600)
"""


class Bait:
    """What a probe must not reach; anybody may change it, so that nothing but isolation protects it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bait-"))
        self.folder.chmod(0o777)
        for name in ("file", "other"):
            (self.folder / name).write_text(_CONTENT)
            (self.folder / name).chmod(0o666)
        (self.folder / "folder").mkdir(mode=0o777)
        (self.folder / "link").symlink_to("file")
        self.process = _process()
        self.abstract = f"trivium-{secrets.token_hex(8)}"
        self.listeners = [
            _listener(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            _listener(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            _listener(socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")),
            _listener(socket.AF_UNIX, socket.SOCK_STREAM, b"\0" + self.abstract.encode()),
        ]
        if os.geteuid() == 0:
            # Where a container has no other users than root, all of it stays root's.
            with contextlib.suppress(OSError):
                for path in (self.folder, *self.folder.iterdir()):
                    os.chown(path, _NOBODY, _NOBODY, follow_symlinks=False)
        self.before = self._state()
        self.memory = _shared_memory()

    def message(self) -> dict[str, Any]:
        """What the probe is told."""
        ports = [one.getsockname()[1] if one is not None else 0 for one in self.listeners[:2]]
        places = {name: str(self.folder / name) for name in _NAMES}
        return {
            **places,
            "process": self.process.pid,
            "tcp": ports[0],
            "udp": ports[1],
            "abstract": self.abstract,
            "memory": self.memory,
        }

    def damage(self) -> list[str]:
        """What happened to the bait after all."""
        changed = [] if self._state() == self.before else ["changing the user's files"]
        return [*changed, "ending the user's processes"] if self._ended() else changed

    def _ended(self) -> bool:
        """Whether the process is gone or going: on a busy machine it takes a while to end by a signal."""
        status = Path(f"/proc/{self.process.pid}/status")
        while self.process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            if any(int(fields[name], 16) for name in ("SigPnd", "ShdPnd")):
                return True
            # One that is running may be on its way out.
            if fields["State"].strip()[0] not in "RD":
                return False
            time.sleep(0.001)
        return True

    def remove(self) -> None:
        """Take it in again."""
        self.process.kill()
        self.process.wait()
        for one in self.listeners:
            if one is not None:
                one.close()
        if self.memory >= 0:
            ctypes.CDLL(None).shmctl(self.memory, _REMOVE, None)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _state(self) -> list[Any]:
        found = []
        for path in sorted(self.folder.iterdir()):
            about = path.lstat()
            found.append(
                (path.name, about.st_mode, about.st_size, about.st_mtime_ns, about.st_uid, about.st_nlink)
            )
        return found


def _process() -> subprocess.Popen[bytes]:
    """A process that belongs to the user who the workers are, once it says so."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SLEEPS, str(_NOBODY)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as said:
        said.read(1)
    return process


def _listener(family: int, kind: int, address: Any) -> socket.socket | None:
    """A socket that listens, where the machine has sockets of this kind."""
    one = None
    with contextlib.suppress(OSError):
        one = socket.socket(family, kind)
        one.bind(address)
        if kind == socket.SOCK_STREAM:
            one.listen()
    if one is not None and family == socket.AF_UNIX and isinstance(address, str):
        os.chmod(address, 0o777)
    return one


def _shared_memory() -> int:
    """A piece of shared memory that everybody may attach, or -1 where there is none."""
    try:
        return int(ctypes.CDLL(None).shmget(0, 4096, 0o1666))
    except AttributeError:
        return -1
