"""Connections that are slow, many, half closed, unread or no HTTP at all, beside an honest client."""

import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from besieged import ATTACKER, Besieged, dial, honest_client, start
from serving import CHAT, GOOD

from attack.frame import attack


@cache
def server() -> Besieged:
    """One server for all attacks of this file: what one leaves behind the next would find."""
    return start(Path(mkdtemp(prefix="attack-server-")))


HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()


def asking(**fields: object) -> bytes:
    """A whole request."""
    sent = json.dumps({**GOOD, **fields}).encode()
    return HEAD + f"Content-Length: {len(sent)}\r\n\r\n".encode() + sent


def _all_of(wire: socket.socket) -> bytes:
    received = b""
    try:
        while piece := wire.recv(1 << 16):
            received += piece
    except ConnectionResetError:
        pass
    return received


ENDLESS = {
    "nothing": b"", "half a head": HEAD, "half a line": b"GE", "newlines": b"\r\n", "half a body": HEAD
    + b"Content-Length: 1000\r\n\r\n{", "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    "a body that waits to be asked for": HEAD + b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n",
}  # fmt: skip


@attack("server: slow requests", "40 connections that send", cases=ENDLESS)
def slow_request(scratch: Path, sent: bytes) -> None:
    """Each is ended within the deadline of its head or body."""
    with honest_client(server()) as besieged:
        wires = [dial(besieged) for _ in range(40)]
        for wire in wires:
            wire.sendall(sent)
        for wire in wires:
            wire.settimeout(15)
            _all_of(wire)
            wire.close()


@attack("server: slow requests", "a byte of each of 40 requests every tenth of a second", cases={
    "of the head": HEAD * 30, "of the body": HEAD + b"Content-Length: 500\r\n\r\n" + b"{" * 500,
})  # fmt: skip
def dripping(scratch: Path, sent: bytes) -> None:
    """Bytes that arrive do not set the deadline back."""
    whole = len(HEAD) + 25 if b"Content-Length" in sent else 0
    with honest_client(server()) as besieged:
        wires = [dial(besieged) for _ in range(40)]
        for wire in wires:
            wire.sendall(sent[:whole])
        deadline = time.monotonic() + 15
        for place in range(whole, len(sent)):
            for wire in list(wires):
                try:
                    wire.sendall(sent[place : place + 1])
                except OSError:
                    wires.remove(wire)
            if not wires:
                return
            assert time.monotonic() < deadline, f"{len(wires)} connections are still open"
            time.sleep(0.1)
        raise AssertionError("the requests were read to their ends")


NO_REQUEST = {
    "nonsense": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a head of 200,000 lines": HEAD + b"a: b\r\n" * 200_000,
    "a line of 2 MB": HEAD + b"a: " + b"b" * 2_000_000,
    "a path of 200,000 letters": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length beyond any number": HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n",
    "a length and chunks": HEAD
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1",
    "a chunk of no size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a chunk of 2^64": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n",
    "an encoding that is none": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a null in the head": b"GET /\x00 HTTP/1.1\r\nHost: a\x00b\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "another host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    "another origin": HEAD + b"Origin: http://evil.example\r\nContent-Length: 2\r\n\r\n{}",
    "a way out of the page's folder": b"GET /../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "the same, written otherwise": b"GET /%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "the same, as a model": b"GET /v1/models/../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a method that is none": b"STEAL / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a websocket": b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "a proxy's request": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
}  # fmt: skip
_SERVED = {"a websocket"}


@attack("server: no requests", "a connection that sends", cases={name: name for name in NO_REQUEST})
def no_request(scratch: Path, name: str) -> None:
    """The answer is a refusal, or none; a page is only what the page is."""
    with honest_client(server()) as besieged, dial(besieged) as wire:
        try:
            wire.sendall(NO_REQUEST[name])
            wire.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        said = _all_of(wire)
        assert b"root:" not in said
        assert b"Traceback" not in said
        # who has closed its side may be asked whether it still reads, with an interim answer
        status = said.rpartition(b"HTTP/1.1 ")[2][:3]
        assert not status or status[:1] == b"4" or name in _SERVED, said[:300]


def _half_heads(
    besieged: Besieged, count: int, sources: list[str], sent: bytes = HEAD
) -> list[socket.socket]:
    wires: list[socket.socket] = []
    for number in range(count):
        try:
            wire = dial(besieged, sources[number % len(sources)])
            wires.append(wire)
            wire.setblocking(False)
            wire.send(sent)
        except OSError:
            continue
    return wires


MANY = [f"127.0.1.{number}" for number in range(1, 200)]


@attack("server: floods", "600 connections with half a head", cases={
    "from one address": [ATTACKER], "from 199 addresses": MANY, "from the honest client's": ["127.0.0.1"],
})  # fmt: skip
def flood(scratch: Path, sources: list[str]) -> None:
    """Who has a whole request is served."""
    with honest_client(server()) as besieged:
        wires = _half_heads(besieged, 600, sources)
        time.sleep(1)
        for wire in wires:
            wire.close()


