"""One process at a time works on an entry of the store; one that died does not block the next.

The lock is a `flock` on the entry's LOCK file, held as long as the work lasts: the kernel frees it with the
process, whatever namespace or container that runs in. The file says who holds it, for people, and for the
file systems whose locks do not reach other machines: there a holder of another boot id counts as alive until
LOCK is deleted.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from trivium.kit.errors import TriviumError
from trivium.kit.files import make_folder

BOOT, NAMESPACE, MOUNTS = "/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid", "/proc/self/mountinfo"
LOCAL = frozenset({
    "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "bcachefs", "f2fs", "overlay", "tmpfs", "ramfs", "vfat",
    "exfat", "ntfs3", "apfs", "hfs", "ufs",
})  # fmt: skip
"""File systems that one machine alone writes to."""
SHARED = frozenset(["nfs", "nfs4", "lustre", "ceph", "gpfs", "gfs2", "ocfs2", "beegfs"])
"""File systems whose locks reach every machine, unless they were mounted with one of these options."""
DEAF = frozenset(("local_lock=flock", "local_lock=all", "nolock", "localflock", "noflock"))
UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)
# A look at the lock holds it for microseconds, and is not to be taken for work on the entry.
_LOOKS, _LOOK_SECONDS = 20, 0.005
_held: set[int] = set()


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

    def __str__(self) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(self.since))
        who = f"process {self.pid}" if self.pid else "a process"
        return f"{who} on {self.host} (since {since})"


def holder(entry: Path) -> Holder | None:
    """Who works on an entry right now, if anybody."""
    try:
        descriptor = os.open(entry / "LOCK", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        return _living(entry / "LOCK", descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


@contextmanager
def locked(entry: Path, say: Callable[[str], None], wait: bool = True) -> Iterator[None]:
    """Hold an entry; while another process does, wait for it, or name it and stop."""
    make_folder(entry)
    said = False
    while isinstance(taken := _take(entry / "LOCK"), Holder):
        place = f"{entry.name} is being made by {taken}"
        if not wait:
            raise TriviumError(f"{place}; wait for it, or delete {entry / 'LOCK'} if that machine is gone.")
        if not said:
            say(f"{place}; waiting for it (delete {entry / 'LOCK'} if that machine is gone)")
            said = True
        time.sleep(0.2)
    try:
        yield
    finally:
        _give_back(entry / "LOCK", taken)


def _take(path: Path) -> int | Holder:
    """The descriptor through which this process now holds the lock, or the living process that does."""
    other: Holder | None = None
    while other is None:
        # Created by one process alone, even where machines see the same file but not each other's locks.
        with suppress(FileExistsError, FileNotFoundError):
            try:
                descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                descriptor, is_new = os.open(path, os.O_RDWR), False
            other = _living(path, descriptor, fcntl.LOCK_EX, is_new)
            if other is None and _is_named(path, descriptor):
                text = json.dumps(asdict(_me())).encode()
                os.pwrite(descriptor, text, 0)
                os.ftruncate(descriptor, len(text))
                _held.add(descriptor)
                return descriptor
            os.close(descriptor)
    return other


def _give_back(path: Path, descriptor: int) -> None:
    """Remove the file before the lock: a process that opened it meanwhile sees that it lost its name."""
    if descriptor in _held:
        if _is_named(path, descriptor):
            path.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """In a forked child: its copies of the descriptors would keep the locks when the parent is gone."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def _living(path: Path, descriptor: int, kind: int, is_new: bool = False) -> Holder | None:
    """The living process that holds the lock; where there is none, this descriptor has it now."""
    is_supported = True
    for look in range(_LOOKS):
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            break
        except OSError as error:
            is_supported = error.errno not in UNSUPPORTED
            if not is_supported:
                break
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            if look == _LOOKS - 1:
                return _read(descriptor) or Holder(0, "this machine", "", time.time())
            time.sleep(_LOOK_SECONDS)
    written, me = _read(descriptor), _me()
    if is_new or (written is None and is_supported and reaches_all_machines(path)):
        return None
    if written is None:
        return Holder(0, "another machine", "", time.time())
    is_here = written.boot == me.boot if written.boot else written.host == me.host
    if written.boot and is_supported and (is_here or reaches_all_machines(path)):
        return None
    is_known = is_here and written.namespace in ("", me.namespace)
    return None if is_known and _started(written.pid) != written.started else written


def reaches_all_machines(path: Path) -> bool:
    """Whether a lock on this file is seen by every machine that sees the file."""
    place = os.path.realpath(path.parent)
    try:
        lines = [line.split(" ") for line in Path(MOUNTS).read_text().splitlines()]
    except OSError:
        return True
    deepest, kind, options = "", "", set()
    for line in lines:
        mount = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), line[4])
        if len(mount) >= len(deepest) and f"{place}/".startswith(f"{mount.rstrip('/')}/"):
            end = line.index("-")
            deepest, kind, options = mount, line[end + 1], {*line[5].split(","), *line[-1].split(",")}
    return kind in LOCAL or (kind in SHARED and not options & DEAF)


def _is_named(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):
        # Empty, or cut off while it was written.
        return None


def _me() -> Holder:
    boot, namespace = "", ""
    with suppress(OSError):
        boot, namespace = Path(BOOT).read_text().strip(), os.readlink(NAMESPACE)
    pid = os.getpid()
    return Holder(pid, socket.gethostname(), _started(pid) or "", time.time(), boot, namespace)


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the system's own words; None if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)
    return answer.stdout.strip() or None
