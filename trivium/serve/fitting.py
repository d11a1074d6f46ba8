"""Conversations that are too long for a model: summaries from its worker, and what the client is told."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from trivium.generate.chat_fit import Fitted, Summariser
from trivium.generate.requests import Request
from trivium.serve.connection import ClientGone
from trivium.serve.worker import Adapted, Worker

Result = TypeVar("Result")
LEFT_OUT = "X-Trivium-Messages-Left-Out"
SUMMARISED = "X-Trivium-Messages-Summarised"
FORGOTTEN = "X-Trivium-Tokens-Forgotten"


class FromThread:
    """Lets a thread wait for what the worker does on the event loop, until the request is given up."""

    def __init__(self, worker: Worker | Adapted) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._task: asyncio.Task[Any] | None = None
        self._closed = False

    def close(self) -> None:
        """Ask nothing more, and stop what is being drawn; called from the event loop."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    def _wait(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(self._unless_closed(work), self._loop).result()

    async def _unless_closed(self, work: Coroutine[Any, Any, Result]) -> Result:
        if self._closed:
            work.close()
            raise ClientGone
        self._task = asyncio.current_task()
        return await work


class Asking(FromThread):
    """Lets the thread that prepares a prompt ask the worker."""

    def complete(self, request: Request) -> tuple[str, int]:
        """What the model writes, and how many tokens that took; called from the thread."""
        return self._wait(self._complete(request))

    async def _complete(self, request: Request) -> tuple[str, int]:
        generation = await self._worker.submit([request])
        try:
            pieces = [piece async for batch in generation.pieces() for piece in batch]
        finally:
            generation.close()
        return "".join(piece.text for piece in pieces), sum(piece.tokens for piece in pieces)


def left_out_of(
    fitted: Fitted, context: int, summariser: Summariser
) -> tuple[dict[str, str], dict[str, Any]]:
    """What became of a conversation that was too long: headers, and an object beside the answer."""
    if fitted.slide is not None:
        forgotten = fitted.slide.forgotten(len(fitted.tokens), context)
        note = {"overflow": "slide", "prompt_tokens_forgotten": forgotten}
        return {FORGOTTEN: str(forgotten)}, note
    if fitted.summary is not None:
        cost = {
            "prompt_tokens": summariser.prompt_tokens,
            "completion_tokens": summariser.completion_tokens,
        }
        note = {
            "overflow": "summarise",
            "messages_summarised": fitted.left_out,
            "summary": fitted.summary,
            "summary_usage": cost,
        }
        return {SUMMARISED: str(fitted.left_out)}, note
    if fitted.left_out:
        return {LEFT_OUT: str(fitted.left_out)}, {"overflow": "drop", "messages_left_out": fitted.left_out}
    return {}, {}
