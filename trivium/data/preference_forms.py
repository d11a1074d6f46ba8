"""The forms in which people keep preferences, told apart by their columns, read into one."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.data.shapes import (
    Example,
    Fields,
    Message,
    Shape,
    first_fitting,
    is_messages,
    messages_of,
    text_of,
)
from trivium.kit.errors import TriviumError

Form = Shape[tuple[Example, ...]]
"""A known form of preferences, which is read as its answers."""


def recognised_form(fields: Fields) -> Form:
    """The form of a row with these columns; anything else is refused with what would be one."""
    if (form := first_fitting(FORMS, fields)) is not None:
        return form
    names = ", ".join(map(repr, fields)) or "nothing"
    raise TriviumError(
        f"holds {names}: neither `chosen` and `rejected` (with or without a `prompt`) nor `prompt`, "
        "`completion` and `label`; name yours with `columns`"
    )


def shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """How many first elements all have in common."""
    alike = 0
    for elements in zip(*sequences, strict=False):
        if any(one != elements[0] for one in elements):
            break
        alike += 1
    return alike


def _inside_a_word(text: str, place: int) -> bool:
    return 0 < place < len(text) and text[place - 1].isalnum() and text[place].isalnum()


def _explicit(fields: Fields) -> tuple[Example, ...]:
    """A prompt beside its two answers; where both answers repeat the prompt, they are read without it."""
    prompt, chosen, rejected = fields["prompt"], fields["chosen"], fields["rejected"]
    if is_messages(chosen):
        whole = messages_of(chosen, "chosen")
        before = messages_of(prompt, "prompt") if is_messages(prompt) else ()
        if whole[0]["role"] != "assistant" and whole[: len(before)] == before:
            return _implicit(fields)
    return _continued(prompt, chosen, "chosen"), _continued(prompt, rejected, "rejected")


def _continued(prompt: Any, answer: Any, column: str) -> Example:
    """A prompt with one answer: both texts, or messages; a text answers messages as one message."""
    if is_messages(prompt) or is_messages(answer) or isinstance(answer, Mapping):
        before = (
            messages_of(prompt, "prompt")
            if is_messages(prompt)
            else ({"role": "user", "content": text_of({"prompt": prompt}, "prompt")},)
        )
        return Example(messages=(*before, *_said(answer, column)), given=len(before))
    return Example(prompt=text_of({"prompt": prompt}, "prompt"), completion=text_of({column: answer}, column))


def _said(answer: Any, column: str) -> tuple[Message, ...]:
    if is_messages(answer):
        return messages_of(answer, column)
    if isinstance(answer, Mapping):
        return messages_of([answer], column)
    return ({"role": "assistant", "content": text_of({column: answer}, column)},)


def _implicit(fields: Fields) -> tuple[Example, ...]:
    """Two whole texts or conversations: what they have in common is the prompt."""
    chosen, rejected = fields["chosen"], fields["rejected"]
    if is_messages(chosen):
        wholes = messages_of(chosen, "chosen"), messages_of(rejected, "rejected")
        # What is left of either has to hold an answer.
        shared = min(shared_length(wholes), *(len(whole) - 1 for whole in wholes))
        if shared == 0:
            raise TriviumError("has `chosen` and `rejected` that do not begin alike, and no `prompt`")
        return tuple(Example(messages=whole, given=shared) for whole in wholes)
    texts = text_of(fields, "chosen"), text_of(fields, "rejected")
    shared = shared_length(texts)
    # Two different words that begin alike are not half prompt, half answer.
    while shared and any(_inside_a_word(text, shared) for text in texts):
        shared -= 1
    # A space between prompt and answer belongs to the answer's first word.
    prompt = texts[0][:shared].removesuffix(" ")
    if not prompt:
        raise TriviumError("has `chosen` and `rejected` that do not begin alike, and no `prompt`")
    return tuple(Example(prompt=prompt, completion=text[len(prompt) :]) for text in texts)


def _asked(asked: str) -> Callable[[Fields], tuple[Example, ...]]:
    """A question with two answers: exchanges in the template's form, as nothing says how to join texts."""

    def read(fields: Fields) -> tuple[Example, ...]:
        question: Any = fields[asked]
        if not is_messages(question):
            question = [{"role": "user", "content": text_of(fields, asked)}]
        return tuple(_continued(question, fields[column], column) for column in ("chosen", "rejected"))

    return read


def _unpaired(fields: Fields) -> tuple[Example, ...]:
    return (_continued(fields["prompt"], fields["completion"], "completion"),)


FORMS = (
    Form("preferences (prompt, chosen, rejected)", ("prompt", "chosen", "rejected"), _explicit),
    *(
        Form(f"preferences ({asked}, chosen, rejected)", (asked, "chosen", "rejected"), _asked(asked))
        for asked in ("messages", "conversations", "question", "instruction")
    ),
    Form("preferences (chosen, rejected; they begin with the prompt)", ("chosen", "rejected"), _implicit),
    Form("unpaired preferences", ("prompt", "completion", "label"), _unpaired),
)
