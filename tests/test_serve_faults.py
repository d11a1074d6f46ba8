"""What clients do wrong or on purpose: answered 4xx in OpenAI's shape, rows freed, the server lives."""

import contextlib
import gc
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from generating import tiny_engine, tokenizer
from serving import CHAT, GOOD, HELLO, ScriptedEngine, assert_error, client, raw, running, until

from trivium.serve import protocol
from trivium.serve.guard import PAGE
from trivium.serve.limits import Limits
from trivium.tokens.tokenizer import Tokenizer


def changed(**fields):
    return json.dumps({**GOOD, **fields}).encode()


def nested(depth):
    return b'{"model": "one", "messages": ' + b"[" * depth + b"]" * depth + b"}"


def message(**fields):
    return changed(messages=[{"role": "user", "content": "a", **fields}])


def schema(**fields):
    return changed(response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": fields}})


def tool(**fields):
    return {"type": "function", "function": {"name": "f", **fields}}


def called(arguments):
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    return changed(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}])


def deep(depth):
    return json.loads('{"a":' * depth + "{}" + "}" * depth)


ALONE = {"type": "object", "additionalProperties": False}
OTHER = {"type": "function", "function": {"name": "g"}}
BAD_CHATS = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "JSON with a tail": (changed() + b"}", 400),
    "not an object": (b"[]", 400),
    "a number": (b"7", 400),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', 400),
    "UTF-16": (changed().decode().encode("utf-16"), 400),
    "half a surrogate pair": (b'{"model": "one", "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    "half a pair as a key": (b'{"model": "one", "\\udc00": 1}', 400),
    "nested lists": (nested(100_000), 400),
    "nested schema": (
        b'{"model":"one","messages":[{"role":"user","content":"a"}],"response_format":{"type":"json_schema",'
        b'"json_schema":{"name":"a","schema":' + b'{"properties":{"a":' * 500 + b"{}" + b"}}" * 500 + b"}}}",
        400,
    ),
    "an endless number": (b'{"model": "one", "seed": ' + b"9" * 5000 + b"}", 400),
    "no model": (b'{"messages": []}', 400),
    "unknown model": (changed(model="six"), 404),
    "a list as model": (changed(model=["one"]), 400),
    "no messages": (b'{"model": "one"}', 400),
    "empty messages": (changed(messages=[]), 400),
    "messages as text": (changed(messages="hello"), 400),
    "a message as text": (changed(messages=["hello"]), 400),
    "unknown role": (message(role="emperor"), 400),
    "no content": (changed(messages=[{"role": "user"}]), 400),
    "no part of content": (message(content=[]), 400),
    "a part that says nothing": (message(content=[{"type": "text"}]), 400),
    "a part of no type": (message(content=[{}]), 400),
    "content as number": (message(content=7), 400),
    "a picture": (message(content=[{"type": "image_url", "image_url": {"url": "http://x"}}]), 400),
    "negative temperature": (changed(temperature=-1), 400),
    "temperature NaN": (b'{"model":"one","messages":[{"role":"user","content":"a"}],"temperature":NaN}', 400),
    "temperature infinite": (changed().replace(b"2}", b'2, "temperature": 1e999}'), 400),
    "temperature as text": (changed(temperature="hot"), 400),
    "temperature as true": (changed(temperature=True), 400),
    "temperature too small for any number": (changed(temperature=1e-38), 400),
    "repetition penalty too small for any number": (changed(repetition_penalty=1e-40), 400),
    "top_p 0": (changed(top_p=0), 400),
    "top_p 2": (changed(top_p=2), 400),
    "penalty NaN": (changed().replace(b"2}", b'2, "presence_penalty": NaN}'), 400),
    "repetition penalty 0": (changed(repetition_penalty=0), 400),
    "n 0": (changed(n=0), 400),
    "n a million": (changed(n=1_000_000), 400),
    "n a fraction": (changed(n=1.5), 400),
    "max_tokens 0": (changed(max_tokens=0), 400),
    "max_tokens -1": (changed(max_tokens=-1), 400),
    "max_tokens enormous": (changed(max_tokens=10**9), 400),
    "max_tokens beyond any integer": (changed(max_tokens=10**30), 400),
    "max_tokens beyond the context": (changed(max_tokens=511), 400),
    "min_tokens beyond max_tokens": (changed(min_tokens=3), 400),
    "min_tokens beyond the context": (
        json.dumps({"model": "one", "messages": HELLO, "min_tokens": 511}).encode(),
        400,
    ),
    "seed beyond 64 bits": (changed(seed=2**70), 400),
    "10,000 stop strings": (changed(stop=[str(number) for number in range(10_000)]), 400),
    "an empty stop string": (changed(stop=[""]), 400),
    "a long stop string": (changed(stop="a" * 100_000), 400),
    "a stop that is no text": (changed(stop=[1]), 400),
    "a stop in a list of lists": (changed(stop=[["a"]]), 400),
    "logit_bias of a word": (changed(logit_bias={"the": 1}), 400),
    "logit_bias of no token": (changed(logit_bias={"99999999": 1}), 400),
    "logit_bias of a fraction": (changed(logit_bias={"1.5": 1}), 400),
    "logit_bias of a negative token": (changed(logit_bias={"-1": 1}), 400),
    "logit_bias in words": (changed(logit_bias={"1": "2"}), 400),
    "logit_bias of a superscript": (changed(logit_bias={"²": 1}), 400),
    "logit_bias 101": (changed(logit_bias={"1": 101}), 400),
    "logit_bias NaN": (changed().replace(b"2}", b'2, "logit_bias": {"1": NaN}}'), 400),
    "stop_token_ids of no token": (changed(stop_token_ids=[2**31 - 1], min_tokens=2), 400),
    "stop_token_ids of a negative token": (changed(stop_token_ids=[-1]), 400),
    "stop_token_ids in words": (changed(stop_token_ids=["the"]), 400),
    "stop_token_ids just past the end": (changed(stop_token_ids=[tokenizer().vocabulary_size]), 400),
    "top_logprobs 1000": (changed(logprobs=True, top_logprobs=1000), 400),
    "top_logprobs alone": (changed(top_logprobs=2), 400),
    "misspelt": (changed(temprature=1), 400),
    "schema missing": (changed(response_format={"type": "json_schema"}), 400),
    "schema wrong": (schema(type=7), 400),
    "a schema of nothing": (schema(enum=[]), 400),
    "a schema of itself": (schema(**{"$ref": "#"}), 400),
    "a schema without end": (schema(properties={"a": {"$ref": "#"}}, required=["a"], **ALONE), 400),
    "a schema too large to follow": (
        schema(type="object", properties={f"a{n}": {} for n in range(2000)}),
        400,
    ),
    "a schema that holds NaN": (schema(const=float("nan")), 400),
    "a regex that nothing matches": (changed(regex=r"[^\s\S]"), 400),
    "a regex that only nests": (changed(regex="(" * 1500 + "a" + ")" * 1500), 400),
    "format unknown": (changed(response_format={"type": "yaml"}), 400),
    "regex broken": (changed(regex="("), 400),
    "regex and schema": (changed(regex="a", response_format={"type": "json_object"}), 400),
    "an argument of the template's own name": (changed(chat_template_kwargs={"bos_token": "a"}), 400),
    "a strict tool that nothing forces": (changed(tools=[tool(strict=True)]), 400),
    "a choice of no tool": (changed(tools=[tool()], tool_choice=OTHER), 400),
    "a tool whose arguments are no object": (changed(tools=[tool(parameters={"type": "string"})]), 400),
    "a tool that nests deeply": (changed(tools=[tool(parameters=deep(600))]), 400),
    "template arguments that nest deeply": (changed(chat_template_kwargs=deep(600)), 400),
    "a call whose arguments nest deeply": (called('{"a":' * 600 + "1" + "}" * 600), 400),
    "a call with half a surrogate pair": (called('{"a": "\\ud800"}'), 400),
    "a tool without a name": (changed(tools=[{"type": "function", "function": {}}]), 400),
    "a call whose arguments are no JSON": (called("{"), 400),
    "stream_options without stream": (changed(stream_options={"include_usage": True}), 400),
    "an enormous prompt": (message(content="word " * 50_000), 400),
    "an enormous body": (message(content="a" * 3_000_000), 413),
}


