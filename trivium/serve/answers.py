"""Answers as OpenAI's clients read them: whole, or in pieces as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.serve.failures import RequestRefused, error_body
from trivium.serve.parts import Called, Part, PartStream, Said, Thoughts
from trivium.serve.pieces import Piece, Scored, TokenNames

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


class Usage:
    """How many tokens a request cost."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens, self.completion_tokens = prompt_tokens, 0

    def json(self) -> Json:
        """The counts in OpenAI's words."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


class ChatSample:
    """One choice of a chat: its parts so far; `top` None tells no log-probabilities."""

    def __init__(self, index: int, parts: PartStream, names: TokenNames, top: int | None) -> None:
        self.index, self._parts, self._names, self._top = index, parts, names, top
        self._started, self._calls = False, 0
        self._said: list[str] = []
        self._thoughts: list[str] = []
        self._called: list[Json] = []
        self._scored: list[Scored] = []
        self._finish: str | None = None

    def take(self, piece: Piece) -> Json:
        """Take a piece in; get back the choice of a stream's next chunk."""
        delta: Json = {}
        if not self._started:
            delta["role"] = "assistant"
            self._started = True
        for part in self._parts.feed(piece.text, last=piece.finish is not None):
            self._add(part, delta)
        if self._top is not None:
            self._scored += piece.scored
        if piece.finish is not None:
            self._finish = "tool_calls" if self._called and piece.finish == "stop" else piece.finish
        logprobs = (
            self._names.chat(piece.scored, self._top) if self._top is not None and piece.scored else None
        )
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": self._finish}

    def _add(self, part: Part, delta: Json) -> None:
        if isinstance(part, Said):
            self._said.append(part.text)
            delta["content"] = delta.get("content", "") + part.text
        elif isinstance(part, Thoughts):
            self._thoughts.append(part.text)
            delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
        elif isinstance(part, Called):
            function = {"name": part.name, "arguments": part.arguments}
            call = {"id": part.id, "type": "function", "function": function}
            delta.setdefault("tool_calls", []).append({"index": len(self._called), **call})
            self._called.append(call)

    def whole(self) -> Json:
        """The choice of an answer given at once."""
        said = "".join(self._said)
        message: Json = {"role": "assistant", "content": said if said or not self._called else None}
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts).rstrip()
        if self._called:
            message["tool_calls"] = self._called
        logprobs = self._names.chat(tuple(self._scored), self._top) if self._top is not None else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}


class CompletionSample:
    """One choice of a completion: its text so far, after its prompt if that is to be echoed."""

    def __init__(
        self, index: int, names: TokenNames, top: int | None, echo: str, echoed: tuple[Scored, ...] = ()
    ) -> None:
        self.index, self._names, self._top = index, names, top
        self._text: list[str] = []
        self._echo, self._echoed, self._offset = echo, echoed, 0
        self._scored: list[Scored] = []
        self._finish: str | None = None

    def take(self, piece: Piece) -> Json:
        """Take a piece in; get back the choice of a stream's next chunk."""
        text, self._echo = self._echo + piece.text, ""
        self._text.append(text)
        self._finish = piece.finish
        logprobs = None
        if self._top is not None:
            scored, self._echoed = self._echoed + piece.scored, ()
            self._scored += scored
            logprobs, self._offset = self._names.completion(scored, self._top, self._offset)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def whole(self) -> Json:
        """The choice of an answer given at once."""
        logprobs = None
        if self._top is not None:
            logprobs, _ = self._names.completion(tuple(self._scored), self._top, 0)
        text = "".join(self._text)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self._finish}


Sample = ChatSample | CompletionSample
Pieces = AsyncGenerator[list[Piece]]


class Answer:
    """The answer to one request, made of one or more samples."""

    def __init__(
        self, kind: str, model: str, samples: list[Sample], usage: Usage, note: Json | None = None
    ) -> None:
        """`note`: what else the client is told, once, under `trivium`."""
        prefix = "chatcmpl" if kind == "chat.completion" else "cmpl"
        self._head: Json = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind}
        self._rest: Json = {"created": int(time.time()), "model": model}
        self._samples, self._usage = samples, usage
        self._note: Json = {"trivium": note} if note else {}

    async def whole(self, pieces: Pieces) -> Json:
        """The answer once it is complete."""
        async for batch in pieces:
            for piece in batch:
                self._usage.completion_tokens += piece.tokens
                self._samples[piece.sample].take(piece)
        choices = [sample.whole() for sample in self._samples]
        return {**self._head, **self._rest, "choices": choices, "usage": self._usage.json(), **self._note}

    async def events(self, pieces: Pieces, *, include_usage: bool) -> AsyncGenerator[bytes]:
        """The answer as server-sent events; pieces that arrived together travel together."""
        head = dict(self._head)
        if head["object"] == "chat.completion":
            head["object"] = "chat.completion.chunk"
        head |= self._rest
        no_usage: Json = {"usage": None} if include_usage else {}
        note = self._note
        try:
            async with aclosing(pieces):
                async for batch in pieces:
                    events = []
                    for piece in joined(batch):
                        self._usage.completion_tokens += piece.tokens
                        choice = self._samples[piece.sample].take(piece)
                        if _tells(choice):
                            events.append(event({**head, "choices": [choice], **no_usage, **note}))
                            note = {}
                    if events:
                        yield b"".join(events)
        except RequestRefused as refusal:
            yield event(refusal.body)
            return
        except TriviumError as error:
            yield event(error_body(str(error), 400))
            return
        except Exception:
            yield event(error_body("the server failed on this request; its log says why", 500))
            raise
        if include_usage:
            yield event({**head, "choices": [], "usage": self._usage.json()})
        yield DONE


def _tells(choice: Json) -> bool:
    return any(choice.get(key) for key in ("delta", "text", "logprobs", "finish_reason"))


def joined(batch: list[Piece]) -> list[Piece]:
    """Pieces of one sample that arrived together as one piece."""
    groups: dict[int, list[Piece]] = {}
    for piece in batch:
        groups.setdefault(piece.sample, []).append(piece)
    return [
        group[0]
        if len(group) == 1
        else Piece(
            sample,
            "".join(piece.text for piece in group),
            sum(piece.tokens for piece in group),
            tuple(scored for piece in group for scored in piece.scored),
            group[-1].finish,
        )
        for sample, group in groups.items()
    ]


_dump: Callable[[Any], str] = json.JSONEncoder(
    ensure_ascii=False, separators=(",", ":"), allow_nan=False
).encode


def event(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + _dump(body).encode("utf-8", "replace") + b"\n\n"
