"""Named steps of a list in a recipe, such as `[repair, {filters: gopher}]`: how they are written and read."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Self, TypeVar

from pydantic import ValidationError

from trivium.kit.errors import TriviumError
from trivium.kit.settings import Settings


class NamedStep(Settings):
    """One step: a name, and settings under it."""

    name: ClassVar[str] = ""
    short: ClassVar[str] = ""
    """The setting that `{name: value}` means where the value is no mapping."""
    package: ClassVar[str]
    """Where all steps of such a list lie."""
    known: ClassVar[dict[str, Any]] = {}
    """Those that were imported, by their names."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "name" in vars(cls):
            cls.known[cls.name] = cls

    @classmethod
    def all(cls) -> dict[str, type[Self]]:
        """Every step of the package by its name."""
        package = import_module(cls.package)
        for module in iter_modules(package.__path__):
            import_module(f"{package.__name__}.{module.name}")
        return cls.known

    @classmethod
    def variant(cls, written: Mapping[str, Any]) -> type[NamedStep]:
        """The class these settings are read by; a step with several methods has one for each."""
        return cls

    def written(self) -> dict[str, Any]:
        """The step as a recipe would write it, every default spelled out."""
        return {self.name: self.model_dump(mode="json", by_alias=True)}

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """What it needs besides its input: the setting, the name in it, and what the named has to be."""
        return []

    def locate(self, where: Mapping[str, Path]) -> None:
        """Replace names by places: `where` says where what it mentions lies."""


AnyStep = TypeVar("AnyStep", bound=NamedStep)


def read_steps(written: Any, known: Mapping[str, type[AnyStep]], example: str) -> list[AnyStep]:
    """The steps of such a list; a ValueError says what is wrong."""
    if isinstance(written, str | Mapping):
        written = [written]
    if not isinstance(written, list) or not written:
        raise ValueError(f"`steps` is a list such as {example}; steps are {_names(known)}")
    return [_read(place, one, known) for place, one in enumerate(written, start=1)]


def _read(place: int, written: Any, known: Mapping[str, type[AnyStep]]) -> AnyStep:
    if isinstance(written, str):
        written = {written: {}}
    if not isinstance(written, Mapping) or len(written) != 1:
        raise ValueError(f"step {place} is a name or one name with its settings, not {written!r}")
    ((name, value),) = written.items()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"steps are {_names(known)}"
        raise ValueError(f"step {place}: there is no step `{name}`; {hint}")
    kind: Any = known[name]
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        if not kind.short:
            raise ValueError(f"step {place}: `{name}` takes settings by name, not {value!r}")
        value = {kind.short: value}
    try:
        kind = kind.variant(value)
    except ValueError as error:
        raise ValueError(f"step {place}: {error}") from None
    try:
        step: AnyStep = kind.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError(f"step {place}: {_complaint(name, kind, error)}") from None
    except TriviumError as error:
        raise ValueError(f"step {place}: {error}") from None
    return step


def _complaint(name: str, kind: type[NamedStep], error: ValidationError) -> str:
    first = error.errors()[0]
    setting = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(setting, kind.model_fields, 1)
        known = ", ".join(kind.model_fields) or "none"
        hint = f"did you mean `{near[0]}`?" if near else f"it has {known}"
        return f"`{name}` has no setting `{setting}`; {hint}"
    if first["type"] == "value_error":
        return f"`{name}`: {(first.get('ctx') or {}).get('error', first['msg'])}"
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"`{name}: {{{setting}: {first['input']!r}}}` {message}"


def _names(known: Mapping[str, Any]) -> str:
    return ", ".join(sorted(known))
