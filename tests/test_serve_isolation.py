"""Law L16 over HTTP: one request harms only itself, whatever fails in it and however its client behaves."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import serving
from generating import prompt, tiny_engine
from serving import CHAT, GOOD, ScriptedEngine, assert_error, raw, running, until

from trivium.generate.sampling import Sampler
from trivium.serve import application, server
from trivium.serve.limits import Limits

HONEST = [{**GOOD, "max_tokens": 120, "seed": seed, "min_tokens": 100} for seed in range(4)]
GUILTY = {**GOOD, "max_tokens": 50, "seed": 13, "min_tokens": 40}


def fails_for_one_seed(engine):
    """The sampler fails in every step in which a row of the seed 13 stands."""

    class Failing(Sampler):
        def choose(self, logits):
            if any(settings.seed == 13 for settings in self.settings):
                raise RuntimeError("an index out of range")
            return super().choose(logits)

    engine.scheduler.sampler = Failing(engine.vocabulary, engine.model.device)


def streamed(http, body):
    """The text of a stream, or the error it ends with."""
    text = ""
    with http.stream("POST", CHAT, json={**body, "stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return event["error"]
                text += event["choices"][0]["delta"].get("content", "")
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_a_row_that_fails_ends_its_own_answer_only(stream):
    engine = tiny_engine(rows=8)
    with running({"one": engine}) as address, raw(address) as http, ThreadPoolExecutor(8) as pool:
        expected = [streamed(http, body) for body in HONEST]
        fails_for_one_seed(engine)
        honest = [pool.submit(streamed, http, body) for body in HONEST]
        until(lambda: engine.rows_in_use)
        texts = [prompt(30, seed=seed) for seed in range(3)]
        embedded = pool.submit(http.post, "/v1/embeddings", json={"model": "one", "input": texts})
        echoed = {"model": "one", "prompt": texts, "echo": True, "logprobs": 2, "max_tokens": 1}
        scored = pool.submit(http.post, "/v1/completions", json=echoed)
        for _ in range(3):
            if stream:
                error = streamed(http, GUILTY)
                assert error["type"] == "server_error", error
                assert "RuntimeError" in error["message"]
            else:
                assert_error(http.post(CHAT, json=GUILTY), 500)
        assert [answer.result() for answer in honest] == expected
        assert embedded.result().status_code == 200
        assert scored.result().status_code == 200
        # An answer is sent before it is counted.
        counted = 'trivium_generations_total{model="one",ending="failed"} 3'
        until(lambda: counted in http.get("/metrics").text)
        until(lambda: not engine.busy)


def test_one_of_several_prompts_that_fails_frees_the_rows_of_all():
    engine = tiny_engine(rows=8)
    fails_for_one_seed(engine)
    with running({"one": engine}) as address, raw(address) as http:
        body = {"model": "one", "prompt": ["a", "the town"], "seed": 13, "max_tokens": 300}
        assert_error(http.post("/v1/completions", json=body), 500)
        until(lambda: not engine.busy)
        until(lambda: 'trivium_samples_inside{model="one"} 0' in http.get("/metrics").text)


def unread(address, body):
    """A connection on which a request was sent and nothing is read."""
    host, port = address.removeprefix("http://").split(":")
    wire = socket.socket()
    # else the kernel takes megabytes for a client that never asks for them
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.connect((host, int(port)))
    sent = json.dumps(body).encode()
    wire.sendall(
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent
    )
    return wire


def small_buffers(monkeypatch):
    """Let the kernel keep little for clients that do not read, as it does when there are many of them."""

    def bound(host, port):
        listener = server.bound(host, port)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return listener

    monkeypatch.setattr(serving, "bound", bound)


def test_clients_that_do_not_read_hold_no_places_once_their_answers_are_written(monkeypatch):
    small_buffers(monkeypatch)
    quick = ScriptedEngine("word " * 1000, rows=2, context=20_000)
    with running({"one": quick}, limits=Limits(queued=2)) as address, raw(address) as http:
        asked = {**GOOD, "max_tokens": 900, "stream": True, "logprobs": True, "top_logprobs": 3}
        wires = [unread(address, asked) for _ in range(4)]
        until(lambda: quick.counts["generated_tokens"] == 4 * 900)
        until(lambda: http.post(CHAT, json={**GOOD, "max_tokens": 3}).status_code == 200, 5)
        for wire in wires:
            wire.close()
        until(lambda: 'trivium_samples_inside{model="one"} 0' in http.get("/metrics").text)


def test_a_text_of_all_private_use_characters_is_answered():
    with running({"one": ScriptedEngine("a", context=400_000)}) as address, raw(address) as http:
        everything = "".join(map(chr, range(0xF0000, 0xFFFFD)))
        body = {**GOOD, "messages": [{"role": "user", "content": everything}]}
        assert http.post(CHAT, json=body, timeout=20).status_code == 200


def test_a_stop_iteration_in_a_thread_ends_its_request(monkeypatch):
    """Asyncio lets one wait for ever who waits for a thread that ends with it."""
    monkeypatch.setattr(application, "chat_prompt", lambda *_: next(iter(())))
    with running({"one": ScriptedEngine("a")}) as address, raw(address) as http:
        assert_error(http.post(CHAT, json=GOOD, timeout=20), 500)


def test_preparing_a_prompt_ends_with_its_time(monkeypatch):
    slow = threading.Event()
    monkeypatch.setattr(application, "chat_prompt", lambda *_: slow.wait(10))
    limits = Limits(request_seconds=0.3)
    with running({"one": ScriptedEngine("a")}, limits=limits) as address, raw(address) as http:
        assert_error(http.post(CHAT, json=GOOD, timeout=20), 504)
        slow.set()


@pytest.mark.slow
def test_requests_that_wait_for_summaries_hold_up_nobody_else():
    slow = ScriptedEngine("a smith " * 8, rows=40, delay=0.1, context=220)
    other = ScriptedEngine("a baker")
    turns = [
        {"role": "user", "content": "the bell rings at nine"},
        {"role": "assistant", "content": "a smith"},
    ]
    long = {**GOOD, "messages": [*(turns * 12), turns[0]], "overflow": "summarise", "stream": True}
    with (
        running({"one": slow, "two": other}) as address,
        raw(address) as http,
        ThreadPoolExecutor(12) as pool,
    ):
        waiting = [pool.submit(streamed, http, long) for _ in range(12)]
        until(lambda: slow.rows_in_use >= 6)
        http.post(CHAT, json={**GOOD, "model": "two"})
        assert slow.rows_in_use >= 6, "another model's client has waited for the summaries"
        slow.delay = 0
        assert all(isinstance(one.result(), str) for one in waiting)
