"""Connections that are slow, many, half closed or never read from: each is bounded, and others are served."""

import asyncio
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import httpx
import pytest
import serving
from serving import CHAT, GOOD, ScriptedEngine, raw, running, until

from trivium.serve import connections, server
from trivium.serve.limits import Limits
from trivium.serve.logs import BURST, Sparing
from trivium.serve.measures import Measures

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"


def dial(address, source=None, receive=None):
    host, port = address.removeprefix("http://").split(":")
    wire = socket.socket()
    if receive is not None:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    if source is not None:
        wire.bind((source, 0))
    wire.settimeout(20)
    wire.connect((host, int(port)))
    return wire


def request(body, version="1.1", route=CHAT):
    sent = json.dumps(body).encode()
    head = f"POST {route} HTTP/{version}\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n"
    return head.encode() + sent


def read_all(wire):
    received = b""
    while piece := wire.recv(65536):
        received += piece
    return received


def closes(wire, seconds):
    """What comes before the server ends the connection, which it does within some seconds."""
    wire.settimeout(seconds)
    try:
        return read_all(wire)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("sent", [b"", HEAD, b"\r\n", b"GET"])
def test_a_head_that_does_not_arrive_ends_its_connection(sent):
    with running({"one": ScriptedEngine("a")}, limits=Limits(head_seconds=0.3)) as address:
        wire = dial(address)
        wire.sendall(sent)
        assert closes(wire, 5).startswith(b"HTTP/1.1 400 " if sent == b"\r\n" else b"HTTP/1.1 408 ")


def test_bytes_that_drip_do_not_set_the_deadline_back():
    limits = Limits(head_seconds=0.4, idle_seconds=0.4)
    with running({"one": ScriptedEngine("a")}, limits=limits) as address:
        # the head of a second request, and the rest of a body that was refused
        for begun in (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
            HEAD + b"Content-Length: 9999999\r\n\r\n",
        ):
            wire, ended = dial(address), time.monotonic() + 5
            wire.sendall(begun)
            assert wire.recv(4096)
            with pytest.raises(OSError):  # noqa: PT012 (the server closes somewhere on the way)
                while time.monotonic() < ended:
                    wire.sendall(b"x")
                    time.sleep(0.05)
                raise AssertionError("the connection was left open")


def test_an_idle_connection_is_closed():
    with running({"one": ScriptedEngine("a")}, limits=Limits(idle_seconds=0.3)) as address:
        wire = dial(address)
        wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert closes(wire, 5).startswith(b"HTTP/1.1 200 ")


def test_connections_without_a_request_make_room_for_those_with_one():
    with running({"one": ScriptedEngine("a")}, limits=Limits(connections=8)) as address, raw(address) as http:
        wires = [dial(address) for _ in range(40)]
        for wire in wires:
            wire.sendall(HEAD)
        assert http.post(CHAT, json=GOOD).status_code == 200
        metrics = http.get("/metrics").text
        assert "trivium_connections 8" in metrics
        assert "trivium_connections_dropped_total 33" in metrics
        # those whose bodies do not come count as little as those whose heads do not
        slow = [dial(address) for _ in range(20)]
        for wire in slow:
            wire.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        with raw(address) as another:
            assert another.post(CHAT, json=GOOD).status_code == 200


class Waiting:
    """A connection without a request since some time."""

    receiving = True

    def __init__(self, since: float) -> None:
        self.address, self.since = str(since), since
        self.transport, self.ended = self, False

    def abort(self) -> None:
        self.ended = True


def test_the_connection_that_has_waited_longest_makes_room():
    room = connections.Connections(Limits(connections=2), Measures())
    room._sweeping = True
    some = [Waiting(since) for since in (5.0, 3.0, 9.0, 7.0)]
    assert [room.enter(one) for one in some] == [None] * 4
    assert [one.ended for one in some] == [True, True, False, False]


def test_where_every_connection_is_being_answered_the_next_is_refused():
    slow = ScriptedEngine("word " * 1000, delay=0.01, context=4000)
    with running({"one": slow}, limits=Limits(connections=3)) as address:
        # from one address each, so that it is the number of all that counts
        wires = [dial(address, f"127.0.0.{number}") for number in (2, 3, 4)]
        for wire in wires:
            wire.sendall(request({**GOOD, "max_tokens": 900, "stream": True}))
            assert wire.recv(4096).startswith(b"HTTP/1.1 200 ")
        refused = closes(dial(address, "127.0.0.5"), 5)
        head, _, body = refused.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1" in head.lower()
        assert "3 connections" in json.loads(body)["error"]["message"]
        for wire in wires:
            wire.close()
        until(lambda: httpx.get(f"{address}/health", trust_env=False).status_code == 200)


