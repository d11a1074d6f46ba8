"""The scorer of form: a pattern that matches, a schema that JSON keeps, tags that stand once and in order."""

import json
from dataclasses import dataclass
from typing import Any

from trivium.grade.maths.extract import after_thinking
from trivium.grade.patterns import Late, matches
from trivium.grade.schema import violation
from trivium.grade.scorer import Score
from trivium.kit.errors import TriviumError

_LONGEST_TEXT = 100_000


@dataclass(frozen=True)
class FormatScorer:
    """One where a text has the form it should; settings and a row's columns of the same names say which."""

    name: str = "format"
    pattern: str | None = None
    schema: dict[str, Any] | str | None = None
    tags: tuple[str, ...] = ()

    def __call__(self, completion: str, **columns: Any) -> Score:
        pattern = columns.get("pattern") or self.pattern
        schema = columns.get("schema") or self.schema
        tags = columns.get("tags") or self.tags
        tags = (tags,) if isinstance(tags, str) else tuple(tags)
        if not isinstance(pattern, str | None) or not all(isinstance(tag, str) for tag in tags):
            raise TriviumError("The pattern and the tags of the scorer 'format' are text.")
        if pattern is None and schema is None and not tags:
            raise TriviumError(
                "The scorer 'format' needs a pattern, a schema or tags, as settings or as columns."
            )
        if len(completion) > _LONGEST_TEXT:
            return Score(0.0, "the text is too long", "unparsed")
        try:
            trouble = (
                (pattern_trouble(completion, pattern) if pattern is not None else None)
                or (tags_trouble(completion, tags) if tags else None)
                or (schema_trouble(completion, schema) if schema is not None else None)
            )
        except Late:
            # The pattern matches other texts in time; a text that it cannot be matched with has not the form.
            return Score(0.0, "comparing the text with the pattern takes too long", "overtime")
        return (
            Score(0.0, trouble, "wrong") if trouble else Score(1.0, "the text has the form it should", "ok")
        )


def pattern_trouble(text: str, pattern: str) -> str | None:
    """What is wrong where the whole text does not match the pattern."""
    return None if matches(pattern, text.strip(), whole=True) else f"the text does not match {pattern}"


def tags_trouble(text: str, tags: tuple[str, ...]) -> str | None:
    """What is wrong where the tags do not stand once each, filled, in this order, with nothing outside."""
    position = 0
    for tag in tags:
        opening, closing = f"<{tag}>", f"</{tag}>"
        if (text.count(opening), text.count(closing)) != (1, 1):
            return f"{opening} and {closing} do not stand there exactly once each"
        start, end = text.index(opening), text.index(closing)
        if start < position:
            return f"{opening} stands before the tag that should precede it"
        if text[position:start].strip():
            return f"there is text outside the tags, before {opening}"
        if not text[start + len(opening) : end].strip():
            return f"nothing stands between {opening} and {closing}"
        position = end + len(closing)
    return "there is text after the last tag" if text[position:].strip() else None


def schema_trouble(text: str, schema: dict[str, Any] | str) -> str | None:
    """What is wrong where the text is not JSON that keeps the schema."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise TriviumError(f"The schema is not JSON: {error}.") from error
    spoken = after_thinking(text)
    try:
        value = json.loads(unfenced(spoken or ""), parse_constant=_no_constant)
    except RecursionError:
        return "the JSON is nested too deeply"
    except ValueError as error:
        return f"the text is not JSON: {error}"
    return violation(value, schema)


def unfenced(text: str) -> str:
    """The inside of a text that is one fenced block of JSON; any other text as it is."""
    stripped = text.strip()
    first, newline, rest = stripped.partition("\n")
    if newline and first.rstrip(" \t") in ("```", "```json") and rest.endswith("```"):
        return rest[:-3]
    return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
