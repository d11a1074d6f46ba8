"""Every setting that a stage of any kind has, found in the pydantic fields, nested ones included."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from trivium.stages import kinds


@dataclass(frozen=True)
class Setting:
    """One setting of one kind of stage; `path` leaves out the keys of mappings and the places of lists."""

    kind: str
    path: str
    owner: str
    """The class that declares it: settings that several kinds share have one owner."""
    choices: tuple[Any, ...]
    """The values of a `Literal`; empty for everything else."""
    default: Any

    def __str__(self) -> str:
        return f"{self.kind}.{self.path}"


def every_setting() -> list[Setting]:
    """All settings of all kinds that Trivium itself has; tests may have added kinds of their own."""
    return [
        one
        for name, stage in sorted(kinds().items())
        if stage.__module__.startswith("trivium.")
        for one in _settings(name, stage, "", ())
    ]


def _settings(kind: str, model: type[BaseModel], prefix: str, inside: tuple[type, ...]) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        path = prefix + (field.alias or name)
        if path == "kind" or field.exclude:
            continue
        owner = next(one for one in model.__mro__ if name in inspect.get_annotations(one))
        yield Setting(kind, path, f"{owner.__name__}.{name}", _choices(field.annotation), field.default)
        for nested in dict.fromkeys(_models(field.annotation)):
            if nested not in inside:
                yield from _settings(kind, nested, f"{path}.", (*inside, nested))


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models(argument)]


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for argument in get_args(annotation) for choice in _choices(argument))
