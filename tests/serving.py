"""A real server on a free port, and an engine that says what a test wants it to say."""

from __future__ import annotations

import io
import math
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import httpx
from generating import tokenizer

from trivium.generate.constraints import Grammars
from trivium.generate.exactness import Exactness
from trivium.generate.requests import Completion, Event, RequestHandle
from trivium.generate.sampling import Sampling
from trivium.generate.streaming import TextStream
from trivium.serve.chat import Conversation, Speaker
from trivium.serve.engine_thread import EngineThread
from trivium.serve.limits import Limits
from trivium.serve.server import bound, build_server

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
GOOD = {"model": "one", "messages": HELLO, "max_tokens": 2}


class ScriptedEngine:
    """Has the engine's face and says the same text to everyone, a token each step."""

    def __init__(self, text, *, rows=8, delay=0.0, context=2048):
        self.tokenizer, self.max_rows, self.exactness = tokenizer(), rows, Exactness()
        self.model = SimpleNamespace(config=SimpleNamespace(context=context, width=64), parameters=lambda: [])
        self.script, self.delay = self.tokenizer.encode(text), delay
        self.rows, self.prompts, self.samplings, self.broken = [], [], [], False
        self.drafts, self.cache = False, SimpleNamespace(reserved_bytes=0)
        self.counts = {"generated_tokens": 0, "copied_tokens": 0}
        self.grammars = Grammars(self.tokenizer, self.tokenizer.vocabulary_size)

    @property
    def rows_in_use(self):
        return len(self.rows)

    @property
    def busy(self):
        return bool(self.rows)

    def submit(self, request, on_token=None):
        generation = RequestHandle(request, on_token)
        self.prompts.append(request.prompt)
        self.samplings.append(request.sampling)
        self.rows += [[generation, n, 0, TextStream(self.tokenizer, ())] for n in range(request.n)]
        return generation

    def cancel(self, generation):
        self.rows = [row for row in self.rows if row[0] is not generation]

    def step(self):
        if self.broken and self.rows:
            self.broken = False
            raise RuntimeError("out of luck")
        time.sleep(self.delay)
        for row in list(self.rows):
            generation, sample, place, stream = row
            most = generation.request.sampling.max_new_tokens
            if place < min(len(self.script), most):
                token = self.script[place]
                weighed = {token: math.log(0.7), (token + 1) % 300: math.log(0.2), 5: math.log(0.1)}
                told = weighed if generation.request.sampling.top_logprobs else None
                generation.listener(Event(sample, token, stream.push(token), None, told))
                row[2] += 1
                self.counts["generated_tokens"] += 1
            else:
                reason = "stop" if place < most else "length"
                ending = Completion("", self.script[:place], [], reason, len(generation.request.prompt))
                generation.results[sample] = ending
                generation.listener(Event(sample, -1, "", None, None, ending))
                self.rows.remove(row)
        return bool(self.rows)


@contextmanager
def running(engines, *, limits=None, thread=None, **settings):
    """Serve engines on loopback; gives the server's address."""
    limits = limits or Limits(drain_seconds=2)
    server = build_server(engines, thread or EngineThread(), limits=limits, **settings)
    listener = bound("127.0.0.1", 0)
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    serving.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert serving.is_alive(), "the server died while starting"
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        serving.join(20)
        listener.close()
        assert not serving.is_alive(), "the server did not stop"


def client(address, key="none", **settings):
    """The official client, which must not hide an error behind a second try."""
    # Servers in processes of their own import this file, too.
    from openai import OpenAI

    http = httpx.Client(trust_env=False, timeout=60)
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, http_client=http, **settings)


def raw(address):
    """A bare HTTP client, for requests no honest client sends."""
    return httpx.Client(base_url=address, trust_env=False, timeout=60)


def until(condition, seconds=20):
    """Wait for something that happens on another thread."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def assert_error(answer, status):
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(answer.content) < 2000


def conversation(*speakers, **settings):
    """A terminal chat with these speakers, and what it prints."""
    out = io.StringIO()
    return Conversation(
        [Speaker(name, engine) for name, engine in speakers], Sampling(max_new_tokens=40), out=out, **settings
    ), out
