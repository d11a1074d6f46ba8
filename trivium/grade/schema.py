"""JSON Schema: as much of it as says what an answer must look like."""

import json
from typing import Any

from trivium.grade.patterns import Late, matches
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


_DEEPEST = 100
_MOST_REFERENCES = 50
_MOST_STEPS = 200_000
_MANY_PARTS = 1000


def violation(value: Any, schema: Any) -> str | None:
    """Where and how a value breaks a schema, or None where it keeps it; `Late` where that takes too long."""
    try:
        return _Checker(schema, _is_large(value)).violation(value, schema, "the answer")
    except RecursionError:
        return "the answer is nested too deeply"
    except (TypeError, AttributeError, KeyError) as error:
        raise TriviumError(f"The JSON schema is not one: {error}; check its keywords' values.") from error


def _is_large(value: Any) -> bool:
    """Whether a value has so many parts that a comparison may be long for its sake, not the schema's."""
    waiting, parts = [value], 0
    while waiting and parts <= _MANY_PARTS:
        part = waiting.pop()
        parts += 1
        if isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part
    return parts > _MANY_PARTS


class _Checker:
    """One comparison with a schema; `steps` counts what is compared, for a schema may branch without end."""

    def __init__(self, root: Any, large: bool) -> None:
        self.root = root
        self.large = large
        self.steps = 0

    def violation(
        self, value: Any, schema: Any, place: str, depth: int = 0, references: int = 0
    ) -> str | None:
        """Where and how a value breaks a part of the schema; `references` led to this same place."""
        self.steps += 1
        if self.steps > _MOST_STEPS:
            if self.large:
                raise Late
            raise TriviumError(f"The JSON schema takes more than {_MOST_STEPS} steps; make it simpler.")
        if depth > _DEEPEST:
            return f"{place} is nested too deeply"
        if isinstance(schema, bool):
            return None if schema else f"{place} is not allowed"
        if not isinstance(schema, dict) or set(schema) - _KNOWN:
            unknown = ", ".join(sorted(set(schema) - _KNOWN)) if isinstance(schema, dict) else repr(schema)
            raise TriviumError(f"This part of a JSON schema is not supported here: {unknown[:200]}.")
        if references > _MOST_REFERENCES:
            raise TriviumError("The JSON schema refers to itself without end; let each $ref lead to a part.")
        if "$ref" in schema:
            return self.violation(value, self._lookup(schema["$ref"]), place, depth, references + 1)
        return (
            _kind(value, schema, place)
            or self._choices(value, schema, place, depth, references + 1)
            or (self._object(value, schema, place, depth + 1) if isinstance(value, dict) else None)
            or (self._array(value, schema, place, depth + 1) if isinstance(value, list) else None)
            or (_string(value, schema, place) if isinstance(value, str) else None)
            or (_number(value, schema, place) if _is_number(value) else None)
        )

    def _lookup(self, reference: str) -> Any:
        found = self.root
        try:
            for part in reference.removeprefix("#").strip("/").split("/"):
                found = found[part] if part else found
        except (KeyError, TypeError) as error:
            raise TriviumError(f"The JSON schema refers to {reference}, which it does not have.") from error
        return found

    def _choices(
        self, value: Any, schema: dict[str, Any], place: str, depth: int, references: int
    ) -> str | None:
        def fits(part: Any) -> bool:
            return self.violation(value, part, place, depth, references) is None

        for part in schema.get("allOf", ()):
            trouble = self.violation(value, part, place, depth, references)
            if trouble:
                return trouble
        for key, wanted in (("anyOf", "any"), ("oneOf", "exactly one")):
            if key in schema:
                fitting = sum(map(fits, schema[key]))
                if fitting == 0 or (key == "oneOf" and fitting > 1):
                    return f"{place} does not fit {wanted} of the {len(schema[key])} forms it may have"
        return f"{place} has a form it must not have" if "not" in schema and fits(schema["not"]) else None

    def _object(self, value: dict[str, Any], schema: dict[str, Any], place: str, depth: int) -> str | None:
        for name in schema.get("required", ()):
            if name not in value:
                return f"{place} lacks {name!r}"
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
            return f"{place} has {len(value)} keys"
        properties = schema.get("properties", {})
        for name, item in value.items():
            part = properties.get(name, schema.get("additionalProperties", True))
            trouble = self.violation(item, part, f"{place}.{name}", depth)
            if trouble:
                return trouble
        return None

    def _array(self, value: list[Any], schema: dict[str, Any], place: str, depth: int) -> str | None:
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return f"{place} has {len(value)} items"
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        for number, item in enumerate(value):
            part = first[number] if number < len(first) else rest
            trouble = None if part is True else self.violation(item, part, f"{place}[{number}]", depth)
            if trouble:
                return trouble
        if schema.get("uniqueItems") and len({_spelling(item) for item in value}) < len(value):
            return f"{place} repeats an item"
        return None


def _spelling(value: Any) -> str:
    """A text that two values share exactly where they are the same: 1 and 1.0 are, 1 and true are not."""

    def plain(part: Any) -> Any:
        if isinstance(part, float) and part.is_integer():
            return int(part)
        if isinstance(part, list):
            return [plain(item) for item in part]
        return {name: plain(item) for name, item in part.items()} if isinstance(part, dict) else part

    return json.dumps(plain(value), sort_keys=True)


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
    return _spelling(left) == _spelling(right)


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


def _string(value: str, schema: dict[str, Any], place: str) -> str | None:
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        return f"{place} has {len(value)} characters"
    if "pattern" in schema and not matches(schema["pattern"], value[:100_000], whole=False):
        return f"{place} does not match {schema['pattern']}"
    return None


def _number(value: float, schema: dict[str, Any], place: str) -> str | None:
    if value < schema.get("minimum", value) or value > schema.get("maximum", value):
        return f"{place} is out of range"
    low, high = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if (low is not None and value <= low) or (high is not None and value >= high):
        return f"{place} is out of range"
    step = schema.get("multipleOf")
    if step and not _is_multiple(value, step):
        return f"{place} is no multiple of {step}"
    return None


def _is_multiple(value: float, step: float) -> bool:
    if isinstance(value, int) and isinstance(step, int):
        return value % step == 0
    try:
        return abs(value / step - round(value / step)) <= 1e-9
    except (OverflowError, ValueError):
        return False
