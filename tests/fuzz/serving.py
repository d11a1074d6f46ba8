"""Fuzz targets of the server: request bodies, the framing of streams, refusals."""

import asyncio
import json
from collections.abc import AsyncGenerator
from functools import cache
from typing import Any

from generating import tokenizer
from hypothesis import strategies as st

from fuzz.files import CHANGES, DAMAGE, changed, damaged
from fuzz.frame import fuzz
from trivium.generate.requests import Request
from trivium.serve.answers import Answer, ChatSample, CompletionSample, Usage
from trivium.serve.calls import form_of_calls
from trivium.serve.failures import RequestRefused, error_body
from trivium.serve.limits import Limits
from trivium.serve.parts import PartStream
from trivium.serve.pieces import Piece, Scored, TokenNames
from trivium.serve.prompts import chat_prompt, longest_prompt, sampling, token_prompts
from trivium.serve.protocol import ChatBody, CompletionBody, EmbeddingBody, read_body

CONTEXT = 512
LIMITS = Limits()
BODIES: list[tuple[type[Any], dict[str, Any]]] = [
    (ChatBody, {
        "model": "one", "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1}"}},
            ]},
            {"role": "tool", "content": "2", "tool_call_id": "1"}, {"role": "user", "content": "and?"},
        ],
        "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3,
        "presence_penalty": 0.5, "logit_bias": {"5": 2.0}, "n": 2, "max_tokens": 8, "min_tokens": 1,
        "stop": ["a", "b"],
        "stop_token_ids": [7], "stream": True, "stream_options": {"include_usage": True}, "logprobs": True,
        "top_logprobs": 2, "tool_choice": "auto", "parallel_tool_calls": False,
        "reasoning": "off", "overflow": "drop",
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
            "type": "object", "properties": {"a": {"type": "integer"}}}}}],
        "chat_template_kwargs": {"x": [1]}, "metadata": {"a": "b"},
    }),
    (ChatBody, {
        "model": "one", "messages": [{"role": "user", "content": "hello"}],
        "response_format": {"type": "json_schema", "json_schema": {
            "name": "a", "schema": {"type": "integer"}}},
    }),
    (ChatBody, {"model": "one", "messages": [{"role": "user", "content": "hello"}], "regex": "[ab]+"}),
    (CompletionBody, {
        "model": "one", "prompt": ["hello", "there"], "echo": True, "logprobs": 2, "best_of": 1, "n": 1,
        "stop": "a", "max_tokens": 4, "frequency_penalty": -1, "typical_p": 0.5,
    }),
    (CompletionBody, {"model": "one", "prompt": [[5, 6], [7]], "suffix": None}),
    (EmbeddingBody, {"model": "one", "input": ["hello", "a"],
        "encoding_format": "base64", "dimensions": 64}),
]  # fmt: skip


@cache
def _longest() -> int:
    return longest_prompt(tokenizer(), CONTEXT)


def _prepared(body: Any) -> None:
    """What the server makes of a body before the engine sees it: within the vocabulary, or refused."""
    words = tokenizer()
    if isinstance(body, ChatBody):
        form_of_calls(body, words)
        fitted = chat_prompt(body, words, CONTEXT, LIMITS, _longest(), lambda *_: None)
        prompts = [fitted.tokens]
    else:
        prompts = token_prompts(body, words, _longest(), LIMITS)
    for prompt in prompts:
        assert all(0 <= token < words.vocabulary_size for token in prompt)
        if not isinstance(body, EmbeddingBody) and len(prompt) < CONTEXT:
            chosen = sampling(body, words, LIMITS, CONTEXT - len(prompt))
            assert 1 <= chosen.max_new_tokens <= CONTEXT
            assert all(0 <= token < words.vocabulary_size for token in chosen.stop_ids or ())
            Request(prompt, chosen)


@fuzz(
    "request bodies: values",
    st.tuples(st.integers(0, len(BODIES) - 1), CHANGES),
    refuses=(RequestRefused,),
    seconds=10.0,
)
def body_values(example: tuple[int, Any]) -> None:
    """A body with values replaced becomes prompts and settings that the engine takes, or is refused."""
    kind, content = BODIES[example[0]]
    _prepared(read_body(json.dumps(changed(content, example[1])).encode("utf-8", "surrogatepass"), kind))


