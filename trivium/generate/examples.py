"""Worked examples from a file, for prompts that begin with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.data.shapes import Example, example_of, recognised
from trivium.data.sources import read_documents
from trivium.generate.prompting import few_shot
from trivium.kit.errors import TriviumError


def read_examples(path: str | Path) -> list[dict[str, Any]]:
    """The examples of a file as one conversation: rows of messages, or of a prompt and its answer."""
    told: list[dict[str, Any]] = []
    for document in read_documents(str(path)):
        try:
            told += _exchange(example_of(recognised(document.fields), document.fields))
        except TriviumError as error:
            raise TriviumError(f"The example {document.id} {error}.") from None
    if not told:
        raise TriviumError(f"{path} holds no examples; give a prompt and a completion on each line.")
    return told


def _exchange(example: Example) -> list[dict[str, Any]]:
    if example.prompt is not None and example.completion is not None:
        return few_shot([(example.prompt, example.completion)], "")[:-1]
    if not example.messages:
        raise TriviumError("is a text without a question; give a prompt and a completion, or messages")
    messages = [dict(message) for message in example.messages]
    if any(message["role"] in ("system", "developer") for message in messages):
        raise TriviumError("has a system message; say that once for the whole conversation")
    if messages[0]["role"] != "user" or messages[-1]["role"] != "assistant":
        raise TriviumError("does not begin with a user's message and end with an assistant's")
    return messages
