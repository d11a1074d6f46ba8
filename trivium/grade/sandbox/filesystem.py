"""The files a program may see: Python's own, read-only, and a scratch folder in memory."""

import os
import sysconfig
from collections.abc import Iterator

from . import kernel

SCRATCH = "/sandbox/scratch"
_READ = kernel.READ_FILE | kernel.READ_FOLDER
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_INSTALLED = ("site-packages", "dist-packages")


def standard_library() -> str:
    """The folder of Python's standard library."""
    return sysconfig.get_paths()["stdlib"]


def readable(own_files: bool) -> dict[str, int]:
    """What Landlock lets a program reach, and with which rights."""
    if not own_files:
        return {}
    allowed = dict.fromkeys(_LIBRARIES, _READ)
    for name in os.listdir(standard_library()):
        if name not in _INSTALLED:
            allowed[os.path.join(standard_library(), name)] = _READ
    allowed |= dict.fromkeys(_DEVICES, kernel.READ_FILE | kernel.WRITE_FILE)
    # Everything but programs, devices and sockets; the rule stands above the mount.
    allowed[os.path.dirname(SCRATCH)] = ((1 << 16) - 1) & ~(1 | 1 << 6 | 1 << 9 | 1 << 11)
    return allowed


def modules() -> Iterator[tuple[str, str, bool]]:
    """Every module of the standard library that is Python source: its name, its file, whether a package."""
    root = standard_library()
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in (*_INSTALLED, "test", "tests", "idlelib")]
        inside = os.path.relpath(folder, root).replace(os.sep, ".")
        if not all(part.isidentifier() for part in inside.split(".") if part):
            continue
        for file in files:
            name, dot, ending = file.partition(".")
            if ending != "py" or not dot:
                continue
            parts = ([] if inside == "." else [inside]) + ([] if name == "__init__" else [name])
            if parts:
                yield ".".join(parts), os.path.join(folder, file), name == "__init__"


def enter_own_root() -> None:
    """Make a file system of nothing but Python's own files, read-only, and move into it."""
    kernel.mount("none", "/", None, kernel.RECURSIVE | kernel.PRIVATE)
    root = "/proc"
    kernel.mount("root", root, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, "size=1m,mode=755")
    standard = standard_library()
    for folder in dict.fromkeys((standard, *_LIBRARIES)):
        _show(folder, root)
    for name in _INSTALLED:
        if os.path.isdir(root + os.path.join(standard, name)):
            kernel.mount("empty", root + os.path.join(standard, name), "tmpfs", kernel.READ_ONLY, "size=4k")
    for device in _DEVICES:
        os.makedirs(root + "/dev", exist_ok=True)
        with open(root + device, "w"):
            pass
        kernel.mount(device, root + device, None, kernel.BIND)
    os.makedirs(root + SCRATCH)
    kernel.become_root_folder(root)
    kernel.mount("root", "/", None, kernel.REMOUNT | kernel.READ_ONLY | kernel.NO_SUID | kernel.NO_DEVICES)


def mount_scratch(size: int) -> None:
    """Put an empty file system in memory, of at most so many bytes, where the scratch folder is."""
    options = f"size={size},nr_inodes=1024,mode=700"
    kernel.mount("scratch", SCRATCH, "tmpfs", kernel.NO_SUID | kernel.NO_DEVICES, options)


def _show(folder: str, root: str) -> None:
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
