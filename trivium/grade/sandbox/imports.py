"""Imports for a program that may not open any file: everything it can import is loaded or read beforehand.

Without namespaces the file system that a program sees is the user's. So every call that takes a path is
refused, and with them what Python's own importer needs.
"""

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any

from . import filesystem

_EXTENSIONS_FOLDER = "lib-dynload"
# Not for programs: interfaces to terminals, tests of Python itself, data bases in files.
_LEFT_OUT = (
    "_test",
    "_xx",
    "xx",
    "_tk",
    "_curses",
    "readline",
    "_dbm",
    "_gdbm",
    "nis",
    "ossaudiodev",
    "spwd",
)


def prepare() -> None:
    """Load every extension module, and read the source of every other."""
    folder = os.path.join(filesystem.standard_library(), _EXTENSIONS_FOLDER)
    for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        name = file.partition(".")[0]
        if not name.startswith(_LEFT_OUT):
            # One that needs a library this machine lacks is one that no program can import here.
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules of the standard library among sources that were read beforehand."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, bool, bytes]] = {}
        for name, file, package in filesystem.modules():
            # Distributions link to files that need not be there.
            with contextlib.suppress(OSError), open(file, "rb") as opened:
                self.known[name] = (file, package, opened.read())

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.known:
            return None
        file, package, _ = self.known[fullname]
        spec = importlib.machinery.ModuleSpec(fullname, self, origin=file, is_package=package)
        spec.has_location = True
        return spec

    def exec_module(self, module: types.ModuleType) -> None:
        file, _, source = self.known[module.__name__]
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