def test_one_address_cannot_take_all_connections():
    slow = ScriptedEngine("word " * 1000, delay=0.01, context=4000)
    limits = Limits(connections=10, connections_per_address=3, drain_seconds=0.2)
    with running({"one": slow}, limits=limits) as address:
        greedy = [dial(address, "127.0.0.2") for _ in range(3)]
        for wire in greedy:
            wire.sendall(request({**GOOD, "max_tokens": 900, "stream": True}))
            assert wire.recv(4096).startswith(b"HTTP/1.1 200 ")
        assert closes(dial(address, "127.0.0.2"), 5).startswith(b"HTTP/1.1 503 ")
        other = dial(address, "127.0.0.3")
        other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert closes(other, 5).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_does_not_read_is_cut_off(monkeypatch):
    def bound(host, port):
        listener = server.bound(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(serving, "bound", bound)
    talkative = ScriptedEngine("word " * 2000, context=40_000)
    with running({"one": talkative}, limits=Limits(stalled_seconds=0.5)) as address, raw(address) as http:
        asked = {**GOOD, "max_tokens": 1900, "logprobs": True, "top_logprobs": 3}
        wires = []
        for stream in (True, False):
            wires.append(dial(address, receive=4096))
            wires[-1].sendall(request({**asked, "stream": stream}))
        until(lambda: len(talkative.prompts) == 2)
        until(lambda: "trivium_connections 1" in http.get("/metrics").text)
        for wire in wires:
            assert not closes(wire, 5).endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_has_closed_its_side_is_answered(stream):
    slow = ScriptedEngine("word " * 20, delay=0.03)
    with running({"one": slow}) as address:
        wire = dial(address)
        wire.sendall(request({**GOOD, "max_tokens": 12, "stream": stream}))
        wire.shutdown(socket.SHUT_WR)
        received = closes(wire, 20)
        assert received.count(b"HTTP/1.1 200 OK") == 1
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}")
        if stream:
            assert received.count(b"chat.completion.chunk") > 3
            return
        # what comes in between is what a client of this protocol has to expect
        interim, _, final = received.rpartition(b"HTTP/1.1 200 OK")
        assert set(interim.split(b"\r\n")) <= {b"HTTP/1.1 100 Continue", b""}
        assert json.loads(final.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 12


def test_an_old_client_that_closes_its_side_is_taken_for_gone():
    """HTTP/1.0 has nothing that could be sent to find out."""
    slow = ScriptedEngine("word " * 1000, delay=0.02, context=4000)
    with running({"one": slow}) as address:
        wire = dial(address)
        wire.sendall(request({**GOOD, "max_tokens": 900}, "1.0"))
        until(lambda: slow.rows_in_use)
        wire.shutdown(socket.SHUT_WR)
        until(lambda: not slow.rows_in_use, 5)


@pytest.mark.parametrize("close", [True, False])
def test_a_client_that_is_still_sending_hears_why_it_is_refused(close):
    """The answer was lost in a reset where the connection was to be closed behind it."""
    with running({"one": ScriptedEngine("a")}, limits=Limits(head_seconds=0.5)) as address:
        wire = dial(address)
        head = HEAD + b"Connection: close\r\n" * close
        wire.sendall(head + b"Content-Length: 9000000\r\n\r\n" + b"a" * 2_000_000)
        time.sleep(0.2)
        wire.sendall(b"a" * 1_000_000)
        assert b" 413 " in wire.recv(65536)
        # and is ended by its deadline though it does not close its side
        until(lambda: is_ended(wire))


def is_ended(wire):
    try:
        wire.sendall(b"a" * 1000)
    except OSError:
        return True
    return False


def test_a_client_that_resets_while_it_is_refused_harms_nobody():
    """Ending the answer to a socket that was reset is an error of the socket, and not one of the sweep."""

    class Refusing(asyncio.Protocol):
        def connection_made(self, transport):
            transport.pause_reading()
            self.made.set_result(connections._Lingering(transport, lambda: True))

    async def refused():
        loop = asyncio.get_running_loop()
        Refusing.made = loop.create_future()
        server = await loop.create_server(Refusing, "127.0.0.1", 0)
        client = socket.create_connection(server.sockets[0].getsockname())
        lingering = await Refusing.made
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        await asyncio.sleep(0.05)
        lingering.close()
        assert lingering.is_closing()
        server.close()

    asyncio.run(refused())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_waits_in_line_and_leaves_is_noticed(stream):
    """Its answer has not begun, so nothing but a probe tells it from one that has only closed its side."""
    slow = ScriptedEngine("word " * 1000, rows=1, delay=0.02, context=4000)
    slow.step = lambda: time.sleep(0.02) or bool(slow.rows)
    with running({"one": slow}) as address:
        wire = dial(address)
        wire.sendall(request({**GOOD, "max_tokens": 900, "stream": stream}))
        until(lambda: slow.rows_in_use)
        wire.close()
        until(lambda: not slow.rows_in_use, 5)


def test_a_stop_does_not_wait_for_requests_that_have_not_arrived():
    began = time.monotonic()
    with running({"one": ScriptedEngine("a")}, limits=Limits(drain_seconds=19)) as address:
        wires = [dial(address) for _ in range(3)]
        for wire, sent in zip(wires, (b"", HEAD, HEAD + b"Content-Length: 100\r\n\r\n{"), strict=True):
            wire.sendall(sent)
        until(lambda: "trivium_connections 4" in httpx.get(f"{address}/metrics", trust_env=False).text)
    assert time.monotonic() - began < 15
    assert closes(wires[2], 5).startswith(b"HTTP/1.1 503 ")


def test_pipelined_requests_of_a_half_closed_client_are_all_answered():
    with running({"one": ScriptedEngine("word")}) as address:
        wire = dial(address)
        wire.sendall(request(GOOD) * 3)
        wire.shutdown(socket.SHUT_WR)
        assert closes(wire, 10).count(b"HTTP/1.1 200 OK") == 3


def test_what_is_no_http_is_refused_in_openais_shape():
    with running({"one": ScriptedEngine("a")}) as address:
        for nonsense in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"a" * 100_000):
            wire = dial(address)
            wire.sendall(nonsense)
            head, _, body = closes(wire, 5).partition(b"\r\n\r\n")
            assert not head or head.startswith(b"HTTP/1.1 400 ")
            assert not body or json.loads(body)["error"]["type"] == "invalid_request_error"


