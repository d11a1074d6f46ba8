"""The shapes in which people keep examples to fine-tune on, told apart by their columns, read into one."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from trivium.kit.errors import TriviumError

Fields = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """What one row teaches: a text, a completion of a prompt, or a conversation from message `given` on."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: tuple[Message, ...] = ()
    given: int = 0
    tools: list[Any] | None = None
    template_arguments: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0


Read = TypeVar("Read")


@dataclass(frozen=True)
class Shape(Generic[Read]):
    """A known shape: what people call it, which columns it takes, and how a row is read."""

    name: str
    columns: tuple[str, ...]
    read: Callable[[Fields], Read]


def first_fitting(shapes: Iterable[Shape[Read]], fields: Fields) -> Shape[Read] | None:
    """The first shape whose columns a row has."""
    here = {name for name, value in fields.items() if value is not None}
    return next((shape for shape in shapes if set(shape.columns) <= here), None)


def recognised(fields: Fields) -> Shape[Example]:
    """The shape of a row with these columns; what is no example to imitate is refused with the remedy."""
    if (shape := first_fitting(SHAPES, fields)) is not None:
        return shape
    here = {name for name, value in fields.items() if value is not None}
    names = ", ".join(map(repr, fields)) or "nothing"
    if {"chosen", "rejected"} <= here:
        raise TriviumError("holds preferences (`chosen`, `rejected`), which a `preference` stage learns from")
    if "prompt" in here:
        raise TriviumError("holds prompts without anything to answer; add a `completion`, or use `rlvr`")
    raise TriviumError(
        f"holds {names}: none of messages, conversations, prompt + completion, instruction + output, "
        "question + answer or text; name yours with `columns`"
    )


def example_of(shape: Shape[Example], fields: Fields) -> Example:
    """A row read in the shape its source was recognised as; what is wrong with it is said in one sentence."""
    for column in shape.columns:
        if fields.get(column) is None:
            names = ", ".join(repr(name) for name, value in fields.items() if value is not None)
            raise TriviumError(f"has no {column!r} as the first row of its source has, but {names}")
    example, further = shape.read(fields), arguments_of(fields, "chat_template_kwargs", "template_arguments")
    weight = fields.get("weight")
    if weight is not None:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float("inf"):
            raise TriviumError(f"has the `weight` {weight!r}, which is not a number from 0 on")
        further["weight"] = float(weight)
    return replace(example, **further)


def arguments_of(fields: Fields, *names: str) -> dict[str, Any]:
    """The tools and the template's arguments that a row brings, under the fields of `Example`."""
    found = {"tools": parsed(fields["tools"], "tools", list)} if fields.get("tools") else {}
    said = [fields[name] for name in names or ("chat_template_kwargs",) if fields.get(name)]
    return found | ({"template_arguments": parsed(said[0], "chat_template_kwargs", dict)} if said else {})


