"""The settings of every kind of stage as Markdown tables, made from the fields' types and descriptions."""

from collections.abc import Iterator
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trivium.kit.numbers import Count, Number
from trivium.kit.settings import Settings, descriptions, plain_types
from trivium.learn.settings import Training
from trivium.recipe.schema import Report
from trivium.stages import kinds
from trivium.stages.parts.stage import Stage

HEAD = """# Settings

Every setting of every kind of stage: its type, its default and its meaning. This page is written by
`trivium schema --markdown`, from the same fields that check a recipe.
"""


def reference() -> str:
    """The whole page, of the kinds that belong to the package."""
    stages = sorted((name, kind) for name, kind in kinds().items() if kind.__module__.startswith("trivium."))
    parts = [HEAD, "## Every stage that trains\n", _table(Training, leave=set()), *_nested(Training, set())]
    shown: set[type[BaseModel]] = {found for _, found in _models(Training)}
    for kind, stage in stages:
        inherited = set(Training.model_fields) if issubclass(stage, Training) else set()
        own = {name for name in inherited if stage.model_fields[name] is not None and _same(stage, name)}
        parts.append(f"## `{kind}`\n")
        parts.append(f"{descriptions(stage).get('kind')}\n")
        if inherited:
            parts.append("Also every setting of [a stage that trains](#every-stage-that-trains).\n")
        parts.append(_table(stage, leave={"kind", *own}))
        parts += _nested(stage, shown)
        shown |= {found for _, found in _models(stage)}
    parts += ["## `report`\n", _table(Report, leave=set())]
    return "\n".join(parts).rstrip() + "\n"


def _same(stage: type[Stage], name: str) -> bool:
    """Whether a stage leaves a setting of training as it is."""
    mine, shared = stage.model_fields[name], Training.model_fields[name]
    return (mine.annotation, mine.default) == (shared.annotation, shared.default)


def _table(model: type[BaseModel], leave: set[str]) -> str:
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    meant = descriptions(model)
    for name, field in model.model_fields.items():
        if name not in leave and not field.exclude:
            cells = (
                f"`{field.alias or name}`",
                _type(field.annotation),
                _default(field),
                meant.get(name, ""),
            )
            lines.append(
                "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
            )
    if issubclass(model, Settings) and model.formerly:
        earlier = ", ".join(f"`{old}` for `{new}`" for old, new in model.formerly.items())
        lines += ["", f"Earlier names that still work: {earlier}."]
    return "\n".join(lines) + "\n"


def _models(model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """The settings inside the settings of a model, each with its name there."""
    for name, field in model.model_fields.items():
        for found in _inside(field.annotation):
            yield field.alias or name, found


def _inside(annotation: Any) -> Iterator[type[BaseModel]]:
    for one in plain_types(annotation):
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one
        elif get_origin(one) in (dict, list, tuple):
            for argument in get_args(one):
                yield from _inside(argument)


def _nested(model: type[BaseModel], shown: set[type[BaseModel]]) -> Iterator[str]:
    done = set(shown)
    for name, found in _models(model):
        if found not in done:
            done.add(found)
            yield f"### `{name}`\n"
            yield _table(found, leave=set())


NAMES = {str: "text", bool: "true or false", int: "whole number", float: "number", Any: "anything"}


def _type(annotation: Any) -> str:
    """A type in words."""
    found: list[str] = []
    for one in _written(annotation):
        if one not in found:
            found.append(one)
    return " or ".join(found)


def _written(annotation: Any) -> Iterator[str]:
    if annotation in (Count, Number):
        yield "count" if annotation is Count else "number"
        return
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _written(arguments[0])
    elif origin is Literal:
        yield ", ".join(f"`{one}`" for one in arguments)
    elif origin in (list, tuple):
        yield f"list of {_type(arguments[0])}" if arguments else "list"
    elif origin is dict:
        yield f"mapping to {_type(arguments[1])}"
    elif arguments:
        for one in arguments:
            if one is not NoneType:
                yield from _written(one)
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield "settings"
    else:
        yield NAMES.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return ""
    if isinstance(value, BaseModel):
        return "see below"
    return f"`{value}`" if value not in ([], {}, ()) else "none"