@fuzz(
    "request bodies: bytes",
    st.tuples(st.integers(0, len(BODIES) - 1), DAMAGE | st.binary(max_size=60)),
    refuses=(RequestRefused,),
    seconds=10.0,
)
def body_bytes(example: tuple[int, Any]) -> None:
    """A body with bytes changed, or any bytes at all, is read or refused in a sentence that can be sent."""
    kind, content = BODIES[example[0]]
    whole = json.dumps(content).encode()
    try:
        body = read_body(example[1] if isinstance(example[1], bytes) else damaged(whole, example[1]), kind)
    except RequestRefused as refusal:
        json.dumps(refusal.body, ensure_ascii=False).encode()
        raise
    _prepared(body)


_WORDS = st.lists(
    st.sampled_from([
        "\n", "\r", "\r\n", "\n\n", "data: ", "data:", "event: a\n", "[DONE]", "id: 1\n\n", ": ",
        "\u2028", "\u2029", "\x85",
        "\ufeff", "\x00", "\x1b[2J", "\ud800", "\udfff", "<tool_call>", "</tool_call>", "<think>",
        "</think>", "{\"name\": \"f\"",
        ", \"arguments\": {}}", "{", "}", "[", "]", "é", "🙂", "\\", "\"", "[TOOL_CALLS]",
    ]) | st.text(max_size=4),
    max_size=20,
).map("".join)  # fmt: skip
_PIECES = st.lists(st.tuples(st.integers(0, 1), _WORDS), max_size=12)


def events_of(content: bytes) -> list[str]:
    """The data of a stream's events, by the HTML standard's rules for lines, fields and blank lines."""
    found, data = list[str](), list[str]()
    text = content.decode().removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    for line in text.split("\n"):
        field, _, value = line.partition(":")
        if line and field == "data":
            data.append(value.removeprefix(" "))
        elif line:
            assert not field, f"the field {field!r} is none that we write"
        elif data:
            found.append("\n".join(data))
            data = []
    assert not data, "the stream ends within an event"
    return found


async def _pieces(pieces: list[list[Piece]]) -> AsyncGenerator[list[Piece]]:
    for batch in pieces:
        yield batch


async def _collected(answer: Answer, pieces: list[list[Piece]]) -> bytes:
    return b"".join([one async for one in answer.events(_pieces(pieces), include_usage=True)])


def _samples(chat: bool, scored: bool) -> list[Any]:
    names = TokenNames(tokenizer())
    if chat:
        return [
            ChatSample(
                n,
                PartStream(reasoning=True, opened=False, calls="tags", names=frozenset(["f"])),
                names,
                2 if scored else None,
            )
            for n in range(2)
        ]
    return [CompletionSample(n, names, 2 if scored else None, "echo\n\n") for n in range(2)]


@fuzz("streams: framing", st.tuples(st.booleans(), st.booleans(), _PIECES))
def framing(example: tuple[bool, bool, list[tuple[int, str]]]) -> None:
    """Whatever a model writes, its stream holds the text that the whole answer does, and ends once."""
    chat, scored, texts = example
    told = (Scored(5, -1.0, ((5, -1.0), (6, float("-inf")))),) if scored else ()
    pieces = [[Piece(sample, text, 1, told)] for sample, text in texts]
    pieces.append([Piece(sample, "", 0, (), "stop") for sample in range(2)])
    kind = "chat.completion" if chat else "text_completion"
    whole = asyncio.run(Answer(kind, "one", _samples(chat, scored), Usage(3)).whole(_pieces(pieces)))
    content = asyncio.run(_collected(Answer(kind, "one", _samples(chat, scored), Usage(3)), pieces))
    *events, last = events_of(content)
    assert last == "[DONE]"
    parts = [choice for one in map(json.loads, events) for choice in one["choices"]]
    for sample in range(2):
        own = [choice for choice in parts if choice["index"] == sample]
        expected = whole["choices"][sample]
        assert own[-1]["finish_reason"] == expected["finish_reason"]
        if chat:
            said = "".join(choice["delta"].get("content", "") for choice in own)
            assert said == _sent(expected["message"]["content"] or "")
            calls = [call for choice in own for call in choice["delta"].get("tool_calls", ())]
            assert len(calls) == len(expected["message"].get("tool_calls", ()))
        else:
            assert "".join(choice["text"] for choice in own) == _sent(expected["text"])


def _sent(text: str) -> str:
    """A text as it arrives: half a surrogate pair, which no encoding has, becomes a question mark."""
    return text.encode("utf-8", "replace").decode()


@fuzz("refusals", st.tuples(_WORDS, st.sampled_from([400, 401, 404, 413, 429, 500, 503])))
def refusals(example: tuple[str, int]) -> None:
    """Any sentence can be sent as an error."""
    content = json.dumps(error_body(*example), ensure_ascii=False).encode()
    assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
