"""The connections of a server: how many there may be, how slow each may be, and when its client is gone."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from trivium.serve.failures import error_body
from trivium.serve.limits import Limits
from trivium.serve.measures import Measures

log = logging.getLogger("trivium.serve")

# Descriptors that connections leave to files, pipes and whatever else the process opens.
SPARE_DESCRIPTORS = 32
# Connections that may wait to be taken in, and that the event loop takes in at one go.
BACKLOG = 128
# When a client that has closed its side is asked whether it still reads, in seconds after that.
PROBES = (0.0, 0.25, 2.0)
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 503: b"Service Unavailable"}


def room_for(connections: int) -> tuple[int, int]:
    """How many of so many connections the process's file descriptors allow, and how long its backlog may be.

    A process without a free descriptor cannot take in a connection to refuse it, nor open a file.
    """
    try:
        import resource
    except ImportError:  # not a Unix: its limit is far away
        return connections, BACKLOG
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return connections, BACKLOG
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:
        used = SPARE_DESCRIPTORS
    free = max(most - used, 0)
    backlog = max(4, min(BACKLOG, free // 8))
    # a connection is taken in before it can be refused, and one that was closed is there until the next turn
    return max(1, min(connections, free - 2 * backlog - SPARE_DESCRIPTORS)), backlog


class Connections:
    """All connections of one server, within its limits."""

    def __init__(self, limits: Limits, measures: Measures) -> None:
        self.limits = limits
        self.most, self.backlog = room_for(limits.connections)
        # where descriptors are scarce, one address must not take them all
        scarce = self.most < limits.connections
        self.most_per_address = min(
            limits.connections_per_address, max(1, self.most // 2) if scarce else self.most
        )
        self._open: dict[Connection, None] = {}
        self._addresses: Counter[str] = Counter()
        self._measures = measures
        self._sweeping: asyncio.TimerHandle | None = None
        for name in ("refused", "dropped"):
            measures.count(f"trivium_connections_{name}_total", 0)
        measures.watch("trivium_connections", "gauge", lambda: len(self._open))

    def protocol(self, **settings: Any) -> Connection:
        """A protocol for a connection that comes in, as uvicorn asks for it."""
        return Connection(self, **settings)

    def enter(self, connection: Connection) -> str | None:
        """Count a connection in, where others must make room for it; or why it cannot be."""
        crowd = None
        if self._addresses[connection.address] >= self.most_per_address:
            crowd = [one for one in self._open if one.address == connection.address]
        elif len(self._open) >= self.most:
            crowd = list(self._open)
        if crowd is not None:
            idle = [one for one in crowd if one.receiving]
            if not idle:
                self._measures.count("trivium_connections_refused_total")
                problem = f"{len(crowd)} connections are being answered, which is the most this server takes"
                log.warning("a connection is refused: %s", problem)
                return problem
            self._measures.count("trivium_connections_dropped_total")
            longest = min(idle, key=lambda one: one.since)
            self.leave(longest)
            longest.transport.abort()
        self._open[connection] = None
        self._addresses[connection.address] += 1
        if self._sweeping is None:
            self._sweep()
        return None

    def leave(self, connection: Connection) -> None:
        """Count a connection out, once."""
        if connection in self._open:
            del self._open[connection]
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]

    def _sweep(self) -> None:
        """Look at every connection for what takes it too long."""
        self._sweeping = None
        now = time.monotonic()
        for connection in list(self._open):
            connection.check(now)
        if self._open:
            pause = min(1.0, self.limits.head_seconds / 4, self.limits.stalled_seconds / 4)
            self._sweeping = asyncio.get_running_loop().call_later(max(0.01, pause), self._sweep)


class _Lingering:
    """A transport that ends without a reset where its client is still sending (RFC 9112, section 9.6).

    A socket that is closed while unread bytes lie in it resets the connection, and with it the answer that
    says why. So the answer ends first, and what comes then is passed over until the client closes its side.
    """

    def __init__(self, transport: asyncio.Transport, is_sending: Callable[[], bool]) -> None:
        self._transport, self._is_sending = transport, is_sending
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether nothing more will be written."""
        return self.ended or self._transport.is_closing()

    def close(self) -> None:
        """End the answer, and the connection where nothing more can come or this is asked for once more."""
        if self.ended or self._transport.is_closing() or not self._is_sending():
            self._transport.close()
        else:
            self.ended = True
            try:
                self._transport.write_eof()
            except OSError:
                # The client has reset the connection meanwhile: no answer can reach it.
                self._transport.abort()
                return
            self._transport.resume_reading()