@pytest.fixture(scope="module")
def engine():
    return tiny_engine(rows=4)


@pytest.fixture(scope="module")
def address(engine):
    with running({"one": engine}) as address:
        yield address


@pytest.mark.quick_cases(24)
@pytest.mark.parametrize("fault", BAD_CHATS)
def test_a_bad_chat_is_refused_in_openais_shape(address, fault):
    body, status = BAD_CHATS[fault]
    with raw(address) as http:
        assert_error(http.post(CHAT, content=body), status)
        assert http.get("/health").json()["status"] == "ok"


BAD_COMPLETIONS = [
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": [-1]},
    {"prompt": [10**6]},
    {"prompt": [10**40]},
    {"prompt": ["a", 1]},
    {"prompt": {"a": 1}},
    {"prompt": None},
    {"prompt": ["a"] * 5000},
    {"prompt": "a", "best_of": 5},
    {"prompt": "a", "logprobs": -1},
    {"prompt": "a", "min_tokens": 17},
    {"prompt": "a", "min_tokens": 3, "max_tokens": 2},
    {"prompt": [1] * 600},
]


@pytest.mark.parametrize("fields", BAD_COMPLETIONS)
def test_a_bad_completion_is_refused(address, fields):
    with raw(address) as http:
        assert_error(http.post("/v1/completions", json={"model": "one", **fields}), 400)