def test_what_repeats_is_logged_a_few_times_and_counted(monkeypatch):
    out, now = [], [100.0]
    monkeypatch.setattr("trivium.serve.logs.time.monotonic", lambda: now[0])

    class Keeping(logging.Handler):
        def emit(self, record):
            out.append(record.getMessage())

    handler = Keeping()
    handler.addFilter(Sparing())
    logger = logging.getLogger("trivium.test")
    logger.addHandler(handler)

    def log(number):
        logger.warning("number %d", number)

    for number in range(500):
        log(number)
    assert out == [f"number {number}" for number in range(BURST)]
    logger.warning("another")
    now[0] += 61
    log(7)
    assert out[BURST:] == ["another", f"number 7 ({500 - BURST} more like it were left out)"]
    logger.removeHandler(handler)


def test_connections_leave_descriptors_to_the_rest(monkeypatch):
    # The process that runs the tests may have opened many files before.
    used = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + 240, 4096))
    most, backlog = connections.room_for(512)
    assert 50 < most < 241 - 2 * backlog
    monkeypatch.setattr(resource, "getrlimit", lambda _: (100_000, 100_000))
    assert connections.room_for(512) == (512, connections.BACKLOG)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    assert connections.room_for(512)[0] == 1


SERVE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.path.insert(0, "tests")
from serving import ScriptedEngine
from trivium.serve import server
server.short_names = lambda models: {"one": "one"}
server.with_adapters = lambda names: {"one": {}}
server.find_model = lambda model, runs: model
server.open_engine = lambda *_, **__: ScriptedEngine("word " * 50, delay=0.02)
server.serve(["one"], port=0)
"""


@pytest.mark.slow
def test_a_flood_of_connections_leaves_the_service_and_its_log_alone(tmp_path):
    """300 that send half a head, and many that send none, where the process may open 256 files."""
    told = (tmp_path / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", SERVE], stdout=subprocess.PIPE, stderr=told, cwd=os.getcwd()
    )
    try:
        lines = iter(process.stdout.readline, b"")
        line = next(line for line in lines if line.startswith(b"Serving"))
        address = line.decode().split(" at ")[1].split(" ")[0]
        wires, ended = [], threading.Event()

        def flood():
            while not ended.is_set():
                for half in (HEAD, b"", b"nonsense\r\n\r\n"):
                    try:
                        wire = dial(address)
                        wire.setblocking(False)
                        wire.send(half)
                    except OSError:
                        continue
                    wires.append(wire)
                for wire in wires[:-400]:
                    wire.close()
                del wires[:-400]
                time.sleep(0.004)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            until(lambda: len(wires) >= 300)
            for _ in range(2):
                answer = httpx.post(f"{address}{CHAT}", json=GOOD, timeout=10, trust_env=False)
                assert answer.status_code == 200
        finally:
            ended.set()
            flooding.join()
            for wire in wires:
                wire.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        told.close()
    assert (tmp_path / "log").stat().st_size < 20_000
