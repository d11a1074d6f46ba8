"""One process at a time works on an entry of the store; one that died does not block the next.

The lock is a `flock` on the entry's LOCK file, held as long as the work lasts: the kernel frees it with the
process, whatever namespace or container that runs in. The file says who holds it, for people. On file systems
whose locks do not reach other machines a lease with a heartbeat (`lease`) decides between machines; a LOCK of
another machine without one counts as alive until it is deleted.
"""

import errno
import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from trivium.kit.files import make_folder
from trivium.kit.places import Folder
from trivium.pipeline.lease import Busy, Holder, Lease, myself, started

MOUNTS = "/proc/self/mountinfo"
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


def holder(entry: Path) -> Holder | None:
    """Who works on an entry right now, if anybody."""
    try:
        descriptor = os.open(entry / "LOCK", os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        if _is_ours(descriptor):
            return _read(descriptor)
        return _living(entry / "LOCK", descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _is_ours(descriptor: int) -> bool:
    """Whether this very process holds the lock on an open file: it need not look whether it lets go."""
    with suppress(OSError):
        return any(os.path.samestat(os.fstat(descriptor), os.fstat(held)) for held in tuple(_held))
    return False


@contextmanager
def locked(entry: Path, say: Callable[[str], None], wait: bool = True) -> Iterator[Callable[[], None]]:
    """Hold an entry; while another process does, wait for it, or name it and stop.

    Gives a function that raises `LeaseLost` if the entry is no longer held, to be called before the result
    gets its name.
    """
    make_folder(entry)
    lease = None if reaches_all_machines(entry / "LOCK") else Lease(Folder(entry), "")
    said = False
    while isinstance(taken := _held_by(entry, lease), Holder):
        place = f"{entry.name} is being made by {taken}"
        # A lease ends by itself when it is no longer renewed; what has none ends with the file.
        remedy = "" if taken.leased else f"delete {entry / 'LOCK'} if that machine is gone"
        if not wait:
            raise Busy(f"{place}; wait for it{remedy and f', or {remedy}'}.")
        if not said:
            say(f"{place}; waiting for it{remedy and f' ({remedy})'}")
            said = True
        time.sleep(0.2)
    if lease is not None:
        lease.start(interrupts=threading.current_thread() is threading.main_thread())
    try:
        yield lease.check if lease is not None else _nothing
    except KeyboardInterrupt:
        if lease is not None and lease.lost:
            lease.check()
        raise
    finally:
        _give_back(entry / "LOCK", taken)
        if lease is not None:
            lease.release(finished=False)


def _nothing() -> None:
    """A lock of the kernel's is never lost."""


def _held_by(entry: Path, lease: Lease | None) -> int | Holder:
    """Take the lease, where one is needed, and then the lock; else who holds either."""
    other = lease.take() if lease is not None else None
    if other is not None:
        return other
    taken = _take(entry / "LOCK", leased=lease is not None)
    if isinstance(taken, Holder) and lease is not None:
        lease.release(finished=False)
    return taken


def _take(path: Path, leased: bool) -> int | Holder:
    """The descriptor through which this process now holds the lock, or the living process that does."""
    other: Holder | None = None
    while other is None:
        # Created by one process alone, even where machines see the same file but not each other's locks.
        with suppress(FileExistsError, FileNotFoundError):
            try:
                descriptor, is_new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
            except FileExistsError:
                descriptor, is_new = os.open(path, os.O_RDWR), False
            other = _living(path, descriptor, fcntl.LOCK_EX, is_new or (leased and _is_leased(descriptor)))
            if other is None and _is_named(path, descriptor):
                text = json.dumps(asdict(myself(leased))).encode()
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
    written, me = _read(descriptor), myself()
    if is_new or (written is None and is_supported and reaches_all_machines(path)):
        return None
    if written is None:
        return Holder(0, "another machine", "", time.time())
    is_here = written.boot == me.boot if written.boot else written.host == me.host
    if written.boot and is_supported and (is_here or reaches_all_machines(path)):
        return None
    is_known = is_here and written.namespace in ("", me.namespace)
    return None if is_known and started(written.pid) != written.started else written


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


def _is_leased(descriptor: int) -> bool:
    """Whether the process that wrote the file held a lease as well, which another one has taken since."""
    written = _read(descriptor)
    return written is not None and written.leased


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 1 << 16, 0)))
    except (ValueError, TypeError):
        # Empty, or cut off while it was written.
        return None
