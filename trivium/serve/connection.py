"""Reading a request's body within bounds, and noticing when its client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trivium.serve.failures import RequestRefused
from trivium.serve.limits import Limits

Result = TypeVar("Result")
# How long a client that has not read all yet may take over the end of a stream.
FAREWELL_SECONDS = 5.0


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def read_bytes(request: Request, limits: Limits) -> bytes:
    """The body of a request, refused when it is too large or comes too slowly."""
    too_large = RequestRefused(f"the body is larger than {limits.body_bytes} bytes", status=413)
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limits.body_bytes:
        raise too_large
    received = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                received += chunk
                if len(received) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise RequestRefused(f"the body did not arrive in {limits.body_seconds:g} s", status=408) from None
    except ClientDisconnect:
        raise ClientGone from None
    return bytes(received)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of some work, which is cancelled as soon as the client disconnects."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, written until they end, the client leaves or time runs out, which is told."""

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes], *, seconds: float, late: bytes, on_close: Callable[[], None]
    ):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._seconds, self._late, self._on_close = events, seconds, late, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async with asyncio.timeout(self._seconds):
                    await while_connected(receive, self._write(send))
                last = b""
            except TimeoutError:
                last = self._late
                self._on_close()
            async with asyncio.timeout(FAREWELL_SECONDS):
                await send({"type": "http.response.body", "body": last, "more_body": False})
        except (ClientGone, OSError):  # a TimeoutError is an OSError
            pass  # nobody reads any more
        finally:
            self._on_close()

    async def _write(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
