"""What a server allows: how many at once, for how long, and what it counts."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from generating import tiny_engine
from serving import CHAT, GOOD, HELLO, ScriptedEngine, assert_error, client, raw, running, until

from trivium.serve.limits import Limits
from trivium.serve.measures import HELP


def test_too_many_at_once_are_told_when_to_come_back():
    slow = ScriptedEngine("word " * 50, rows=2, delay=0.02)
    with running({"one": slow}, limits=Limits(queued=1)) as address, raw(address) as http:

        def ask(_):
            body = {**GOOD, "max_tokens": 30}
            return http.post(CHAT, json=body)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 3 + [429] * 5
        for answer in answers:
            if answer.status_code == 429:
                assert_error(answer, 429)
                assert int(answer.headers["Retry-After"]) >= 1
        assert ask(0).status_code == 200


READ_ONLY = [
    ("/v1/embeddings", {"input": ["a"] * 20}, "embed"),
    ("/v1/completions", {"prompt": "the town", "echo": True, "logprobs": 1, "max_tokens": 1}, "score"),
]


@pytest.mark.parametrize(("route", "fields", "work"), READ_ONLY)
def test_texts_that_are_only_read_count_among_those_inside(route, fields, work, monkeypatch):
    engine, going_on = tiny_engine(rows=1), threading.Event()
    waited = getattr(engine, work)

    def slow(*arguments, **settings):
        assert going_on.wait(20)
        return waited(*arguments, **settings)

    monkeypatch.setattr(engine, work, slow)
    inside = 'trivium_samples_inside{model="one"} '
    with running({"one": engine}, limits=Limits(queued=0)) as address, raw(address) as http:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(http.post, route, json={"model": "one", **fields})
            until(lambda: f"{inside}1" in http.get("/metrics").text)
            for again, asked, _ in READ_ONLY:
                refused = http.post(again, json={"model": "one", **asked})
                assert_error(refused, 429)
                assert int(refused.headers["Retry-After"]) >= 1
            assert_error(http.post(CHAT, json=GOOD), 429)
            going_on.set()
            assert first.result().status_code == 200
        until(lambda: f"{inside}0" in http.get("/metrics").text)
        assert http.post(route, json={"model": "one", **fields}).status_code == 200


def test_a_request_for_more_samples_than_may_ever_be_inside_is_not_told_to_come_back():
    with (
        running({"one": ScriptedEngine("word", rows=1)}, limits=Limits(queued=1)) as address,
        raw(address) as http,
    ):
        assert_error(http.post(CHAT, json={**GOOD, "n": 3}), 400)
        assert http.post(CHAT, json={**GOOD, "n": 2}).status_code == 200


def test_an_answer_that_takes_too_long_ends():
    slow = ScriptedEngine("word " * 50, delay=0.05)
    with running({"one": slow}, limits=Limits(request_seconds=0.3)) as address, raw(address) as http:
        assert_error(http.post(CHAT, json={**GOOD, "max_tokens": 40}), 504)
        until(lambda: slow.rows_in_use == 0)


@pytest.mark.parametrize("delay", [0.05, 1.0])
def test_a_stream_that_takes_too_long_says_so_and_ends(delay):
    slow = ScriptedEngine("word " * 50, delay=delay)
    with running({"one": slow}, limits=Limits(request_seconds=0.3, drain_seconds=8)) as address:
        stream = client(address).chat.completions.create(**GOOD | {"max_tokens": 40}, stream=True)
        with pytest.raises(openai.APIError, match=r"took longer than 0\.3 s"):
            list(stream)
        body = {**GOOD, "max_tokens": 40, "stream": True}
        with raw(address) as http:
            events = http.post(CHAT, json=body).text.strip().split("\n\n")
        last = json.loads(events[-1].removeprefix("data: "))["error"]
        assert (last["type"], last["param"]) == ("server_error", None)
        until(lambda: slow.rows_in_use == 0)


def test_a_stop_signal_lets_answers_finish():
    slow = ScriptedEngine("word " * 30, delay=0.02)
    with ThreadPoolExecutor(1) as pool:
        with running({"one": slow}, limits=Limits(drain_seconds=20)) as address:
            http = raw(address)
            answer = pool.submit(http.post, CHAT, json={**GOOD, "max_tokens": 25})
            until(lambda: slow.rows_in_use == 1)
        assert answer.result().status_code == 200
        assert answer.result().json()["usage"]["completion_tokens"] == 25
        with pytest.raises(httpx.ConnectError):
            http.get("/health")
        http.close()


def test_metrics_count_what_happened():
    with running({"one": tiny_engine(rows=4)}) as address, raw(address) as http:
        http.post(CHAT, json={**GOOD, "max_tokens": 3, "temperature": 0})
        http.post(CHAT, content=b"{")
        text = http.get("/metrics").text
        assert 'trivium_requests_total{route="/v1/chat/completions",status="200"} 1' in text
        assert 'trivium_requests_total{route="/v1/chat/completions",status="400"} 1' in text
        assert 'trivium_rows{model="one"} 4' in text
        held = re.search(r'^trivium_cache_bytes{model="one"} (\d+)', text, re.MULTILINE)
        assert held is not None
        assert int(held[1]) > 0
        promise = tiny_engine(rows=4).exactness.promise
        assert f'trivium_promise{{model="one",promise="{promise}"}} 1' in text
        assert 'trivium_first_token_seconds_count{model="one"} 1' in text
        assert 'trivium_first_token_seconds_bucket{model="one",le="+Inf"} 1' in text


def test_every_measure_is_counted_and_tokens_as_the_client_counts_them():
    with running({"one": tiny_engine(rows=4)}) as address:
        official, read, written = client(address), 0, 0
        usage = {"include_usage": True}
        asked = {"model": "one", "messages": HELLO, "max_tokens": 9, "temperature": 1.2, "seed": 3}
        whole = official.chat.completions.create(**asked, n=2).usage
        streamed = list(official.chat.completions.create(**asked, stream=True, stream_options=usage))[
            -1
        ].usage
        cut = official.chat.completions.create(**asked, stop=["e", "a", "o"]).usage
        for one in (whole, streamed, cut):
            read, written = read + one.prompt_tokens, written + one.completion_tokens
        read += official.embeddings.create(model="one", input=["the town", "a smith"] * 9).usage.prompt_tokens
        with raw(address) as http:
            text = http.get("/metrics").text
        assert f'trivium_generated_tokens_total{{model="one"}} {written}\n' in text
        assert f'trivium_prompt_tokens_total{{model="one"}} {read}\n' in text
        # An engine without drafts has nothing to say of them, and nothing was searched for.
        for name in HELP:
            assert (f"\n{name}" in text) == ("draft" not in name and "search" not in name), name
