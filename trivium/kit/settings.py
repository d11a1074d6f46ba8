"""The base of everything a person can set: unknown keys are refused, earlier names of a key still work."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler


class Settings(BaseModel):
    """Settings whose descriptions (the string below each field) schema and docs are made from."""

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    formerly: ClassVar[Mapping[str, str]] = {}
    """Earlier names of settings, each with the present one."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        properties = handler.resolve_ref_schema(found).get("properties", {})
        for name, text in descriptions(cls).items():
            key = cls.model_fields[name].alias or name
            if key in properties:
                properties[key].setdefault("description", text)
        return found


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """What each field is for: the string below it.

    Read when asked for; pydantic would search the source of every class for it at every start of a
    program, which takes as long as everything else that imports the stages."""
    found = {}
    for name, field in model.model_fields.items():
        owner = next((one for one in model.__mro__ if name in inspect.get_annotations(one)), model)
        text = field.description or _strings(owner.__module__).get(f"{owner.__qualname__}.{name}")
        if text is not None:
            found[name] = text
    return found


@cache
def _strings(module: str) -> dict[str, str]:
    """The string below each annotated name in the classes of a module, under `Class.name`."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        # Classes written at a prompt have no source.
        return {}
    return dict(_described(tree, ""))


def _described(node: ast.Module | ast.ClassDef, above: str) -> Iterator[tuple[str, str]]:
    for one, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(one, ast.ClassDef):
            yield from _described(one, f"{above}{one.name}.")
        elif isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
            match after:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield f"{above}{one.target.id}", inspect.cleandoc(text)


def plain_types(annotation: Any) -> list[Any]:
    """The types an annotation allows, without `Annotated` and unions around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [one for argument in get_args(annotation) for one in plain_types(argument)]
    return [annotation]
