"""The kinds of stages, one file each: a file in this folder is a kind, with nothing to register."""

import importlib.util
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum
from trivium.stages.parts.stage import Stage

GROUP = "trivium.stages"
"""The entry-point group under which an installed package offers kinds of its own."""


def kinds() -> dict[str, type[Stage]]:
    """Every kind of stage that a recipe can name: those of this folder and of installed packages."""
    for module in iter_modules(__path__):
        import_module(f"{__name__}.{module.name}")
    for point in _offered():
        point.load()
    return dict(Stage.kinds)


@cache
def _offered() -> tuple[EntryPoint, ...]:
    """What installed packages offer; to look through them all takes long and is done once."""
    return tuple(entry_points(group=GROUP))


def stage_of(record: Mapping[str, Any]) -> Stage:
    """A stage that ran, with its settings, from what its record keeps."""
    if "kind_from" in record:
        return kind_from_file(record["kind_from"], Path()).model_validate(record["settings"])
    return kinds()[record["kind"]].model_validate(record["settings"])


def is_in_a_file(kind: object) -> bool:
    """Whether a kind is written `file.py:Class`."""
    return isinstance(kind, str) and kind.rpartition(":")[0].endswith(".py")


def kind_from_file(written: str, base: Path) -> type[Stage]:
    """The kind that `file.py:Class` names, the file relative to `base`."""
    file, _, name = written.rpartition(":")
    path = base / file
    if not path.is_file():
        raise TriviumError(f"kind: there is no file {path}; write its path relative to the recipe.")
    code = checksum(path)
    module_name = f"trivium_stage_{path.stem}_{code[:16]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        # Pydantic looks up the annotations of a class in the module that defines it.
        sys.modules[module_name] = module = importlib.util.module_from_spec(spec)
        known = dict(Stage.kinds)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise TriviumError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
        taken = [kind for kind, one in known.items() if one.file is None and Stage.kinds[kind] is not one]
        if taken:
            Stage.kinds.update(known)
            del sys.modules[module_name]
            raise TriviumError(f"{path}: `{taken[0]}` is a kind of Trivium's own; give yours another name.")
    found = getattr(sys.modules[module_name], name, None)
    if not (isinstance(found, type) and issubclass(found, Stage)):
        raise TriviumError(f"{path} has no stage `{name}`: write the name of a class derived from Stage.")
    found.file, found.code = f"{path.resolve()}:{name}", code
    return found