def parsed(value: Any, column: str, kind: type) -> Any:
    """A list or object as it is, or from the JSON text in which tables keep it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise TriviumError(f"has a `{column}` that is text, but not JSON") from None
    if not isinstance(value, kind):
        raise TriviumError(f"has a `{column}` that is {type(value).__name__}, not {kind.__name__}")
    return value


def text_of(fields: Fields, column: str) -> str:
    """A column that has to hold text."""
    value = fields[column]
    if not isinstance(value, str):
        raise TriviumError(f"has a `{column}` that is {type(value).__name__}, not text")
    return value


def messages_of(value: Any, column: str) -> tuple[Message, ...]:
    """Messages with a role each, and something said or called in each."""
    listed = parsed(value, column, list)
    if not listed:
        raise TriviumError(f"has no message in `{column}`")
    messages = []
    for number, message in enumerate(listed):
        if not isinstance(message, Mapping):
            raise TriviumError(
                f"has in `{column}` a message {number} that is {type(message).__name__}, not an object"
            )
        said = {name: value for name, value in message.items() if value is not None}
        if "from" in said and "role" not in said:
            said = _sharegpt(said, number, column)
        if not isinstance(said.get("role"), str):
            raise TriviumError(f"has in `{column}` a message {number} without a `role`")
        if not isinstance(said.get("content", ""), (str, list)):
            found = type(said["content"]).__name__
            raise TriviumError(f"has in `{column}` a message {number} whose content is {found}, not text")
        if "content" not in said and not said.get("tool_calls"):
            raise TriviumError(f"has in `{column}` a message {number} that says nothing (no `content`)")
        # Templates ask a message for its content even where it only calls a function.
        messages.append({"content": "", **said})
    return tuple(messages)


_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip


def _sharegpt(message: Message, number: int, column: str) -> Message:
    """`{from: human, value: ...}` as a message; a function call becomes the assistant's tool call."""
    speaker, value = message["from"], message.get("value")
    if not isinstance(value, str):
        raise TriviumError(f"has in `{column}` a message {number} whose `value` is no text")
    rest = {name: one for name, one in message.items() if name not in ("from", "value")}
    if speaker == "function_call":
        call = parsed(value, f"{column}[{number}].value", dict)
        function = {"name": call.get("name"), "arguments": call.get("arguments", {})}
        return {**rest, "role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    if speaker not in _SPEAKERS:
        raise TriviumError(
            f"has in `{column}` a message {number} from {speaker!r}, whose role is not known; "
            "write system, user, assistant or tool"
        )
    return {**rest, "role": _SPEAKERS[speaker], "content": value}


def _conversation(column: str) -> Callable[[Fields], Example]:
    def read(fields: Fields) -> Example:
        messages = messages_of(fields[column], column)
        system = fields.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages = ({"role": "system", "content": system}, *messages)
        return Example(messages=messages)

    return read


def _answered(fields: Fields, asked: str, answer: str) -> Example:
    """A prompt and what completes it: both texts, both messages, or messages answered by a text."""
    prompt, completion = fields[asked], fields[answer]
    if is_messages(prompt):
        before = messages_of(prompt, asked)
        if is_messages(completion):
            after = messages_of(completion, answer)
        else:
            after = ({"role": "assistant", "content": text_of(fields, answer)},)
        return Example(messages=(*before, *after), given=len(before))
    return Example(prompt=text_of(fields, asked), completion=text_of(fields, answer))


def is_messages(value: Any) -> bool:
    """Whether a value is a list of messages, or such a list as JSON."""
    return isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith('[{"role"'))


def _completed(asked: str, answer: str) -> Shape[Example]:
    return Shape("prompt-completion", (asked, answer), lambda fields: _answered(fields, asked, answer))


def _asked(asked: str, answer: str) -> Shape[Example]:
    """A question and its answer: an exchange in the template's form, as nothing says how to join them."""

    def read(fields: Fields) -> Example:
        if is_messages(fields[asked]):
            return _answered(fields, asked, answer)
        before = [{"role": "system", "content": fields["system"]}] if fields.get("system") else []
        before.append({"role": "user", "content": text_of(fields, asked)})
        said = {"role": "assistant", "content": text_of(fields, answer)}
        return Example(messages=(*before, said), given=len(before))

    return Shape(f"prompt-completion, conversational ({asked} and {answer})", (asked, answer), read)


def _alpaca(fields: Fields) -> Example:
    """The instruction with its input below it, after the system prompt and the history."""
    messages: list[Message] = []
    if fields.get("system"):
        messages.append({"role": "system", "content": text_of(fields, "system")})
    for number, turn in enumerate(parsed(fields.get("history") or [], "history", list)):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise TriviumError(f"has a `history` whose entry {number} is not a pair of texts")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    asked = text_of(fields, "instruction")
    if fields.get("input"):
        asked = f"{asked}\n{text_of(fields, 'input')}"
    messages.append({"role": "user", "content": asked})
    return Example(messages=(*messages, {"role": "assistant", "content": text_of(fields, "output")}))


SHAPES = (
    Shape("conversations (messages)", ("messages",), _conversation("messages")),
    Shape("ShareGPT (conversations)", ("conversations",), _conversation("conversations")),
    _completed("prompt", "completion"),
    Shape("Alpaca (instruction, input, output)", ("instruction", "output"), _alpaca),
    *(
        _asked(asked, answer)
        for asked, answer in (
            ("question", "answer"), ("prompt", "response"), ("prompt", "answer"), ("query", "response"),
            ("instruction", "response"), ("problem", "solution"), ("input", "output"),
        )
    ),
    Shape("plain text", ("text",), lambda fields: Example(text=text_of(fields, "text"))),
)  # fmt: skip
