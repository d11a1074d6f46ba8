"""A server in a process of its own that is attacked while an honest client goes on asking it."""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from generating import tiny_model, tokenizer
from serving import CHAT

from trivium.model.folder import save_model

TESTS = Path(__file__).parent
HONEST = {
    "model": "one", "messages": [{"role": "user", "content": "the bell"}], "seed": 7, "min_tokens": 20,
    "max_tokens": 20,
}  # fmt: skip
ATTACKER = "127.0.0.2"
"""Where attacks come from, so that what is counted per address is not counted against the honest client."""
SERVER = """
import json, resource, sys
from generating import tiny_engine
from serving import ScriptedEngine
from trivium.serve import server
from trivium.serve.limits import Limits
given = json.loads(sys.argv[1])
if given["files"]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (given["files"],) * 2)
engines = {"one": tiny_engine(rows=8), "two": ScriptedEngine(given["script"], delay=0.01, context=400_000)}
server.open_engine = lambda folder, **settings: engines[folder.name]
folders = [f"{given['folder']}/{name}" for name in engines]
server.serve(folders, port=given["port"], limits=Limits(**given["limits"]))
"""
LIMITS: dict[str, Any] = {
    "head_seconds": 1.0, "body_seconds": 2.0, "idle_seconds": 2.0, "stalled_seconds": 2.0,
    "request_seconds": 60.0, "drain_seconds": 3.0, "connections": 200, "connections_per_address": 150,
    "grammar_seconds": 0.5,
}  # fmt: skip


@dataclass
class Besieged:
    """A running server; `model` one is a small model, `two` says the same text to everybody."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path
    expected: str = ""
    memory: int = 0
    answers: list[tuple[str, float]] = field(default_factory=list)

    def http(self) -> httpx.Client:
        """A bare client of the attacker's address."""
        transport = httpx.HTTPTransport(local_address=ATTACKER, limits=httpx.Limits(max_connections=200))
        return httpx.Client(base_url=self.address, transport=transport, trust_env=False, timeout=60)

    def ask(self) -> str:
        """What the honest client is told, whole or in an error's words."""
        text = ""
        with (
            httpx.Client(base_url=self.address, trust_env=False, timeout=60) as http,
            http.stream("POST", CHAT, json={**HONEST, "stream": True}) as answer,
        ):
            if answer.status_code != 200:
                return f"{answer.status_code} {answer.read().decode()}"
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return json.dumps(event)
                    text += event["choices"][0]["delta"].get("content", "")
        return text

    def resident(self) -> int:
        """Bytes of memory that the server holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * resource.getpagesize()

    def measure(self, name: str) -> float:
        """The sum of a measure over all its labels."""
        lines = httpx.get(f"{self.address}/metrics", trust_env=False, timeout=60).text.splitlines()
        rows = [line for line in lines if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in rows)

    def quiet(self, seconds: float = 30.0) -> None:
        """Wait until no answer is being written and nobody is connected but who asks."""
        deadline = time.monotonic() + seconds
        while self.measure("trivium_samples_inside") or self.measure("trivium_connections") > 2:
            assert time.monotonic() < deadline, "rows or connections are held after the attack"
            time.sleep(0.05)

    def end(self, number: int = signal.SIGKILL) -> int:
        """Send a signal; the status that the process ends with."""
        self.process.send_signal(number)
        return self.process.wait(30)


def start(
    scratch: Path, *, files: int = 0, port: int = 0, script: str = "word " * 50, **limits: Any
) -> Besieged:
    """A server on loopback, ready, warmed up and asked once."""
    for name in ("one", "two"):
        # The engines are the server's own; the folders are only looked for.
        tokenizer().save(scratch / name)
        save_model(tiny_model(), scratch / name)
    given = {"files": files, "port": port, "script": script, "folder": str(scratch)}
    log = scratch / f"log-{time.monotonic_ns()}"
    with log.open("wb") as told:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVER, json.dumps({**given, "limits": {**LIMITS, **limits}})],
            stdout=subprocess.PIPE,
            stderr=told,
            cwd=TESTS,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRIVIUM_API_KEY": ""},
        )
    assert process.stdout is not None
    line = next((one for one in iter(process.stdout.readline, b"") if one.startswith(b"Serving")), b"")
    assert line, f"the server did not start: {log.read_text()[-1000:]}"
    server = Besieged(process, line.decode().split(" at ")[1].split(" ")[0], log)
    server.expected = server.ask()
    assert server.expected
    for _ in range(3):
        assert server.ask() == server.expected
    server.memory = server.resident()
    return server


@contextmanager
def honest_client(server: Besieged, *, slowest: float = 20.0, growth: int = 150 << 20) -> Iterator[Besieged]:
    """While the block runs an honest client asks and asks; afterwards all must be as it was before.

    The bound on its slowest answer is for a machine that does other work; it is well below the head, body and
    request deadlines of a server as people start it.
    """
    ended, answers = threading.Event(), list[tuple[str, float]]()

    def ask() -> None:
        while not ended.is_set():
            began = time.monotonic()
            try:
                told = server.ask()
            except (httpx.HTTPError, OSError) as error:
                told = f"{type(error).__name__}: {error}"
            answers.append((told, time.monotonic() - began))
            time.sleep(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield server
    finally:
        ended.set()
        asking.join()
    assert server.process.poll() is None, f"the server ended: {server.log.read_text()[-1000:]}"
    answers.append((server.ask(), 0.0))
    wrong = [told for told, _ in answers if told != server.expected]
    assert not wrong, f"{len(wrong)} of {len(answers)} honest answers are wrong, such as {wrong[0][:300]}"
    slow = max(seconds for _, seconds in answers)
    assert slow < slowest, f"an honest answer took {slow:.1f} s"
    server.quiet()
    grown = server.resident() - server.memory
    assert grown < growth, f"the server has grown by {grown >> 20} MiB"
    assert server.log.stat().st_size < 300_000, "the log was filled"


def dial(server: Besieged, source: str = ATTACKER, receive: int | None = None) -> socket.socket:
    """A bare connection from an address, perhaps with room for few bytes."""
    host, port = server.address.removeprefix("http://").split(":")
    wire = socket.socket()
    if receive is not None:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    wire.bind((source, 0))
    wire.settimeout(30)
    wire.connect((host, int(port)))
    return wire
