"""What a hostile program would try first, tried by a worker before any program is trusted to the isolation.

The client puts out a `Bait`: files, listeners and a process of its own, which no attempt may reach.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

Deed = Callable[[], Any]

READ, LEARN, CHANGE = "read files", "learn about files", "change files"
START, SIGNAL, CONNECT = (
    "start processes",
    "signal or trace processes",
    "reach the network or other processes",
)
KERNEL, LIMITS = "use more of the kernel", "raise its limits"
GROUPS = (READ, LEARN, CHANGE, START, SIGNAL, CONNECT, KERNEL, LIMITS)

_library = ctypes.CDLL(None, use_errno=True)
# Calls with the same number on every processor, and then those that differ.
_NUMBERS = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "fsopen": 430, "pidfd_open": 434,
    "openat2": 437, "mount_setattr": 442, "memfd_secret": 447,
}  # fmt: skip
_OTHERS = {
    "x86_64": {
        "bpf": 321,
        "perf_event_open": 298,
        "userfaultfd": 323,
        "keyctl": 250,
        "name_to_handle_at": 303,
    },
    "aarch64": {
        "bpf": 280,
        "perf_event_open": 241,
        "userfaultfd": 282,
        "keyctl": 219,
        "name_to_handle_at": 264,
    },
}
_HERE = -100
_ATTACH, _DETACH = 16, 17


def attempts(bait: dict[str, Any]) -> Iterator[tuple[str, str, Deed]]:
    """Each attempt: its group, its name, and a deed that fails where the isolation holds."""
    yield from _files(bait)
    yield from _processes()
    yield from _signals(bait["process"])
    yield from _connections(bait)
    yield from _kernel()
    yield from _limits()
    # Last, since it takes the probe with it where it succeeds.
    yield START, "exec", _exec


def _files(bait: dict[str, Any]) -> Iterator[tuple[str, str, Deed]]:
    file, folder = bait["file"], os.path.dirname(bait["file"])
    for name in (file, "/etc/passwd", "/proc/self/maps", "/proc/1/environ", "/sys/kernel"):
        yield READ, f"opening {_shown(name, file)}", partial(os.open, name, os.O_RDONLY)
    yield READ, "listing the user's files", lambda: os.listdir(folder)
    yield LEARN, "stat", lambda: os.stat(file)
    yield LEARN, "lstat", lambda: os.lstat(file)
    yield LEARN, "access", lambda: _truth(os.access(file, os.R_OK))
    yield LEARN, "readlink", lambda: os.readlink(bait["link"])
    yield LEARN, "statfs", lambda: os.statvfs(folder)
    yield LEARN, "opening a path alone", lambda: os.fstat(os.open(file, os.O_PATH))
    yield LEARN, "entering a folder", lambda: os.chdir(folder)
    yield LEARN, "name_to_handle_at", lambda: _handle(file)
    yield CHANGE, "opening for writing", lambda: os.open(file, os.O_WRONLY)
    yield CHANGE, "opening and emptying", lambda: os.open(file, os.O_WRONLY | os.O_TRUNC)
    yield CHANGE, "truncate", lambda: os.truncate(file, 0)
    yield CHANGE, "utime", lambda: os.utime(file, (1, 1))
    yield CHANGE, "chmod", lambda: os.chmod(file, 0o600)
    yield CHANGE, "chown", lambda: os.chown(file, 1, 1)
    yield CHANGE, "setxattr", lambda: os.setxattr(file, "user.probe", b"1")
    yield CHANGE, "creating a file", lambda: os.open(f"{folder}/new", os.O_WRONLY | os.O_CREAT)
    yield CHANGE, "a nameless file", lambda: os.open(folder, os.O_WRONLY | os.O_TMPFILE)
    yield CHANGE, "mkdir", lambda: os.mkdir(f"{folder}/new-folder")
    yield CHANGE, "mknod", lambda: os.mkfifo(f"{folder}/new-pipe")
    yield CHANGE, "symlink", lambda: os.symlink("file", f"{folder}/new-link")
    yield CHANGE, "link", lambda: os.link(file, f"{folder}/new-name")
    yield CHANGE, "rename", lambda: os.rename(bait["other"], f"{folder}/renamed")
    yield CHANGE, "unlink", lambda: os.unlink(bait["link"])
    yield CHANGE, "rmdir", lambda: os.rmdir(bait["folder"])
    yield CHANGE, "writing to Python's files", lambda: os.open(os.__file__, os.O_RDWR)
    yield (
        CHANGE,
        "writing to the folder of temporary files",
        lambda: os.open("/tmp", os.O_RDWR | os.O_TMPFILE),
    )


def _shown(name: str, file: str) -> str:
    return "the user's file" if name == file else name


def _processes() -> Iterator[tuple[str, str, Deed]]:
    yield START, "fork", _fork
    yield START, "clone", lambda: _clone(signal.SIGCHLD)
    yield START, "clone to the parent's parent", lambda: _clone(0x8000 | signal.SIGCHLD)


def _signals(process: int) -> Iterator[tuple[str, str, Deed]]:
    yield SIGNAL, "kill", lambda: os.kill(process, 0)
    yield SIGNAL, "killing a group", lambda: os.killpg(process, 0)
    yield SIGNAL, "tgkill", lambda: _call("tgkill", process, process, 0)
    yield SIGNAL, "sigqueue", lambda: _library_call("sigqueue", process, 0, 0)
    yield SIGNAL, "pidfd_open", lambda: _call("pidfd_open", process, 0)
    yield SIGNAL, "a signal to a group for every byte", lambda: _own(-process)
    yield SIGNAL, "a signal to an owner (F_SETOWN_EX)", lambda: _own_by_struct(process)
    yield SIGNAL, "a lease on a file", lambda: _lease()
    yield SIGNAL, "ptrace", lambda: _trace(process)
    yield SIGNAL, "reading memory", lambda: _read_memory(process)
    yield SIGNAL, "setpriority", lambda: os.setpriority(os.PRIO_PROCESS, process, 19)
    yield SIGNAL, "sched_setaffinity", lambda: os.sched_setaffinity(process, {0})
    yield SIGNAL, "sched_getaffinity", lambda: os.sched_getaffinity(process)
    yield SIGNAL, "setting another's limits", lambda: resource.prlimit(process, resource.RLIMIT_CORE, (0, 0))
    yield SIGNAL, "reading another's limits", lambda: resource.prlimit(process, resource.RLIMIT_CORE)
    yield SIGNAL, "getpgid", lambda: os.getpgid(process)
    yield SIGNAL, "getsid", lambda: os.getsid(process)
    # Last, since it ends the process where it succeeds.
    yield SIGNAL, "a signal for every byte (F_SETOWN, F_SETSIG, O_ASYNC)", lambda: _signal_by_pipe(process)


def _connections(bait: dict[str, Any]) -> Iterator[tuple[str, str, Deed]]:
    yield CONNECT, "TCP", lambda: _connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", bait["tcp"]))
    yield CONNECT, "UDP", lambda: _send(("127.0.0.1", bait["udp"]))
    yield CONNECT, "a Unix socket", lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, bait["socket"])
    yield (
        CONNECT,
        "an abstract socket",
        lambda: _connect(socket.AF_UNIX, socket.SOCK_STREAM, b"\0" + bait["abstract"].encode()),
    )
    yield CONNECT, "netlink", lambda: _netlink()
    yield CONNECT, "shared memory", lambda: _attach(bait["memory"])


def _kernel() -> Iterator[tuple[str, str, Deed]]:
    for family, kind in ((1, 1), (2, 1), (2, 2), (10, 1), (16, 3), (17, 3), (38, 5), (40, 1)):
        yield KERNEL, f"a socket of family {family}, kind {kind}", partial(_socket, family, kind)
    yield KERNEL, "socketpair", socket.socketpair
    yield KERNEL, "unshare", lambda: _library_call("unshare", 0x10000000)
    yield KERNEL, "setns", lambda: _library_call("setns", os.open("/proc/self/ns/net", os.O_RDONLY), 0)
    yield KERNEL, "mount", lambda: _library_call("mount", b"none", b"/", b"tmpfs", 0, None)
    yield KERNEL, "chroot", lambda: os.chroot("/")
    yield KERNEL, "setuid", _become_root
    yield KERNEL, "capset", lambda: _library_call("capset", struct.pack("=Ii", 0x20080522, 0), bytes(24))
    yield KERNEL, "memfd_create", lambda: os.memfd_create("probe")
    yield KERNEL, "shmget", lambda: _library_call("shmget", 0, 4096, 0o1600)
    yield KERNEL, "msgget", lambda: _library_call("msgget", 0, 0o1600)
    yield KERNEL, "inotify", lambda: _library_call("inotify_init1", 0)
    yield KERNEL, "bpf", lambda: _call("bpf", 0, struct.pack("=IIII", 2, 4, 4, 1) + bytes(48), 64)
    yield (
        KERNEL,
        "perf_event_open",
        lambda: _call("perf_event_open", bytes(4) + b"\x70\0\0\0" + bytes(120), 0, -1, -1, 0),
    )
    yield KERNEL, "userfaultfd", lambda: _call("userfaultfd", 1)
    yield KERNEL, "keyctl", lambda: _call("keyctl", 0, -3, 1)
    yield KERNEL, "io_uring", lambda: _call("io_uring_setup", 1, bytes(120))
    yield KERNEL, "fsopen", lambda: _call("fsopen", b"tmpfs", 0)
    yield KERNEL, "memfd_secret", lambda: _call("memfd_secret", 0)
    yield KERNEL, "openat2", lambda: _call("openat2", _HERE, b"/", struct.pack("=QQQ", 0, 0, 0), 24)
    yield KERNEL, "personality", lambda: _library_call("personality", 0x0040000)


def _limits() -> Iterator[tuple[str, str, Deed]]:
    yield LIMITS, "setrlimit", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    yield LIMITS, "open files", lambda: [os.open(os.devnull, os.O_RDONLY) for _ in range(1000)]
    yield LIMITS, "memory", lambda: mmap.mmap(-1, 4 << 30)


def _truth(found: Any) -> Any:
    if not found:
        raise OSError("no")
    return found


def _library_call(name: str, *arguments: Any) -> int:
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result = int(getattr(_library, name)(*plain))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def _call(name: str, *arguments: Any) -> int:
    number = _NUMBERS.get(name) or _OTHERS[os.uname().machine].get(name)
    if name == "tgkill":
        number = {"x86_64": 234, "aarch64": 131}[os.uname().machine]
    assert number is not None
    return _library_call("syscall", number, *arguments)


def _fork() -> None:
    if os.fork() == 0:
        os._exit(0)
    os.wait()


def _clone(flags: int) -> None:
    # A child that does come into being has nothing to do but end.
    clone = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    made = _library_call("syscall", clone, flags, 0, 0, 0, 0)
    if made == 0:
        os._exit(0)


def _exec() -> None:
    loader = next(
        (name for name in ("/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1") if _there(name)), ""
    )
    child = -1
    with contextlib.suppress(OSError):
        child = os.fork()
    if child <= 0:
        try:
            os.execve(loader or sys.executable, ["probe", "--version"], {})
        finally:
            if child == 0:
                os._exit(1)
    if os.waitpid(child, 0)[1] != 0:
        raise OSError("nothing was started")


def _there(name: str) -> bool:
    try:
        os.close(os.open(name, os.O_RDONLY))
    except OSError:
        return False
    return True


def _handle(file: str) -> int:
    return _call(
        "name_to_handle_at", _HERE, file.encode(), struct.pack("=Ii", 128, 0) + bytes(128), bytes(8), 0
    )


def _own(owner: int) -> None:
    heard, _ = os.pipe()
    fcntl.fcntl(heard, fcntl.F_SETOWN, owner)


def _own_by_struct(owner: int) -> None:
    heard, _ = os.pipe()
    fcntl.fcntl(heard, 15, struct.pack("=ii", 1, owner))


def _signal_by_pipe(process: int) -> None:
    heard, said = os.pipe()
    fcntl.fcntl(heard, fcntl.F_SETOWN, process)
    fcntl.fcntl(heard, 10, signal.SIGKILL)
    fcntl.fcntl(heard, fcntl.F_SETFL, os.O_ASYNC)
    os.write(said, b"x")
    time.sleep(0.05)


def _lease() -> None:
    fcntl.fcntl(os.open(os.__file__, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)


def _trace(process: int) -> None:
    _library_call("ptrace", _ATTACH, process, 0, 0)
    os.waitpid(process, 0)
    _library_call("ptrace", _DETACH, process, 0, 0)


def _read_memory(process: int) -> int:
    own = ctypes.create_string_buffer(8)
    local = struct.pack("=QQ", ctypes.addressof(own), 8)
    # Only the check of the right to look comes before the address, which is no address of the other process.
    try:
        return _library_call("process_vm_readv", process, local, 1, struct.pack("=QQ", 8, 8), 1, 0)
    except OSError as error:
        if error.errno == 14:
            return 0
        raise


def _become_root() -> None:
    if os.geteuid() == 0:
        raise OSError("it is root already")
    os.setuid(0)


def _socket(family: int, kind: int) -> None:
    socket.socket(family, kind).close()


def _connect(family: int, kind: int, address: Any) -> None:
    with socket.socket(family, kind) as one:
        one.settimeout(1.0)
        one.connect(address)


def _send(address: Any) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", address)


def _netlink() -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as one:
        one.bind((0, 0))


def _attach(number: int) -> None:
    if number < 0:
        raise OSError("there is none")
    _library_call("shmctl", number, 2, bytes(256))
