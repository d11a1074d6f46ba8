"""The few calls of the Linux kernel that Python has no function for."""

import ctypes
import os
import platform
import struct

NEW_MOUNTS, NEW_NAMES, NEW_IPC, NEW_USERS, NEW_PROCESSES, NEW_NETWORK = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT, BIND, RECURSIVE, PRIVATE = (
    1, 2, 4, 8, 32, 4096, 16384, 1 << 18,
)  # fmt: skip
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_DEATH_SIGNAL, _DUMPABLE, _DROP_BOUND, _SECCOMP, _NO_NEW_PRIVILEGES = 1, 4, 24, 22, 38
_PATH_ONLY = 0o10000000

READ_FILE, READ_FOLDER, WRITE_FILE = 1 << 2, 1 << 3, 1 << 1
_EVERY_RIGHT = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

_library = ctypes.CDLL(None, use_errno=True)
_library.syscall.restype = ctypes.c_long


def _call(name: str, *arguments: object) -> int:
    result: int = getattr(_library, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _number(value: int) -> ctypes.c_long:
    return ctypes.c_long(value)


def unshare(flags: int) -> None:
    """Leave the namespaces that the flags name for new ones."""
    _call("unshare", flags)


def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """Mount a file system, or a part of one."""
    _call(
        "mount",
        source.encode(),
        target.encode(),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        None if options is None else options.encode(),
    )


def become_root_folder(folder: str) -> None:
    """Make a mounted folder the root of the file system and let go of the old one."""
    os.chdir(folder)
    _call("syscall", _number(_PIVOT_ROOT[platform.machine()]), b".", b".")
    _call("umount2", b".", _DETACH)
    os.chdir("/")


def set_host_name(name: bytes) -> None:
    """Name the machine, within the namespace of names."""
    _call("sethostname", name, ctypes.c_size_t(len(name)))


def die_with_parent() -> None:
    """Be killed when the process that forked this one ends."""
    _call("prctl", _DEATH_SIGNAL, _number(9), _number(0), _number(0), _number(0))


def set_dumpable(yes: bool) -> None:
    """Say whether others of the same user may look into this process (and it may write its own maps)."""
    _call("prctl", _DUMPABLE, _number(int(yes)), _number(0), _number(0), _number(0))


def drop_capabilities() -> None:
    """Give up every capability for good."""
    for capability in range(64):
        if _library.prctl(_DROP_BOUND, _number(capability), _number(0), _number(0), _number(0)) < 0:
            break
    header = struct.pack("=Ii", 0x20080522, 0)
    _call("capset", header, bytes(24))


def refuse_new_privileges() -> None:
    """Let no program started from here gain rights; the walls below demand it."""
    _call("prctl", _NO_NEW_PRIVILEGES, _number(1), _number(0), _number(0), _number(0))


def filter_calls(program: bytes) -> None:
    """Install a filter of system calls on this thread and every thread it starts."""
    assert len(program) % 8 == 0
    lines = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(lines))
    _call("prctl", _SECCOMP, _number(2), header, _number(0), _number(0))


def landlock_version() -> int:
    """Which version of Landlock the kernel has; nought where it has none."""
    version = int(_library.syscall(_number(_LANDLOCK_CREATE), None, ctypes.c_size_t(0), _number(1)))
    return max(0, version)


def landlock_rules(version: int, allowed: dict[str, int]) -> int:
    """A set of rules, as an open file, that refuses every path but these, and each but for these rights."""
    every = (1 << _EVERY_RIGHT.get(version, 16)) - 1
    fields = struct.pack("=Q", every)
    if version >= 4:
        fields += struct.pack("=Q", 3)
    if version >= 6:
        fields += struct.pack("=Q", 3)
    rules = _call("syscall", _number(_LANDLOCK_CREATE), fields, ctypes.c_size_t(len(fields)), _number(0))
    for path, rights in allowed.items():
        try:
            opened = os.open(path, _PATH_ONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):
            rights &= ~READ_FOLDER
        rule = struct.pack("=Qi", rights & every, opened)
        _call("syscall", _number(_LANDLOCK_ADD), _number(rules), _number(1), rule, _number(0))
        os.close(opened)
    return rules


def landlock_restrict(rules: int) -> None:
    """Hold this thread to the rules from now on."""
    _call("syscall", _number(_LANDLOCK_RESTRICT), _number(rules), _number(0))
