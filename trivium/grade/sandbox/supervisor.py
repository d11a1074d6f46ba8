"""The supervisor: a small process that forks a monitor and an isolated worker whenever the client asks.

It never sees a program or a test, so nothing can be read out of the memory its workers inherit from it.
"""

import json
import os
import platform
import signal
import socket
import sys
from typing import Any

from . import cgroup, filesystem, imports, kernel, layers, monitor, worker
from . import filter as call_filter

NOBODY = 65534


class Isolation:
    """What every worker is given: the layers in force, and what was prepared for them.

    Options: `without` names layers to leave out, `landlock` is the newest version to use, `unsafe` says that
    the client accepts less than what keeps a program in, `client` is the process that asks.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.without = set(options["without"])
        self.was_root = os.geteuid() == 0
        self.processes = self.rules = -1
        self.group: cgroup.Group | None = None
        self.in_force: dict[str, Any] = {"missing": {}}
        unsafe = bool(options["unsafe"])
        linux = sys.platform == "linux" and call_filter.known_machine(platform.machine())
        if not linux:
            self.without |= {"namespaces", "landlock", "calls", "cgroup"}
            if not unsafe:
                raise OSError(f"no isolation is known for {sys.platform} on {platform.machine()}")
        version = 0
        if "landlock" not in self.without:
            version = min(kernel.landlock_version(), options["landlock"] or sys.maxsize)
        if "namespaces" in self.without and not unsafe and version < layers.NEEDED_LANDLOCK:
            raise OSError(
                f"without them Landlock {layers.NEEDED_LANDLOCK} (Linux 6.12) is needed, and this kernel has "
                f"{f'Landlock {version}' if version else 'none'}"
            )
        if "cgroup" not in self.without:
            self._join_group(options["client"])
        if self.own_files:
            self.processes = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
            self._enter_namespaces()
            filesystem.enter_own_root()
            self.in_force["namespaces"] = True
        elif linux:
            imports.prepare()
        # Root's own files and processes are out of reach of a user who owns nothing.
        self.user = (
            NOBODY if linux and self.was_root and (self.own_files or _can_become(NOBODY)) else os.geteuid()
        )
        if self.group is not None and self.user != os.geteuid():
            self.group.hand_to(self.user)
        if version:
            self.rules = kernel.landlock_rules(version, filesystem.readable(self.own_files))
            self.in_force["landlock"] = version
        elif "landlock" not in self.without:
            self.in_force["missing"]["Landlock"] = "the kernel has none"
        if "calls" not in self.without:
            self.in_force["calls"] = "files of its own" if self.own_files else "no files"
        if "limits" not in self.without:
            self.in_force["limits"] = True

    @property
    def own_files(self) -> bool:
        """Whether a program sees a file system of its own, with a scratch folder."""
        return "namespaces" not in self.without

    def _join_group(self, client: int) -> None:
        try:
            self.group = cgroup.Group(client)
        except OSError as error:
            self.in_force["missing"]["cgroup"] = error.strerror or str(error)
        else:
            self.in_force["cgroup"] = self.group.controllers
            self.in_force["cgroup_folder"] = self.group.path

    def _enter_namespaces(self) -> None:
        flags = kernel.NEW_MOUNTS | kernel.NEW_NETWORK | kernel.NEW_IPC | kernel.NEW_NAMES
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(flags if self.was_root else flags | kernel.NEW_USERS)
        if not self.was_root:
            self.map_user(user, group)
        kernel.set_host_name(b"sandbox")

    def map_user(self, user: int, group: int) -> None:
        """In a new user namespace, be the same user as before and no other."""
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            opened = os.open(f"self/{name}", os.O_WRONLY, dir_fd=self.processes)
            os.write(opened, content.encode())
            os.close(opened)


def _can_become(user: int) -> bool:
    """Whether this process may be another user, tried in one that ends."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            become(user)
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(process, 0)[1] == 0


def become(user: int) -> None:
    """Be another user for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    kernel.set_dumpable(True)


def main(control_fd: int, options: str) -> None:
    """Serve the client until it closes the socket."""
    client = socket.socket(fileno=control_fd)
    worker.warm_up()
    try:
        isolation = Isolation(json.loads(options))
    except OSError as error:
        client.sendall(json.dumps({"ready": False, "why": str(error)}).encode() + b"\n")
        return
    client.sendall(json.dumps({"ready": True, "layers": isolation.in_force}).encode() + b"\n")
    # Monitors are not waited for: the kernel buries them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        message, fds, _, _ = socket.recv_fds(client, 4096, 4)
        if not message:
            return
        process = os.fork()
        if process == 0:
            try:
                client.close()
                with socket.socket(fileno=fds[0]) as control:
                    serve(isolation, control, fds[1:], json.loads(message))
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


def serve(isolation: Isolation, control: socket.socket, fds: list[int], limits: dict[str, Any]) -> None:
    """Be the monitor of one worker, and say so where even that fails."""
    try:
        if isolation.user != os.geteuid():
            become(isolation.user)
        monitor.keep(isolation, control, fds, limits)
    except OSError as error:
        control.sendall(json.dumps({"ended": "isolation", "why": str(error)}).encode() + b"\n")