class Connection(H11Protocol):
    """One connection: uvicorn's, with a deadline for heads, for closing and for clients that do not read.

    A client may close its side once it has sent its request (RFC 9112, section 9.6). It looks like one that
    has gone until something is sent to it: then the kernel of one that has gone answers with a reset.
    """

    def __init__(self, connections: Connections, **settings: Any) -> None:
        super().__init__(**settings)
        self._connections, self._application = connections, self.app
        self.app = self._answer  # type: ignore[assignment]
        self.address, self.since = "", 0.0
        self._head_since: float | None = None
        self._stuck_since: float | None = None
        self._closing_since: float | None = None
        self._probes: list[asyncio.TimerHandle] = []
        self._half_closed, self._streams, self._answered, self._refused = False, False, False, False

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                kind = dict(message.get("headers", ())).get(b"content-type", b"")
                self._streams = kind.startswith(b"text/event-stream")
            await send(message)

        application: ASGIApp = self._application  # type: ignore[assignment]
        await application(scope, receive, noting)

    @property
    def busy(self) -> bool:
        """Whether a request is being received or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def receiving(self) -> bool:
        """Whether nothing is lost but patience when the connection ends: no request is complete."""
        return not self.busy or self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        lingering: Any = _Lingering(transport, lambda: self.cycle is None or self.cycle.more_body)
        super().connection_made(lingering)
        peer = transport.get_extra_info("peername")
        self.address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
        self.since = time.monotonic()
        problem = self._connections.enter(self)
        if problem is not None:
            self._refused = True
            self._refuse(503, problem)
            return
        self._head_since = self.since

    def connection_lost(self, exc: Exception | None) -> None:
        self._connections.leave(self)
        for probe in self._probes:
            probe.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        self._answered, self.since = True, time.monotonic()
        super().on_response_complete()
        if not self.busy and self._half_closed:
            self.transport.close()
        self._watch_head()

    def _watch_head(self) -> None:
        """Let time run for a head that has begun to arrive, or for the rest of a body that was not wanted."""
        begun = self.conn.their_state is not h11.IDLE or bool(self.conn.trailing_data[0])
        if self.busy or (self._answered and not begun):
            self._head_since = None
        elif self._head_since is None:
            self._head_since = time.monotonic()

    def shutdown(self) -> None:
        """The server stops: what has not arrived is not waited for."""
        if self.busy and self.cycle.more_body:
            self._refuse(503, "the server is being stopped")
            self.transport.close()
        elif self.transport.is_closing():
            self.transport.close()
        else:
            super().shutdown()

    def check(self, now: float) -> None:
        """End the connection if it takes too long."""
        limits = self._connections.limits
        if self.transport.is_closing():
            # a client may leave what is left of an answer unread for ever, or go on sending for ever
            self._closing_since = self._closing_since or now
            most = limits.head_seconds if self.transport.ended else limits.stalled_seconds  # type: ignore
            if now - self._closing_since > most:
                self.transport.abort()
        elif self._stuck_since is not None and now - self._stuck_since > limits.stalled_seconds:
            self.transport.abort()
        elif self._head_since is not None and now - self._head_since > limits.head_seconds:
            self._refuse(408, f"the request did not arrive in {limits.head_seconds:g} s")

    def pause_writing(self) -> None:
        self._stuck_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck_since = None
        super().resume_writing()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """Go on for a client that has sent all of its request and may wait for the answer: true says so."""
        if not self.busy or self.cycle.more_body or self.scope["http_version"] != "1.1":
            return None
        if not self._half_closed:
            self._half_closed = True
            self._probes = [self.loop.call_later(delay, self._probe) for delay in PROBES]
        return True

    def _probe(self) -> None:
        """Send what means nothing to a client that reads: an interim response, or a comment in a stream."""
        if self.transport.is_closing() or not self.busy:
            return
        if not self.cycle.response_started:
            event: Any = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        elif self._streams:
            event = h11.Data(data=b": \n\n")
        else:
            return
        self.transport.write(self.conn.send(event) or b"")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, problem: str) -> None:
        """Say in OpenAI's shape why the connection ends, if that can still be said, and end it."""
        body = json.dumps(error_body(problem, status)).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        if status == 503:
            headers.append((b"retry-after", b"1"))
        try:
            events = (
                h11.Response(status_code=status, headers=headers, reason=REASONS[status]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        except h11.LocalProtocolError:
            pass  # an answer had begun
        self.transport.close()
