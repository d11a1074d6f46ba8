"""The warden: a small process that forks a walled-in child whenever its parent asks, and watches over each.

It never sees a program or a test, so nothing can be read out of the memory its children inherit from it.
"""

import contextlib
import json
import os
import platform
import resource
import select
import shutil
import signal
import socket
import sys
import sysconfig
import tempfile
import time
from typing import Any

from . import filter as call_filter
from . import kernel, tenant

_NOBODY = 65534
_SCRATCH = "/room/scratch"
_READ = kernel.READ_FILE | kernel.READ_FOLDER
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class Warden:
    """What the children inherit: the kind of walls, the folder of processes, the rules about files."""

    def __init__(self, walls: str) -> None:
        self.walls = walls
        self.was_root = os.geteuid() == 0
        self.processes = -1
        self.rules = -1
        if walls == "none":
            return
        if sys.platform != "linux" or not call_filter.known_machine(platform.machine()):
            raise OSError(f"no walls are known for {sys.platform} on {platform.machine()}")
        version = kernel.landlock_version()
        if walls == "namespaces":
            self.processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            self.enter_namespaces()
            build_root()
        elif version == 0:
            raise OSError("the kernel has no Landlock")
        if version:
            self.rules = kernel.landlock_rules(version, self.allowed())

    def enter_namespaces(self) -> None:
        flags = kernel.NEW_MOUNTS | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_NAMES
        if self.was_root:
            kernel.unshare(flags)
            return
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(flags | kernel.NEW_USERS)
        self.map_user(user, group)

    def map_user(self, user: int, group: int) -> None:
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            opened = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self.processes)
            os.write(opened, content.encode())
            os.close(opened)

    def allowed(self) -> dict[str, int]:
        standard = sysconfig.get_paths()["stdlib"]
        allowed = dict.fromkeys(_LIBRARIES, _READ)
        for name in os.listdir(standard):
            if name not in ("site-packages", "dist-packages"):
                allowed[os.path.join(standard, name)] = _READ
        allowed |= dict.fromkeys(_DEVICES, kernel.READ_FILE | kernel.WRITE_FILE)
        if self.walls == "namespaces":
            # Everything but programs, devices and sockets; the rule stands above the mount.
            allowed["/room"] = ((1 << 16) - 1) & ~(1 | 1 << 6 | 1 << 9 | 1 << 11)
        return allowed

    def keep(self, control: socket.socket, fds: list[int], limits: dict[str, Any]) -> None:
        """Be the keeper of one child: wall it in, watch it, kill it in time, report how it ended."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        user = os.geteuid()
        if self.walls == "namespaces":
            if self.was_root:
                os.setgroups([])
                os.setresgid(_NOBODY, _NOBODY, _NOBODY)
                os.setresuid(_NOBODY, _NOBODY, _NOBODY)
                kernel.set_dumpable(True)
                user = _NOBODY
            group = os.getegid()
            kernel.unshare(kernel.NEW_USERS | kernel.NEW_PROCESSES | kernel.NEW_MOUNTS | kernel.NEW_IPC)
            self.map_user(user, group)
        scratch = tempfile.mkdtemp(prefix="scratch-") if self.walls == "none" else "/"
        heard, said = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(heard)
            self.be_child(said, fds, limits, scratch)
        os.close(said)
        for fd in fds:
            os.close(fd)
        report = self.watch(control, child, heard, limits)
        if self.walls == "none":
            # Not in a namespace of its own, so what the child started must be looked for by its group.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child, signal.SIGKILL)
            shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            control.sendall(json.dumps(report).encode() + b"\n")

    def be_child(self, said: int, fds: list[int], limits: dict[str, Any], scratch: str) -> None:
        try:
            os.setsid()
            if sys.platform == "linux":
                kernel.die_with_parent()
            self.wall_in(limits, scratch)
            os.write(said, b"+")
        except BaseException as error:
            os.write(said, f"{type(error).__name__}: {error}".encode()[:500])
            os._exit(97)
        os.close(said)
        close_all_but(fds)
        code = 1
        try:
            code = tenant.live(fds, limits)
        finally:
            os._exit(code)

    def wall_in(self, limits: dict[str, Any], scratch: str) -> None:
        if self.walls == "namespaces":
            size = f"size={limits['scratch']},nr_inodes=1024,mode=700"
            kernel.mount("scratch", _SCRATCH, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, size)
            scratch = _SCRATCH
        if self.walls != "landlock":
            os.chdir(scratch)
        for signal_number in (signal.SIGPIPE, signal.SIGINT):
            signal.signal(signal_number, signal.SIG_DFL)
        for name, value in (
            ("RLIMIT_CPU", limits["cpu"]),
            ("RLIMIT_FSIZE", limits["scratch"]),
            ("RLIMIT_NOFILE", 64),
            ("RLIMIT_CORE", 0),
            ("RLIMIT_MEMLOCK", 0),
            ("RLIMIT_MSGQUEUE", 0),
            *((("RLIMIT_NPROC", limits["threads"]),) if self.walls == "namespaces" else ()),
            ("RLIMIT_AS", limits["memory"]),
        ):
            limit = getattr(resource, name, None)
            if limit is not None:
                resource.setrlimit(limit, (value, value))
        if self.walls == "none":
            return
        kernel.drop_capabilities()
        kernel.refuse_new_privileges()
        if self.rules >= 0:
            kernel.landlock_restrict(self.rules)
        kernel.filter_calls(call_filter.filter_program(platform.machine(), os.getpid()))

    def watch(self, control: socket.socket, child: int, heard: int, limits: dict[str, Any]) -> dict[str, Any]:
        start = time.monotonic()
        said = b""
        with contextlib.suppress(OSError):
            said = os.read(heard, 600)
        os.close(heard)
        if said != b"+":
            os.waitpid(child, 0)
            return {"ended": "walls", "why": said.decode(errors="replace") or "the child died at once"}
        ended = ""
        poll = select.poll()
        poll.register(control, select.POLLIN | select.POLLHUP)
        # Where there is no process descriptor the child is asked after a hundred times a second.
        process = os.pidfd_open(child) if hasattr(os, "pidfd_open") else -1
        if process >= 0:
            poll.register(process, select.POLLIN)
        while not ended:
            left = limits["seconds"] - (time.monotonic() - start)
            events = dict(poll.poll(max(0.0, left) * 1000 if process >= 0 else 10))
            if control.fileno() in events:
                ended = "dismissed"
            elif process in events or (process < 0 and os.waitid(os.P_PID, child, _LOOK) is not None):
                ended = "exit"
            elif left <= 0:
                ended = "overtime"
        if ended != "exit":
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        code = os.waitstatus_to_exitcode(status)
        cpu = usage.ru_utime + usage.ru_stime
        if ended == "exit" and code < 0 and cpu >= limits["cpu"] - 0.2:
            ended = "overtime"
        return {"ended": ended, "code": code, "cpu": round(cpu, 3), "memory": usage.ru_maxrss << 10}


def close_all_but(fds: list[int]) -> None:
    """Let a child keep nothing of what the warden and its keeper have open."""
    previous = 2
    for fd in [*sorted(fds), 1 << 16]:
        os.closerange(previous + 1, fd)
        previous = fd


_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT if hasattr(os, "WNOWAIT") else 0


def build_root() -> None:
    """Make a file system of nothing but Python's own files, read-only, and move into it."""
    kernel.mount("none", "/", None, kernel.RECURSIVE | kernel.PRIVATE)
    root = "/proc"
    kernel.mount("root", root, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "size=1m,mode=755")
    paths = sysconfig.get_paths()
    standard = paths["stdlib"]
    for folder in dict.fromkeys((standard, *_LIBRARIES)):
        bind(folder, root)
    for name in ("site-packages", "dist-packages"):
        if os.path.isdir(root + os.path.join(standard, name)):
            kernel.mount("empty", root + os.path.join(standard, name), "tmpfs", kernel.READ_ONLY, "size=4k")
    for device in _DEVICES:
        os.makedirs(root + "/dev", exist_ok=True)
        with open(root + device, "w"):
            pass
        kernel.mount(device, root + device, None, kernel.BIND)
    os.makedirs(root + _SCRATCH)
    kernel.become_root_folder(root)
    kernel.mount("root", "/", None, kernel.REMOUNT | kernel.READ_ONLY | kernel.NO_SUID | kernel.NO_DEVICES)