BAD_EMBEDDINGS = [
    {"input": []},
    {"input": ""},
    {"input": ["a", ""]},
    {"input": 7},
    {"input": ["a"] * 1000},
    {"input": "word " * 5000},
    {"input": "a", "dimensions": 3},
    {"input": "a", "encoding_format": "hex"},
]


@pytest.mark.parametrize("fields", BAD_EMBEDDINGS)
def test_a_bad_embedding_is_refused(address, fields):
    with raw(address) as http:
        assert_error(http.post("/v1/embeddings", json={"model": "one", **fields}), 400)


def test_wrong_places_and_methods(address):
    with raw(address) as http:
        assert_error(http.get("/v1/nowhere"), 404)
        assert_error(http.get(CHAT), 405)
        assert_error(http.delete("/v1/models"), 405)
        assert_error(http.get("/page.py"), 404)
        assert_error(http.get("/../../etc/passwd"), 404)
        assert_error(http.get("/page.%2e%2e%2f%2e%2e%2fserver.py"), 404)


def test_good_requests_are_still_served_afterwards(address):
    with raw(address) as http:
        assert http.post(CHAT, content=changed()).status_code == 200


def test_the_client_raises_its_own_errors(address):
    official = client(address)
    with pytest.raises(openai.NotFoundError) as problem:
        official.chat.completions.create(model="six", messages=HELLO)
    assert problem.value.code == "model_not_found"
    assert "one" in problem.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        official.chat.completions.create(model="one", messages=HELLO, temperature=-1)
    assert refused.value.param == "temperature"


@pytest.mark.parametrize(
    ("wrong", "parameter"),
    [
        ({"n": 10**30}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [["a"]]}, "stop.str"),
        ({"logit_bias": {1.5: 1}}, "logit_bias"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0"),
        ({"tools": [tool()], "tool_choice": OTHER}, "tool_choice"),
        ({"tools": [tool(parameters=deep(480))]}, "messages"),
    ],
)
def test_the_client_is_told_what_was_wrong(address, wrong, parameter):
    with pytest.raises(openai.BadRequestError) as refused:
        client(address).chat.completions.create(**{**GOOD, **wrong})
    assert refused.value.param == parameter


