"""Chat templates: jinja in a sandbox and on a budget, with the meaning transformers gives it."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser

from trivium.kit.errors import TriviumError
from trivium.tokens.budget import BudgetedEnvironment, within_budget
from trivium.tokens.control import CLOSE, OPEN
from trivium.tokens.roles import NAMED

# What a template may end with when it is given a conversation it was not written for.
REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` leaves a mark on both sides of what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Any) -> str:
        return f"{OPEN}{caller()}{CLOSE}"


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored attributes, through which templates could leave the sandbox."""

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a chat template may not store {name!r}")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(str(form)[:200])


@cache
def _environment() -> BudgetedEnvironment:
    environment = BudgetedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    environment.meter_filters()
    return environment


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise TriviumError(
            f"The chat template is not valid jinja, line {error.lineno}: {error.message}; fix the template."
        ) from error
    except (RecursionError, MemoryError, ValueError, SyntaxError, OverflowError) as error:
        raise TriviumError(
            f"The chat template is not valid jinja: {error or type(error).__name__}; fix the template."
        ) from error


def plain_data(value: Any) -> Any:
    """A copy of JSON types only, for a template is untrusted and must not reach other objects' methods."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_data(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if hasattr(value, "model_dump"):
        return plain_data(value.model_dump())
    raise TriviumError(
        f"A message holds a {type(value).__name__}, which is not text, a number, a list or an object."
    )


def own_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """The further variables a person gives to a template, none of which takes the place of its own."""
    taken = {"messages", "tools", "add_generation_prompt", *NAMED, *_environment().globals}
    for name in arguments or {}:
        if not isinstance(name, str) or name in taken:
            raise TriviumError(
                f"The template argument {name!r} is not yours to set: the chat template gets it from the "
                "conversation or the tokenizer; leave it out."
            )
    return plain_data(dict(arguments or {}))


def normal_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: no empty fields, and reasoning under each name templates use."""
    if not messages:
        raise TriviumError("A conversation needs at least one message.")
    normal = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TriviumError(
                f"Message {index} of a conversation has no `role`; give each a role and a content."
            )
        kept = {key: plain_data(value) for key, value in message.items() if value is not None}
        names = ("reasoning_content", "thinking", "reasoning")
        reasoning = next((kept[name] for name in names if name in kept), None)
        if reasoning is not None:
            kept = {"thinking": reasoning, **kept, "reasoning_content": reasoning}
        normal.append(kept)
    return normal


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The conversation as the template writes it; may still hold the marks of `{% generation %}`."""
    values = {
        "documents": None,
        **variables,
        "messages": list(messages),
        "tools": list(tools) if tools is not None else None,
        "add_generation_prompt": add_generation_prompt,
    }
    return within_budget(_compiled(source).render, values)
