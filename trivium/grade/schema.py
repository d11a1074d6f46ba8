"""JSON Schema: as much of it as says what an answer must look like."""

import re
from typing import Any

from trivium.kit.errors import TriviumError

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,), "array": (list,), "string": (str,), "number": (int, float), "integer": (int, float),
    "boolean": (bool,), "null": (type(None),),
}  # fmt: skip
_KNOWN = frozenset(
    (
        "$schema", "$id", "$defs", "$ref", "$comment", "definitions", "title", "description",
        "default", "examples", "type", "enum", "const", "anyOf", "allOf", "oneOf", "not",
        "properties", "required", "additionalProperties", "minProperties", "maxProperties", "items",
        "prefixItems", "minItems", "maxItems", "uniqueItems", "minLength", "maxLength", "pattern",
        "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    )
)  # fmt: skip


def violation(value: Any, schema: Any, root: Any = None, place: str = "the answer") -> str | None:
    """Where and how a value breaks a schema, or None where it keeps it."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return None if schema else f"{place} is not allowed"
    if not isinstance(schema, dict) or set(schema) - _KNOWN:
        unknown = ", ".join(sorted(set(schema) - _KNOWN)) if isinstance(schema, dict) else repr(schema)
        raise TriviumError(f"This part of a JSON schema is not supported here: {unknown}.")
    if "$ref" in schema:
        return violation(value, _lookup(root, schema["$ref"]), root, place)
    return (
        _kind(value, schema, place)
        or _choices(value, schema, root, place)
        or (_object(value, schema, root, place) if isinstance(value, dict) else None)
        or (_array(value, schema, root, place) if isinstance(value, list) else None)
        or (_string(value, schema, place) if isinstance(value, str) else None)
        or (_number(value, schema, place) if _is_number(value) else None)
    )


def _lookup(root: Any, reference: str) -> Any:
    found = root
    try:
        for part in reference.removeprefix("#").strip("/").split("/"):
            found = found[part] if part else found
    except (KeyError, TypeError) as error:
        raise TriviumError(f"The JSON schema refers to {reference}, which it does not have.") from error
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_a(value: Any, name: str) -> bool:
    if name not in _TYPES:
        raise TriviumError(f"A JSON schema has no type {name!r}.")
    if isinstance(value, bool):
        return name == "boolean"
    if not isinstance(value, _TYPES[name]):
        return False
    return name != "integer" or (isinstance(value, int | float) and value % 1 == 0)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, bool) != isinstance(right, bool):
        return False
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)


def _kind(value: Any, schema: dict[str, Any], place: str) -> str | None:
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is_a(value, kind) for kind in kinds):
        return f"{place} is not of type {' or '.join(kinds)}"
    if "const" in schema and not _same(value, schema["const"]):
        return f"{place} is not {schema['const']!r}"
    if "enum" in schema and not any(_same(value, choice) for choice in schema["enum"]):
        return f"{place} is none of {schema['enum']!r}"
    return None


def _choices(value: Any, schema: dict[str, Any], root: Any, place: str) -> str | None:
    for part in schema.get("allOf", ()):
        trouble = violation(value, part, root, place)
        if trouble:
            return trouble
    for key, wanted in (("anyOf", "any"), ("oneOf", "exactly one")):
        if key in schema:
            fitting = sum(violation(value, part, root, place) is None for part in schema[key])
            if fitting == 0 or (key == "oneOf" and fitting > 1):
                return f"{place} does not fit {wanted} of the {len(schema[key])} forms it may have"
    if "not" in schema and violation(value, schema["not"], root, place) is None:
        return f"{place} has a form it must not have"
    return None


def _object(value: dict[str, Any], schema: dict[str, Any], root: Any, place: str) -> str | None:
    for name in schema.get("required", ()):
        if name not in value:
            return f"{place} lacks {name!r}"
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
        return f"{place} has {len(value)} keys"
    properties = schema.get("properties", {})
    for name, item in value.items():
        part = properties.get(name, schema.get("additionalProperties", True))
        trouble = violation(item, part, root, f"{place}.{name}")
        if trouble:
            return trouble
    return None


def _array(value: list[Any], schema: dict[str, Any], root: Any, place: str) -> str | None:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        return f"{place} has {len(value)} items"
    first = schema.get("prefixItems", [])
    for number, item in enumerate(value):
        part = first[number] if number < len(first) else schema.get("items", True)
        trouble = violation(item, part, root, f"{place}[{number}]")
        if trouble:
            return trouble
    if schema.get("uniqueItems") and any(
        _same(left, right) for number, left in enumerate(value) for right in value[:number]
    ):
        return f"{place} repeats an item"
    return None


def _string(value: str, schema: dict[str, Any], place: str) -> str | None:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{place} has {len(value)} letters"
    if "pattern" in schema and not re.search(schema["pattern"], value[:100_000]):
        return f"{place} does not match {schema['pattern']}"
    return None


def _number(value: float, schema: dict[str, Any], place: str) -> str | None:
    if value < schema.get("minimum", value) or value > schema.get("maximum", value):
        return f"{place} is out of range"
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if (low is not None and value <= low) or (high is not None and value >= high):
        return f"{place} is out of range"
    step = schema.get("multipleOf")
    if step and abs(value / step - round(value / step)) > 1e-9:
        return f"{place} is no multiple of {step}"
    return None
