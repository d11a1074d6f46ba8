"""The thread that computes for all models: what fails or ends in one of them, and what the others notice."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import openai
import pytest
from serving import CHAT, GOOD, ScriptedEngine, client, raw, running, until

from trivium.kit.errors import TriviumError
from trivium.serve import server
from trivium.serve.engine_thread import EngineThread
from trivium.serve.limits import Limits


def test_what_raises_on_the_thread_stops_nothing():
    thread, done = EngineThread(), threading.Event()
    thread.take_turns(lambda: 1 // 0)
    thread.tell(lambda: 1 // 0)
    thread.tell(done.set)
    assert done.wait(5)
    with pytest.raises(ZeroDivisionError):
        thread.do(lambda: 1 // 0)
    thread.stop()
    assert not thread.alive


def test_commands_that_take_long_leave_the_engines_a_turn_between_them():
    thread, turns, seen, done = EngineThread(), [], [], threading.Event()
    thread.take_turns(lambda: turns.append(1) or True)
    until(lambda: turns)

    def slow():
        seen.append(len(turns))
        time.sleep(0.02)

    def ask():
        for _ in range(6):
            thread.tell(slow)
        thread.tell(done.set)

    thread.tell(ask)
    assert done.wait(10)
    thread.stop()
    assert all(later > earlier for earlier, later in pairwise(seen)), seen


def test_a_model_that_cannot_let_go_takes_no_other_with_it():
    held = threading.Event()

    class Holding(ScriptedEngine):
        def cancel(self, generation):
            held.set()
            raise RuntimeError("there is no way back")

    engines = {"holding": Holding("word " * 50, delay=0.02), "well": ScriptedEngine("a baker")}
    with running(engines) as address, raw(address) as http:
        body = {**GOOD, "model": "holding", "max_tokens": 40, "stream": True}
        with http.stream("POST", CHAT, json=body) as answer:
            next(answer.iter_lines())
        assert held.wait(5)
        assert http.post(CHAT, json={**GOOD, "model": "well"}, timeout=5).status_code == 200
        assert http.get("/health").json()["status"] == "ok"


def test_a_stop_lets_the_answers_of_every_model_finish():
    engines = {name: ScriptedEngine("word " * 30, delay=0.01) for name in ("one", "two")}
    lengths = {"one": 5, "two": 25}
    with ThreadPoolExecutor(2) as pool:
        with running(engines, limits=Limits(drain_seconds=20)) as address:
            http = raw(address)
            asked = [{**GOOD, "model": name, "max_tokens": length} for name, length in lengths.items()]
            answers = [pool.submit(http.post, CHAT, json=body) for body in asked]
            until(lambda: all(engine.prompts for engine in engines.values()))
        written = [answer.result().json()["usage"]["completion_tokens"] for answer in answers]
        http.close()
    assert written == list(lengths.values())


def test_a_stop_ends_what_streams_beyond_its_time():
    thread, endless = EngineThread(), ScriptedEngine("word " * 4000, delay=0.02, context=10_000)
    with running({"one": endless}, limits=Limits(drain_seconds=0.2), thread=thread) as address:
        chunks = iter(client(address).chat.completions.create(**GOOD | {"max_tokens": 4000}, stream=True))
        next(chunks)
    assert not thread.alive


def test_ctrl_c_waits_for_the_model_that_is_being_opened(monkeypatch, tmp_path):
    """Else the process ends while the thread computes, which C++ answers with SIGABRT."""
    opened = []

    def open_slowly(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        opened.append(threading.current_thread())

    monkeypatch.setattr(server, "open_engine", open_slowly)
    with pytest.raises(KeyboardInterrupt):
        server.serve([str(tmp_path)], port=0)
    [thread] = opened
    assert not thread.is_alive()


def test_a_part_of_a_second_is_enough_to_stop():
    built = server.build_server({}, EngineThread(), limits=Limits(drain_seconds=0.3))
    assert built.config.timeout_graceful_shutdown == 0.3


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_refuses_is_told_in_its_words(stream):
    class Full(ScriptedEngine):
        def step(self):
            raise TriviumError("the cache is full: ask for fewer tokens.")

    with (
        running({"one": Full("a")}) as address,
        pytest.raises(openai.APIError, match="the cache is full: ask for fewer tokens") as told,
    ):
        list(client(address).chat.completions.create(**GOOD, stream=stream))
    assert (told.value.type, told.value.param) == ("invalid_request_error", None)
