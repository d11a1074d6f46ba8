"""Limits of memory, processes and processor time counted over all workers of a sandbox, by cgroup v2."""

import contextlib
import os
import time
from collections.abc import Mapping

_WANTED = ("cpu", "memory", "pids")
_PREFIX = "trivium-"
_MOST_PROCESSES = 512
_PERIOD = 100_000


class Group:
    """A cgroup for everything a sandbox starts, with one inside it for each worker.

    The limits of the whole: half the machine's memory, 512 processes and threads, and half the usual share of
    the processor where others want it. The supervisor and its monitors are in a group beside the workers'.
    """

    def __init__(self, client: int) -> None:
        base, controllers = _usable(_own_folder(), client)
        _sweep(base)
        self.path = os.path.join(base, f"{_PREFIX}{client}-{os.getpid()}")
        os.mkdir(self.path)
        try:
            self.folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
            limits = {"memory.max": half, "pids.max": _MOST_PROCESSES, "cpu.weight": 50}
            self.controllers = [name for name in controllers if _enable(self.folder, name)]
            if not self.controllers:
                raise OSError("none of its controllers can be handed on")
            _set(self.folder, limits)
            os.mkdir("supervisor", dir_fd=self.folder)
            _write("supervisor/cgroup.procs", str(os.getpid()), self.folder)
        except OSError:
            remove(self.path)
            raise

    def hand_to(self, user: int) -> None:
        """Let another user make groups for workers in it."""
        for name in (".", "cgroup.procs"):
            os.chown(name, user, user, dir_fd=self.folder)

    def make(self, memory: int, processes: int, cores: float) -> "WorkerGroup":
        """A group for one worker, which the worker enters by writing to `procs`."""
        limits = {
            "memory.max": memory,
            "memory.swap.max": 0,
            "pids.max": processes,
            "cpu.max": f"{round(cores * _PERIOD)} {_PERIOD}",
        }
        return WorkerGroup(self.folder, f"worker-{os.getpid()}", limits)


class WorkerGroup:
    """The cgroup of one worker."""

    def __init__(self, parent: int, name: str, limits: dict[str, object]) -> None:
        self.parent, self.name = parent, name
        os.mkdir(name, dir_fd=parent)
        self.folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=parent)
        _set(self.folder, limits)
        self.procs = os.open("cgroup.procs", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.folder)

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed a process of the group for its memory."""
        with contextlib.suppress(OSError, ValueError):
            events = dict(line.split() for line in _read("memory.events", self.folder).splitlines())
            return int(events.get("oom_kill", 0)) > 0
        return False

    def end(self) -> None:
        """Kill what is left in the group, and remove it."""
        with contextlib.suppress(OSError):
            _write("cgroup.kill", "1", self.folder)
        os.close(self.procs)
        os.close(self.folder)
        _remove_folder(self.name, self.parent)


def remove(path: str) -> None:
    """Remove a sandbox's group and the groups in it, once their processes have ended."""
    with contextlib.suppress(OSError):
        _write("cgroup.kill", "1", path=path)
    with contextlib.suppress(OSError):
        for name in os.listdir(path):
            if os.path.isdir(os.path.join(path, name)):
                _remove_folder(os.path.join(path, name))
    _remove_folder(path)


def _remove_folder(path: str, parent: int | None = None) -> None:
    # A group is busy until the kernel has buried its last process.
    for _ in range(100):
        try:
            os.rmdir(path, dir_fd=parent)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.005)


def _own_folder() -> str:
    """This process's folder in the cgroup v2 hierarchy."""
    mounted = ""
    with open("/proc/self/mountinfo") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            if after.split()[0] == "cgroup2":
                mounted = before.split()[4]
    if not mounted:
        raise OSError("no cgroup v2 is mounted")
    with open("/proc/self/cgroup") as lines:
        path = next((line.strip()[3:] for line in lines if line.startswith("0::")), "/")
    folder = os.path.normpath(mounted + path)
    return folder if os.path.isdir(folder) else mounted


def _usable(own: str, client: int) -> tuple[str, list[str]]:
    """A folder in which a group with controllers can be made, and which of them."""
    at_hand = _wanted(own, "cgroup.controllers")
    if not at_hand:
        raise OSError(f"{own} has none of the controllers {', '.join(_WANTED)}")
    parent = os.path.dirname(own)
    is_root = not os.path.exists(os.path.join(own, "cgroup.type"))
    if is_root or _wanted(own, "cgroup.subtree_control"):
        folder = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
        controllers = [name for name in at_hand if _enable(folder, name)]
        os.close(folder)
        if controllers and os.access(own, os.W_OK):
            return own, controllers
    handed_on = _wanted(parent, "cgroup.subtree_control")
    if handed_on and all(os.access(os.path.join(parent, name), os.W_OK) for name in (".", "cgroup.procs")):
        return parent, handed_on
    if not os.access(own, os.W_OK):
        raise OSError(f"{own} may not be changed by this user")
    return own, _move_aside(own, client, at_hand)


def _move_aside(own: str, client: int, wanted: list[str]) -> list[str]:
    """Only a group without processes hands on controllers: move ours, if it is alone, to one below."""
    family = {client, os.getpid()}
    members = [int(number) for number in _read("cgroup.procs", path=own).split()]
    if not set(members) <= family:
        raise OSError(f"{own} holds processes of others too")
    aside = os.path.join(own, f"{_PREFIX}main-{client}")
    os.mkdir(aside)
    for number in members:
        _write("cgroup.procs", str(number), path=aside)
    folder = os.open(own, os.O_RDONLY | os.O_DIRECTORY)
    controllers = [name for name in wanted if _enable(folder, name)]
    os.close(folder)
    if not controllers:
        raise OSError(f"{own} does not hand on its controllers")
    return controllers


def _sweep(base: str) -> None:
    """Remove the groups that killed sandboxes left behind: a group in use cannot be removed."""
    for name in os.listdir(base):
        path = os.path.join(base, name)
        if name.startswith(_PREFIX):
            with contextlib.suppress(OSError):
                for inner in os.listdir(path):
                    if os.path.isdir(os.path.join(path, inner)):
                        os.rmdir(os.path.join(path, inner))
                os.rmdir(path)


def _wanted(folder: str, file: str) -> list[str]:
    with contextlib.suppress(OSError):
        present = _read(file, path=folder).split()
        return [name for name in _WANTED if name in present]
    return []


def _enable(folder: int, controller: str) -> bool:
    """Hand a controller on to the groups below; whether that is so now."""
    with contextlib.suppress(OSError):
        _write("cgroup.subtree_control", f"+{controller}", folder)
    with contextlib.suppress(OSError):
        return controller in _read("cgroup.subtree_control", folder).split()
    return False


def _set(folder: int, limits: Mapping[str, object]) -> None:
    """Write those limits whose controller is there."""
    for name, value in limits.items():
        with contextlib.suppress(FileNotFoundError):
            _write(name, str(value), folder)


def _open(name: str, flags: int, folder: int | None, path: str) -> int:
    return os.open(os.path.join(path, name), flags | os.O_CLOEXEC, dir_fd=folder)


def _write(name: str, content: str, folder: int | None = None, path: str = "") -> None:
    opened = _open(name, os.O_WRONLY, folder, path)
    try:
        os.write(opened, content.encode())
    finally:
        os.close(opened)


def _read(name: str, folder: int | None = None, path: str = "") -> str:
    opened = _open(name, os.O_RDONLY, folder, path)
    try:
        return os.read(opened, 1 << 16).decode()
    finally:
        os.close(opened)
