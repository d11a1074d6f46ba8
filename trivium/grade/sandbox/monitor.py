"""The monitor of one worker: isolates it, watches it, kills it in time and reports how it ended."""

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
import tempfile
import time
from typing import TYPE_CHECKING, Any

from . import filesystem, kernel, worker
from . import filter as call_filter

if TYPE_CHECKING:
    from .cgroup import WorkerGroup
    from .supervisor import Isolation

# Without a namespace of users the kernel counts all processes of a user, so a bomb is stopped this many above
# what the machine runs anyhow.
_MORE_PROCESSES = 256
_LOOK = os.WEXITED | os.WNOHANG | os.WNOWAIT if hasattr(os, "WNOWAIT") else 0


def keep(isolation: "Isolation", control: socket.socket, fds: list[int], limits: dict[str, Any]) -> None:
    """Start one worker and see it to its end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    group = None
    if isolation.group is not None:
        room = limits["memory"] + limits["scratch"]
        group = isolation.group.make(room, limits["threads"] + 1, limits["cores"])
    try:
        if isolation.own_files:
            user, users_group = os.geteuid(), os.getegid()
            kernel.unshare(kernel.NEW_USERS | kernel.NEW_PROCESSES | kernel.NEW_MOUNTS | kernel.NEW_IPC)
            isolation.map_user(user, users_group)
        report = _run(isolation, control, fds, limits, group)
        if group is not None and group.ran_out_of_memory():
            report["out_of_memory"] = True
    finally:
        if group is not None:
            group.end()
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(report).encode() + b"\n")


def _run(
    isolation: "Isolation",
    control: socket.socket,
    fds: list[int],
    limits: dict[str, Any],
    group: "WorkerGroup | None",
) -> dict[str, Any]:
    # Without the filter a program could fork; without a namespace of processes what it forked must be sought.
    loose = not isolation.own_files and "calls" in isolation.without
    scratch = tempfile.mkdtemp(prefix="scratch-") if loose else "/"
    heard, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        _be_worker(isolation, said, fds, limits, scratch, group)
    os.close(said)
    for fd in fds:
        os.close(fd)
    report = _watch(control, child, heard, limits)
    if loose:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        shutil.rmtree(scratch, ignore_errors=True)
    return report


def _be_worker(
    isolation: "Isolation",
    said: int,
    fds: list[int],
    limits: dict[str, Any],
    scratch: str,
    group: "WorkerGroup | None",
) -> None:
    try:
        os.setsid()
        if sys.platform == "linux":
            kernel.die_with_parent()
        if group is not None:
            os.write(group.procs, b"0")
        _isolate(isolation, limits, scratch)
        os.write(said, b"+")
    except BaseException as error:
        os.write(said, f"{type(error).__name__}: {error}".encode()[:500])
        os._exit(97)
    os.close(said)
    _close_all_but(fds)
    code = 1
    try:
        code = worker.live(fds, limits)
    finally:
        os._exit(code)


def _isolate(isolation: "Isolation", limits: dict[str, Any], scratch: str) -> None:
    """Put every layer in force on this process."""
    if isolation.own_files:
        filesystem.mount_scratch(limits["scratch"])
        scratch = filesystem.SCRATCH
    os.chdir(scratch)
    for signal_number in (signal.SIGPIPE, signal.SIGINT):
        signal.signal(signal_number, signal.SIG_DFL)
    if "limits" not in isolation.without:
        _limit(isolation, limits)
    if sys.platform != "linux":
        return
    kernel.drop_capabilities()
    kernel.refuse_new_privileges()
    if isolation.rules >= 0:
        kernel.landlock_restrict(isolation.rules)
    if "calls" not in isolation.without:
        program = call_filter.filter_program(platform.machine(), os.getpid(), isolation.own_files)
        kernel.filter_calls(program)


def _limit(isolation: "Isolation", limits: dict[str, Any]) -> None:
    wanted = {
        "RLIMIT_CPU": limits["cpu"],
        "RLIMIT_FSIZE": limits["scratch"],
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_AS": limits["memory"],
    }
    if isolation.own_files:
        wanted["RLIMIT_NPROC"] = limits["threads"]
    elif sys.platform == "linux":
        with open("/proc/loadavg") as opened:
            running = int(opened.read().split()[3].partition("/")[2])
        wanted["RLIMIT_NPROC"] = running + _MORE_PROCESSES
    for name, value in wanted.items():
        limit = getattr(resource, name, None)
        if limit is not None:
            highest = resource.getrlimit(limit)[1]
            value = value if highest == resource.RLIM_INFINITY else min(value, highest)
            resource.setrlimit(limit, (value, value))


def _watch(control: socket.socket, child: int, heard: int, limits: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    said = b""
    with contextlib.suppress(OSError):
        said = os.read(heard, 600)
    os.close(heard)
    if said != b"+":
        os.waitpid(child, 0)
        return {"ended": "isolation", "why": said.decode(errors="replace") or "the worker died at once"}
    ended = ""
    poll = select.poll()
    poll.register(control, select.POLLIN | select.POLLHUP)
    # Where there is no process descriptor the worker is looked at a hundred times a second.
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


def _close_all_but(fds: list[int]) -> None:
    """Let a worker keep nothing of what the supervisor and its monitor have open."""
    previous = 2
    for fd in [*sorted(fds), 1 << 16]:
        os.closerange(previous + 1, fd)
        previous = fd
