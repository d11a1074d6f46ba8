"""Calls of tools in the form a model writes them, found by reading back what its chat template writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any, Literal

from trivium.generate.chat_fit import END_THINK, opens_thinking
from trivium.kit.errors import TriviumError
from trivium.serve.failures import RequestRefused
from trivium.serve.parts import CALL, MARK, Called, CallKind, PartStream
from trivium.serve.protocol import ChatBody, NamedTool
from trivium.tokens.tokenizer import Tokenizer

# Any JSON object, for response_format json_object.
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

_NAME, _ARGUMENTS = "probe_of_tools", {"place": "probe"}
_PLACE = {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}}
_TOOL = {
    "type": "function",
    "function": {"name": _NAME, "description": "a probe", "parameters": {**_PLACE, "required": ["place"]}},
}
_ASKED = {"role": "user", "content": "a"}
_CALLING = {
    "role": "assistant",
    "content": "",
    # some templates insist on ids of nine letters
    "tool_calls": [
        {"id": "probe0000", "type": "function", "function": {"name": _NAME, "arguments": _ARGUMENTS}}
    ],
}


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls: in which shape, under which key the arguments, and behind which tokens."""

    kind: CallKind
    key: Literal["arguments", "parameters"]
    opening: tuple[int, ...]


@lru_cache(maxsize=64)
def call_form(tokenizer: Tokenizer) -> CallForm | None:
    """The form of a model's calls; None where its template shows no tools or writes calls we cannot read."""
    if not tokenizer.templates:
        return None
    try:
        asked = tokenizer.encode_prompt([_ASKED], tools=[_TOOL])
        chat = tokenizer.encode_chat([_ASKED, _CALLING], tools=[_TOOL])
    except TriviumError:
        return None
    if _NAME not in tokenizer.decode(asked):
        return None
    turn = [identity for identity, learned in zip(chat.ids, chat.learned, strict=True) if learned]
    text, opened = tokenizer.decode(turn), opens_thinking(asked, tokenizer)
    for kind in ("tags", "object", "list"):
        stream = PartStream(reasoning=True, opened=opened, calls=kind, names=frozenset([_NAME]))
        parts = stream.feed(text, last=True)
        if [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, Called)] == [
            (_NAME, _ARGUMENTS)
        ] and len(parts) == 1:
            return _form(kind, text, turn, tokenizer)
    return None


def _form(kind: CallKind, text: str, turn: list[int], tokenizer: Tokenizer) -> CallForm:
    if kind == "tags":
        return CallForm(kind, "arguments", tuple(tokenizer.encode(f"{CALL}\n")))
    opening = list(takewhile(lambda identity: identity in tokenizer.control_ids, turn))
    if text.lstrip().startswith(MARK):
        opening += tokenizer.encode(MARK)
    return CallForm(kind, "parameters" if '"parameters"' in text else "arguments", tuple(opening))


def offered_tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """The tools the model may call, or None."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def forces_call(body: ChatBody) -> bool:
    """Whether the answer must be a call."""
    return body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)


def form_of_calls(body: ChatBody, tokenizer: Tokenizer) -> CallForm | None:
    """The form in which this request's calls will come, None without tools; refused where there is none."""
    if not offered_tools(body):
        return None
    form = call_form(tokenizer)
    if form is None:
        problem = (
            "this model's chat template shows no tools or writes calls in a form that cannot be read here "
            "(<tool_call> blocks, or JSON objects with name and arguments or parameters): leave tools out"
        )
        raise RequestRefused(problem, parameter="tools", code="no_tools")
    return form


def call_schema(body: ChatBody, form: CallForm | None) -> Mapping[str, Any]:
    """What a forced call looks like: the name of a tool, and arguments as that tool declares them."""
    if body.regex is not None or (body.response_format is not None and body.response_format.type != "text"):
        problem = "a forced call has the form its tool declares; leave out regex and response_format"
        raise RequestRefused(problem, parameter="tool_choice", code="invalid_value")
    functions = [tool.function for tool in body.tools or ()]
    if isinstance(body.tool_choice, NamedTool):
        wanted = body.tool_choice.function.name
        functions = [function for function in functions if function.name == wanted]
    if not functions or form is None:
        problem = "tool_choice forces a call, and tools does not hold the tool"
        raise RequestRefused(problem, parameter="tool_choice", code="invalid_value")
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": function.name}, form.key: function.parameters or ANY_OBJECT},
            "required": ["name", form.key],
            "additionalProperties": False,
        }
        for function in functions
    ]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": call, "minItems": 1, "maxItems": 1} if form.kind == "list" else call


def opening_of_call(prompt: list[int], tokenizer: Tokenizer, form: CallForm) -> list[int]:
    """The tokens behind a prompt after which only a call can follow."""
    before = f"\n{END_THINK}\n\n" if opens_thinking(prompt, tokenizer) else ""
    return [*tokenizer.encode(before), *form.opening]
