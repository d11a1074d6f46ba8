"""The base of everything a person can set: unknown keys are refused, earlier names of a key still work."""

from __future__ import annotations

from collections.abc import Mapping
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Settings whose descriptions (the string below each field) schema and docs are made from."""

    model_config = ConfigDict(
        extra="forbid",
        populate_by_name=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    formerly: ClassVar[Mapping[str, str]] = {}
    """Earlier names of settings, each with the present one."""


def plain_types(annotation: Any) -> list[Any]:
    """The types an annotation allows, without `Annotated` and unions around them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return plain_types(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [one for argument in get_args(annotation) for one in plain_types(argument)]
    return [annotation]