@attack("server: floods", "300 connections to a server of 256 descriptors, for 8 seconds", seconds=120)
def descriptors(scratch: Path) -> None:
    """The service and its log are as ever."""
    besieged = start(scratch, files=256)
    try:
        with honest_client(besieged):
            ends = time.monotonic() + 8
            wires: list[socket.socket] = []
            while time.monotonic() < ends:
                wires += _half_heads(besieged, 100, MANY)
                for wire in wires[:-300]:
                    wire.close()
                del wires[:-300]
            for wire in wires:
                wire.close()
    finally:
        besieged.end()


@attack("server: floods", "1,000 connections that are closed at once")
def closing(scratch: Path) -> None:
    """Nothing is left of them."""
    with honest_client(server()) as besieged:
        for _ in range(1000):
            dial(besieged).close()


@attack("server: floods", "150 whole requests at once", cases={"whole": False, "streamed": True})
def crowd(scratch: Path, stream: bool) -> None:
    """Those who find no room are told to come back, and nobody gets an error of the server's."""
    with (
        honest_client(server(), slowest=40.0) as besieged,
        besieged.http() as http,
        ThreadPoolExecutor(60) as pool,
    ):
        body = {**GOOD, "max_tokens": 60, "min_tokens": 60, "stream": stream}
        found = list(pool.map(lambda seed: http.post(CHAT, json={**body, "seed": seed}), range(150)))
        assert {answer.status_code for answer in found} <= {200, 429}
        assert sum(answer.status_code == 200 for answer in found) >= 60


def _reset(wire: socket.socket) -> None:
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wire.close()


LEAVES: dict[str, Callable[[socket.socket], None]] = {
    "closing": socket.socket.close,
    "resetting": _reset,
    "closing their side and then resetting": lambda wire: (wire.shutdown(socket.SHUT_WR), _reset(wire))[0],
}


@attack("server: vanished clients", "100 that leave at any time by", cases=LEAVES)
def vanish(scratch: Path, leave: Callable[[socket.socket], None]) -> None:
    """Their rows are free at once."""
    chance = random.Random(5)

    def one(seed: int) -> None:
        body = asking(stream=seed % 2 == 0, max_tokens=400, min_tokens=400, seed=seed)
        wire = dial(besieged)
        wire.sendall(body[: chance.choice([len(body), len(body), len(body) // 2])])
        time.sleep(chance.random() * 0.4)
        leave(wire)

    with honest_client(server()) as besieged, ThreadPoolExecutor(10) as pool:
        list(pool.map(one, range(100)))


@attack("server: half-closed clients", "20 that close their side after the request", cases={
    "of a stream": True, "of an answer at once": False,
})  # fmt: skip
def half_closed(scratch: Path, stream: bool) -> None:
    """They are answered to the end."""

    def one(seed: int) -> bytes:
        with dial(besieged) as wire:
            wire.sendall(asking(stream=stream, max_tokens=30, min_tokens=30, seed=seed))
            wire.shutdown(socket.SHUT_WR)
            return _all_of(wire)

    with honest_client(server()) as besieged, ThreadPoolExecutor(5) as pool:
        ending = b"data: [DONE]\n\n" if stream else b'"total_tokens"'
        assert all(ending in said for said in pool.map(one, range(20)))


@attack("server: half-closed clients", "20 that close their side in the middle of a body")
def half_closed_body(scratch: Path) -> None:
    """They are gone."""
    with honest_client(server()) as besieged:
        for _ in range(20):
            wire = dial(besieged)
            wire.sendall(asking()[:-5])
            wire.shutdown(socket.SHUT_WR)
            wire.settimeout(15)
            _all_of(wire)
            wire.close()


@attack("server: half-closed clients", "30 requests sent at once on one connection")
def pipelined(scratch: Path) -> None:
    """Each is answered in its turn."""
    with honest_client(server()) as besieged, dial(besieged) as wire:
        wire.sendall(asking() * 30)
        wire.shutdown(socket.SHUT_WR)
        said = _all_of(wire)
        assert said.count(b"HTTP/1.1 200") == 30, said[-300:]


READERS = {"nothing": 0, "a byte every tenth of a second": 1}


@attack("server: slow readers", "60 streams, of which their clients read", cases=READERS, seconds=120)
def slow_reader(scratch: Path, count: int) -> None:
    """Their answers are written, their places are free, and they are cut off."""
    with honest_client(server()) as besieged:
        body = asking(model="two", stream=True, max_tokens=50, n=4, logprobs=True, top_logprobs=3)
        wires = [dial(besieged, receive=4096) for _ in range(60)]
        for wire in wires:
            wire.sendall(body)
            wire.settimeout(0.001)
        ends = time.monotonic() + 6
        while time.monotonic() < ends:
            for wire in wires:
                if count:
                    try:
                        wire.recv(count)
                    except OSError:
                        continue
            time.sleep(0.1)
        for wire in wires:
            wire.close()


@attack("server: vanished clients", "a server that ends after all attacks of this file", cases={
    "with its memory, log and open files as at its start": True,
})  # fmt: skip
def at_the_end(scratch: Path, value: bool) -> None:
    """It drains and ends with status 0 within seconds."""
    besieged = server()
    before = len(list(Path(f"/proc/{besieged.process.pid}/fd").iterdir()))
    assert before < 60, f"it has {before} open files"
    began = time.monotonic()
    assert besieged.end(15) == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in besieged.log.read_text(), besieged.log.read_text()[-1000:]