def test_a_body_announced_too_large_is_not_read(address):
    for length in (b"1000000000000", b"9" * 400):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as wire:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %s\r\n\r\n"
            wire.sendall(head % length)
            assert wire.recv(4096).split(b" ")[1] in (b"413", b"400")


def test_a_body_that_never_ends_is_cut_off(engine):
    with running({"one": engine}, limits=Limits(body_seconds=0.3)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as wire:
            wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert b"408" in wire.recv(4096).split(b"\r\n")[0]


def test_the_key_is_asked_for(engine):
    with running({"one": engine}, api_key="sesame ö") as address:
        with raw(address) as http:
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic c2VzYW1l"}):
                assert_error(http.get("/v1/models", headers=headers), 401)
                assert_error(http.post(CHAT, content=changed(), headers=headers), 401)
                assert_error(http.get("/metrics", headers=headers), 401)
            assert_error(http.get("/v1/models", headers={"Authorization": b"Bearer \xff\xfe"}), 401)
            right = {"Authorization": "Bearer sesame ö".encode()}
            assert http.get("/v1/models", headers=right).status_code == 200
            assert http.get("/health").status_code == 200
            assert http.get("/").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            client(address, key="open").models.list()


def test_other_web_sites_and_other_host_names_are_kept_out(address):
    with raw(address) as http:
        assert_error(http.post(CHAT, content=changed(), headers={"Origin": "https://evil.example"}), 403)
        assert_error(http.post(CHAT, content=changed(), headers={"Origin": "null"}), 403)
        assert_error(http.get("/v1/models", headers={"Host": "evil.example"}), 403)
        assert_error(http.get("/v1/models", headers={"Host": "127.0.0.1.evil.example"}), 403)
        for nonsense in ("http://[", "http://[::1", "http://a]b", "//[", "http://\u2100.example".encode()):
            assert_error(http.post(CHAT, content=changed(), headers={"Origin": nonsense}), 403)
        own = http.post(CHAT, content=changed(), headers={"Origin": address})
        assert own.status_code == 200
        assert "access-control-allow-origin" not in own.headers


def test_a_page_from_another_port_of_the_same_host_is_kept_out(address):
    """An origin is scheme, host and port: another program on this machine is another web site."""
    port = int(address.rpartition(":")[2])
    with raw(address) as http:
        for other in (port + 1, port // 10, 80):
            assert_error(
                http.post(CHAT, content=changed(), headers={"Origin": f"http://127.0.0.1:{other}"}), 403
            )
        for other in ("http://127.0.0.1", f"http://localhost:{port}", f"http://user@127.0.0.1:{port}"):
            assert_error(http.post(CHAT, content=changed(), headers={"Origin": other}), 403)


def test_only_the_page_itself_may_be_cached(engine):
    """Answers and refusals are never stored; the page's own files are, and asked for anew each time."""
    with running({"one": engine}, api_key="k") as address, raw(address) as http:
        key = {"Authorization": "Bearer k"}
        for path in PAGE:
            assert http.get(path).headers["cache-control"] == "no-cache"
        answers = [http.get(path, headers=key) for path in ("/v1/models", "/v1/models/one", "/metrics")]
        answers += [http.post(CHAT, json={**GOOD, "stream": stream}, headers=key) for stream in (False, True)]
        answers += [http.get("/health")]
        assert [answer.status_code for answer in answers] == [200] * len(answers)
        answers += [http.get("/v1/models"), http.get("/nowhere", headers=key), http.get("/page", headers=key)]
        answers += [http.post(CHAT, content=b"{", headers=key)]
        assert [answer.headers["cache-control"] for answer in answers] == ["no-store"] * len(answers)


def test_an_allowed_origin_may_ask(engine):
    site = "https://friend.example"
    with running({"one": engine}, allow_origins=[site], api_key="k") as address, raw(address) as http:
        asks = {"Origin": site, "Access-Control-Request-Method": "POST"}
        assert http.options(CHAT, headers=asks).headers["access-control-allow-origin"] == site
        answer = http.post(CHAT, content=changed(), headers={"Origin": site, "Authorization": "Bearer k"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == site


def test_a_failing_engine_fails_its_requests_and_goes_on():
    weak = ScriptedEngine("word " * 5)
    with running({"one": weak}) as address, raw(address) as http:
        weak.broken = True
        assert_error(http.post(CHAT, json=GOOD), 500)
        weak.broken = True
        events = http.post(CHAT, json={**GOOD, "stream": True}).text
        assert json.loads(events.removeprefix("data: ").strip())["error"]["type"] == "server_error"
        assert http.post(CHAT, json=GOOD).status_code == 200


def test_the_pages_security_headers(address):
    with raw(address) as http:
        for path in ("/", "/page.js", "/page.css", "/v1/models"):
            headers = http.get(path).headers
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self'")
            assert headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_leaves_frees_its_rows_at_once(streamed):
    endless = ScriptedEngine("word " * 4000, rows=2, delay=0.02, context=10_000)
    with running({"one": endless}) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({**GOOD, "max_tokens": 4000, "n": 2, "stream": streamed}).encode()
        with socket.create_connection((host, int(port)), timeout=20) as wire:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            wire.sendall(head.encode() + body)
            until(lambda: endless.rows_in_use == 2)
        until(
            lambda: endless.rows_in_use == 0, 5
        )  # left alone, the rows would be busy for more than a minute


def vanish(address, seed):
    """Begin something and be gone at a random moment."""
    chance = random.Random(seed)
    host, port = address.removeprefix("http://").split(":")
    streamed = chance.random() < 0.8
    body = {**GOOD, "max_tokens": 200, "stream": streamed, "n": chance.choice([1, 1, 2])}
    if chance.random() < 0.3:
        body["logprobs"] = True
    sent = json.dumps(body).encode()
    wire = socket.create_connection((host, int(port)), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n\r\n".encode()
    if chance.random() < 0.1:
        sent = sent[: len(sent) // 2]
    wire.sendall(head + sent)
    leave = time.monotonic() + chance.random() * 0.6
    wire.setblocking(False)
    while time.monotonic() < leave:
        try:
            if not wire.recv(65536):
                break
        except BlockingIOError:
            time.sleep(0.005)
    if chance.random() < 0.5:  # a reset instead of a farewell
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    wire.close()


def generations():
    gc.collect()
    return sum(type(thing).__name__ in ("Generation", "RequestHandle") for thing in gc.get_objects())


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_200_clients_that_vanish_leave_no_row_and_no_memory():
    engine = tiny_engine(rows=8)
    with running({"one": engine}, limits=Limits(queued=1000)) as address, raw(address) as http:

        def round_of(first):
            with ThreadPoolExecutor(25) as pool:
                list(pool.map(lambda seed: vanish(address, seed), range(first, first + 200)))
            until(lambda: not engine.busy, 60)
            until(lambda: 'trivium_samples_inside{model="one"} 0' in http.get("/metrics").text)
            # the event loop closes what was being written to clients that have gone
            until(lambda: generations() - before <= 2 * engine.max_rows)
            return resident()

        # other tests' logs may hold some; the engine remembers its last rows until it settles new ones
        before = generations()
        round_of(10_000)
        memory = round_of(0)
        memory_again = round_of(20_000)
        assert engine.rows_in_use == 0
        assert memory_again - memory < 20_000_000
        assert http.post(CHAT, content=changed()).status_code == 200


def listed(item, head, tail, size=1_900_000):
    """A body of about two million bytes with a list of the same item."""
    return f"{head}{','.join([item] * (size // (len(item) + 1)))}{tail}".encode()


def keyed(head, tail, count=100_000):
    return (head + ",".join(f'"k{number}":1' for number in range(count)) + tail).encode()


ASKS = '{"model":"one","messages":[{"role":"user","content":"a"}],'
LARGE = {
    "true as prompts": ("completions", listed("true", '{"model":"one","prompt":[', "]}")),
    "fractions as prompts": ("completions", listed("1.5", '{"model":"one","prompt":[', "]}")),
    "texts and numbers as prompts": ("completions", listed('1,"a"', '{"model":"one","prompt":[', "]}")),
    "negative tokens": ("completions", listed("-1", '{"model":"one","prompt":[', "]}")),
    "empty prompts": ("completions", listed("[]", '{"model":"one","prompt":[', "]}", 300_000)),
    "a million empty prompts": ("completions", listed("[]", '{"model":"one","prompt":[', "]}")),
    "prompts of true": ("completions", listed("[true]", '{"model":"one","prompt":[', "]}", 300_000)),
    "many prompts": ("completions", listed('"a"', '{"model":"one","prompt":[', "]}")),
    "objects as inputs": ("embeddings", listed("{}", '{"model":"one","input":[', "]}", 300_000)),
    "many inputs": ("embeddings", listed('"a"', '{"model":"one","input":[', "]}")),
    "numbers as messages": ("chat/completions", listed("1", '{"model":"one","messages":[', "]}")),
    "numbers as parts": (
        "chat/completions",
        listed("1", '{"model":"one","messages":[{"role":"user","content":[', "]}]}"),
    ),
    "numbers as parts of many messages": (
        "chat/completions",
        listed(f'{{"role":"user","content":[{",".join("1" * 400)}]}}', '{"model":"one","messages":[', "]}"),
    ),
    "numbers as calls": (
        "chat/completions",
        listed("1", '{"model":"one","messages":[{"role":"assistant","tool_calls":[', "]}]}"),
    ),
    "numbers as stops": ("chat/completions", listed("1", f'{ASKS}"stop":[', "]}")),
    "texts as stop tokens": ("chat/completions", listed('"a"', f'{ASKS}"stop_token_ids":[', "]}")),
    "numbers as tools": ("chat/completions", listed("1", f'{ASKS}"tools":[', "]}")),
    "biases": ("chat/completions", keyed(f'{ASKS}"logit_bias":{{', "}}")),
    "unknown fields": ("chat/completions", keyed(ASKS, "}")),
    "unknown fields of a message": (
        "chat/completions",
        keyed('{"model":"one","messages":[{"role":"user","content":"a",', "}]}"),
    ),
}


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize("fault", LARGE)
def test_a_large_body_of_wrong_types_is_refused_at_its_first(address, fault):
    """A million errors about a million items took the event loop seconds: now there is one, about one."""
    route, body = LARGE[fault]
    errors = []
    with raw(address) as http, counted_errors(errors):
        assert_error(http.post(f"/v1/{route}", content=body), 400)
    assert sum(errors) <= 8


@contextlib.contextmanager
def counted_errors(errors):
    refusal = protocol._refusal

    def counting(error):
        errors.append(error.error_count())
        return refusal(error)

    protocol._refusal = counting
    try:
        yield
    finally:
        protocol._refusal = refusal


def test_prompts_are_counted_before_they_are_made_tokens(address, monkeypatch):
    def encode_batch(*_):
        raise AssertionError("these texts need not be read")

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    with raw(address) as http:
        for route, field, many in (("completions", "prompt", 17), ("embeddings", "input", 257)):
            answer = http.post(f"/v1/{route}", json={"model": "one", field: ["word " * 100] * many})
            assert_error(answer, 400)
            assert answer.json()["error"]["param"] == field


def test_a_text_full_of_brackets_is_a_text(address):
    with raw(address) as http:
        answer = http.post(CHAT, content=message(content="[{" * 400))
        assert answer.json()["error"]["code"] == "context_length_exceeded"