def bind(folder: str, root: str) -> None:
    """Show a folder, read-only, at the same place under the new root."""
    if os.path.islink(folder):
        os.makedirs(os.path.dirname(root + folder), exist_ok=True)
        os.symlink(os.readlink(folder), root + folder)
        return
    if not os.path.isdir(folder):
        return
    os.makedirs(root + folder, exist_ok=True)
    kernel.mount(folder, root + folder, None, kernel.BIND | kernel.RECURSIVE)
    # Inside a user namespace the flags a mount already has are locked, so they are asked for again.
    flags = os.statvfs(folder).f_flag & (kernel.NO_SUID | kernel.NO_DEVICES | kernel.NO_EXEC)
    flags |= kernel.NO_SUID | kernel.NO_DEVICES | kernel.READ_ONLY
    kernel.mount("none", root + folder, None, kernel.REMOUNT | kernel.BIND | flags)


def main(control_fd: int, walls: str) -> None:
    """Serve the parent until it closes the socket."""
    parent = socket.socket(fileno=control_fd)
    tenant.warm_up()
    try:
        warden = Warden(walls)
    except OSError as error:
        parent.sendall(json.dumps({"ready": False, "why": str(error)}).encode() + b"\n")
        return
    parent.sendall(json.dumps({"ready": True}).encode() + b"\n")
    # Keepers are not waited for: the kernel buries them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(parent, 4096, 4)
        if not message:
            return
        keeper = os.fork()
        if keeper == 0:
            try:
                parent.close()
                with socket.socket(fileno=fds[0]) as control:
                    serve(warden, control, fds[1:], json.loads(message))
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


def serve(warden: Warden, control: socket.socket, fds: list[int], limits: dict[str, Any]) -> None:
    """Keep one child, and say so where even that fails."""
    try:
        warden.keep(control, fds, limits)
    except OSError as error:
        control.sendall(json.dumps({"ended": "walls", "why": str(error)}).encode() + b"\n")
