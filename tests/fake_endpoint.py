"""A server with OpenAI's protocol that behaves as badly as it is told to, and counts what it was paid for."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeEndpoint:
    """`answer(prompt, seed)` says what a prompt gets, `mood(prompt, attempt)` how: the name of a method of
    the handler."""

    def __init__(
        self,
        answer: Callable[[str, int], str] = lambda prompt, seed: f"The answer to {prompt}",
        mood: Callable[[str, int], str] = lambda prompt, attempt: "good",
        delay: float = 0.0,
    ) -> None:
        self.answer, self.mood, self.delay = answer, mood, delay
        self.attempts: Counter[str] = Counter()
        self.delivered: Counter[str] = Counter()
        """Whole answers by prompt: what has to be paid for."""
        self.tokens = 0
        """Tokens really read and written, whether the answer arrived or not."""
        self.in_flight = self.most_in_flight = 0
        self.open: set[str] = set()
        self.keys: set[str | None] = set()
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.url = ""
        self.lock = threading.Lock()

    @property
    def requests(self) -> int:
        return sum(self.attempts.values())


def _handler(fake: FakeEndpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompt = body["messages"][-1]["content"]
            with fake.lock:
                fake.keys.add(self.headers.get("Authorization"))
                fake.bodies.append(body)
                fake.times.append(time.monotonic())
                attempt = fake.attempts[prompt]
                fake.attempts[prompt] += 1
                fake.in_flight += 1
                fake.open.add(prompt)
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                time.sleep(fake.delay)
                getattr(self, fake.mood(prompt, attempt))(prompt, body)
            finally:
                with fake.lock:
                    fake.in_flight -= 1
                    fake.open.discard(prompt)

        def good(self, prompt: str, body: dict[str, Any], lie: float = 1.0, **changed: Any) -> None:
            words = fake.answer(prompt, body["seed"]).split(" ")
            text = " ".join(words[: body["max_tokens"]])
            read, written = len(prompt.split()), len(text.split())
            usage = {"prompt_tokens": int(read * lie), "completion_tokens": int(written * lie)}
            finish = "length" if len(words) > body["max_tokens"] else "stop"
            message = {"role": "assistant", "content": changed.get("content", text)}
            choice = {"index": 0, "message": message, "finish_reason": finish}
            with fake.lock:
                fake.delivered[prompt] += 1
                fake.tokens += read + written
            self.send(200, json.dumps({"choices": [choice], "usage": changed.get("usage", usage)}))

        def slow(self, prompt: str, body: dict[str, Any]) -> None:
            time.sleep(0.3)
            self.good(prompt, body)

        def lies_low(self, prompt: str, body: dict[str, Any]) -> None:
            self.good(prompt, body, lie=0.0)

        def lies_high(self, prompt: str, body: dict[str, Any]) -> None:
            self.good(prompt, body, lie=1e6)

        def odd_usage(self, prompt: str, body: dict[str, Any]) -> None:
            self.good(prompt, body, usage="not counted")

        def no_usage(self, prompt: str, body: dict[str, Any]) -> None:
            self.good(prompt, body, usage=None)

        def no_content(self, prompt: str, body: dict[str, Any]) -> None:
            self.good(prompt, body, content=None)

        def garbage(self, prompt: str, body: dict[str, Any]) -> None:
            with fake.lock:
                fake.tokens += len(prompt.split()) + len(fake.answer(prompt, body["seed"]).split())
            self.send(200, "<html>down for maintenance</html>")

        def empty(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(200, json.dumps({"choices": [], "usage": None}))

        def half(self, prompt: str, body: dict[str, Any]) -> None:
            with fake.lock:
                fake.tokens += len(prompt.split()) + len(fake.answer(prompt, body["seed"]).split())
            self.send_response(200)
            self.send_header("Content-Length", "5000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"message": {"content": "The ans')
            self.close_connection = True

        def nested(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(200, "[" * 200_000)

        def error_inside(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(200, json.dumps({"error": {"message": "upstream is overloaded", "code": 502}}))

        def reset(self, prompt: str, body: dict[str, Any]) -> None:
            """A connection that is not closed, but reset."""
            self.half(prompt, body)
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

        def drips(self, prompt: str, body: dict[str, Any]) -> None:
            """A byte now and then, so that no single read takes long; the answer comes whole, but late."""
            late = json.dumps({"choices": [{"message": {"content": "late"}, "finish_reason": "stop"}]})
            self.send_response(200)
            self.send_header("Content-Length", str(30 + len(late)))
            self.end_headers()
            for _ in range(30):
                self.wfile.write(b" ")
                self.wfile.flush()
                time.sleep(0.1)
            self.wfile.write(late.encode())

        def moved(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(308, "", {"Location": "https://new.example/v1/chat/completions"})

        def busy_until(self, prompt: str, body: dict[str, Any]) -> None:
            """A date in the past, in the form that says nothing of its zone."""
            self.send(429, "{}", {"Retry-After": "Mon, 30 Nov 2020 12:00:00 -0000"})

        def busy(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(429, json.dumps({"error": {"message": "slow down"}}), {"Retry-After": "0.05"})

        def broken(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(500, "oops")

        def locked(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(401, json.dumps({"error": {"message": "wrong key"}}))

        def refused(self, prompt: str, body: dict[str, Any]) -> None:
            self.send(400, json.dumps({"error": {"message": "I will not"}}))

        def send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is what a test wants."""


@contextmanager
def serving(fake: FakeEndpoint) -> Iterator[FakeEndpoint]:
    """The endpoint on loopback."""
    server = started(fake)
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()


def started(fake: FakeEndpoint) -> ThreadingHTTPServer:
    """The endpoint on loopback, until it is shut down."""
    server = _Quiet(("127.0.0.1", 0), _handler(fake))
    fake.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server
