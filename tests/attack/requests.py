"""Whole requests that mean harm: bodies, token ids, texts and forms of answers, beside an honest client."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx
from besieged import Besieged, honest_client, start
from generating import tokenizer
from serving import CHAT, GOOD, HELLO
from test_serve_faults import BAD_CHATS, BAD_COMPLETIONS, BAD_EMBEDDINGS, LARGE

from attack.frame import attack

# What a model says must not end an event of a stream, nor begin another.
SCRIPT = "one\n\ndata: [DONE]\n\ntwo\r\rdata: {}\r\n\r\nevent: error\u2028\u0085\x00\x1b[2J: \ufeffend"


@cache
def server() -> Besieged:
    """One server for all attacks of this file."""
    # eight bodies of two million bytes at once take a busy machine seconds
    return start(Path(mkdtemp(prefix="attack-server-")), script=SCRIPT, body_seconds=30.0)


def _is_refusal(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or (400,)), answer.text[:300]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert len(answer.content) < 3000


BODIES: dict[str, tuple[str, bytes, int]] = {
    **{f"of a chat: {name}": (CHAT, *case) for name, case in BAD_CHATS.items()},
    **{f"of two million bytes: {name}": (f"/v1/{route}", body, 400) for name, (route, body) in LARGE.items()},
    **{
        f"of a completion: {json.dumps(fields)[:40]}": (
            "/v1/completions", json.dumps({"model": "one", **fields}).encode(), 400,
        )
        for fields in BAD_COMPLETIONS
    },
    **{
        f"of an embedding: {json.dumps(fields)[:40]}": (
            "/v1/embeddings", json.dumps({"model": "one", **fields}).encode(), 400,
        )
        for fields in BAD_EMBEDDINGS
    },
}  # fmt: skip


@attack("server: bad bodies", cases=BODIES)
def bad_body(scratch: Path, case: tuple[str, bytes, int]) -> None:
    """Each is refused in one sentence, eight at a time no worse than alone."""
    place, body, status = case
    with honest_client(server()) as besieged, besieged.http() as http, ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda _: http.post(place, content=body), range(8)):
            _is_refusal(answer, status)


SIZE = tokenizer().vocabulary_size
IDS = [-(2**63), -1, SIZE, SIZE + 1, 2**16, 2**31 - 1, 2**31, 2**63, 10**40]
FIELDS: dict[str, Any] = {
    "stop_token_ids": (CHAT, lambda one: {"messages": HELLO, "stop_token_ids": [one], "min_tokens": 2}),
    "stop_token_ids among good ones": (CHAT, lambda one: {"messages": HELLO, "stop_token_ids": [5, one, 6]}),
    "logit_bias": (CHAT, lambda one: {"messages": HELLO, "logit_bias": {str(one): 5}}),
    "logit_bias of a completion": (
        "/v1/completions", lambda one: {"prompt": "a", "logit_bias": {str(one): -100}, "echo": True},
    ),
    "a prompt": ("/v1/completions", lambda one: {"prompt": [one]}),
    "a prompt that is scored": (
        "/v1/completions", lambda one: {"prompt": [5, one], "echo": True, "logprobs": 2},
    ),
    "one of several prompts": ("/v1/completions", lambda one: {"prompt": [[5, 6], [7, one]]}),
    "a text to embed": ("/v1/embeddings", lambda one: {"input": [5, one]}),
}  # fmt: skip


@attack("server: bad token ids", "ids of no token as", cases=FIELDS)
def bad_ids(scratch: Path, case: tuple[str, Any]) -> None:
    """Each is refused, and no other answer ends."""
    place, fields = case
    with honest_client(server()) as besieged, besieged.http() as http:
        for one in IDS:
            _is_refusal(http.post(place, json={"model": "one", **fields(one)}))


def _plane(first: int) -> str:
    return "".join(map(chr, range(first, first + 0xFFFE)))


PRIVATE = {
    "of the plane 15": _plane(0xF0000), "of the plane 16": _plane(0x100000),
    "of both planes": _plane(0xF0000) + _plane(0x100000),
    "of the first plane": "".join(map(chr, range(0xE000, 0xF900))),
}  # fmt: skip


@attack("server: texts", "all private-use characters", cases=PRIVATE, seconds=120)
def private_use(scratch: Path, text: str) -> None:
    """The request ends, and so does the server when it is told to."""
    besieged = start(scratch, script="a")
    try:
        with honest_client(besieged), besieged.http() as http:
            for model in ("one", "two"):
                answer = http.post(
                    CHAT, json={**GOOD, "model": model, "messages": [{"role": "user", "content": text}]}
                )
                assert answer.status_code in (200, 400), answer.text[:300]
            # 400,000 tokens, four for each of these characters
            assert answer.status_code == (200 if len(text) < 100_000 else 400), "the second model has room"
        began = time.monotonic()
        assert besieged.end(signal.SIGTERM) == 0
        assert time.monotonic() - began < 10
    finally:
        besieged.end()


TEXTS = {
    "control tokens": "<|im_start|>assistant<|im_end|><|endoftext|><s></s><|begin_of_text|>[INST]" * 10,
    "combining marks": "a" + "\u0301" * 3000, "text that runs both ways": "\u202e\u2066" * 1000,
    "nothing that is seen": "\u200b\u200d\ufeff" * 1000, "nulls": "\x00" * 1000,
    "noncharacters": "\uffff\ufdd0" * 500,
    "a template": "{{ 7 * 7 }}{% for x in range(10**9) %}a{% endfor %}" * 10,
    "tags of thoughts and calls": "</think><tool_call>{</tool_call><think>" * 50,
    "one long word": "a" * 100_000,
    "spaces": " " * 100_000, "emoji of many parts": "👩‍👩‍👧‍👦" * 500, "newlines": "\r\n\n\r" * 10_000,
}  # fmt: skip
ROLES = ("user", "system", "assistant", "tool")


@attack("server: texts", cases=TEXTS)
def odd_text(scratch: Path, text: str) -> None:
    """In every place it is answered or refused."""
    with honest_client(server()) as besieged, besieged.http() as http:
        for role in ROLES:
            turn = {"role": role, "content": text} | ({"tool_call_id": text[:100]} if role == "tool" else {})
            answer = http.post(CHAT, json={**GOOD, "messages": [*HELLO, turn, *HELLO]})
            assert answer.status_code in (200, 400), answer.text[:300]
        for place, fields in (
            ("/v1/completions", {"prompt": text, "stop": text[:200]}), ("/v1/embeddings", {"input": text}),
            (CHAT, {"messages": HELLO, "user": text}), (CHAT, {"messages": HELLO, "regex": text[:4000]}),
        ):  # fmt: skip
            answer = http.post(place, json={"model": "one", **fields})
            assert answer.status_code in (200, 400), answer.text[:300]
        _is_refusal(http.post(CHAT, json={**GOOD, "model": text}), 404)


def _schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": fields}}}


def _deep(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"type": "object", "properties": {"a": found}}
    return found


BOMBS: dict[str, list[dict[str, Any]]] = {
    "multiples of large primes": [
        _schema(type="integer", multipleOf=one) for one in (999983, 999979, 999961)
    ],
    "60 large regexes at once": [
        {"regex": f"([a-z]{{1,{n}}}[0-9]{{1,{n}}}){{1,40}}x{n}"} for n in range(200, 260)
    ],
    "repeats of repeats": [
        {"regex": "((((a{1,20}){1,20}){1,20}){1,20}){1,20}"}, {"regex": "(a{0,4000}){0,4000}"},
    ],
    "alternatives of one beginning": [{"regex": "|".join("a" * n for n in range(1, 90))}],
    "expressions that match in many ways": [
        {"regex": "(a+)+$"}, {"regex": "(a|a)*b"}, {"regex": "(.*)*(.*)*x"},
    ],
    "numbers without end": [_schema(type="number", minimum=-(10**300), maximum=10**300)],
    "a hundred bounds": [_schema(type="array", items=_schema(), minItems=10**6, maxItems=10**9)],
    "long strings": [_schema(type="string", minLength=10**6), _schema(type="string", maxLength=10**9)],
    "many words": [_schema(enum=[f"{n}" * 40 for n in range(5_000)])],
    "patterns of properties": [
        _schema(type="object", patternProperties={f"(a{{1,{n}}})+": {} for n in range(200)})
    ],
    "many properties of no order": [
        _schema(type="object", properties={f"a{n}": {"type": "string"} for n in range(800)})
    ],
    "all of many": [_schema(allOf=[{"pattern": f"(a|b){{{n}}}"} for n in range(60)])],
    "references in a circle": [
        _schema(**{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}})
    ],
    "references that double": [
        _schema(**{
            "$ref": "#/$defs/a0",
            "$defs": {
                f"a{n}": {"type": "array", "prefixItems": [{"$ref": f"#/$defs/a{n + 1}"}] * 4}
                for n in range(30)
            } | {"a30": {"type": "string"}},
        })
    ],
    "objects within objects": [_schema(**_deep(depth)) for depth in (60, 200)],
    "a file or an address": [
        _schema(**{"$ref": place}) for place in ("file:///etc/passwd", "http://127.0.0.1:9/a", "/etc/passwd")
    ],
}  # fmt: skip


@attack("server: forms of answers", cases=BOMBS, seconds=120)
def bomb(scratch: Path, bodies: list[dict[str, Any]]) -> None:
    """Each is followed or refused within its budget; those beyond the line wait or are told to come back."""
    with honest_client(server()) as besieged, besieged.http() as http, ThreadPoolExecutor(60) as pool:
        began = time.monotonic()
        found = list(pool.map(lambda one: http.post(CHAT, json={**GOOD, **one}, timeout=100), bodies))
        assert time.monotonic() - began < 60
        for answer in found:
            assert answer.status_code in (200, 400, 429), answer.text[:300]


def _events(content: bytes) -> list[str]:
    """The data of a stream's events, read as the HTML standard says."""
    text = content.decode()
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    events, data = list[str](), list[str]()
    for line in lines:
        if not line:
            if data:
                events.append("\n".join(data))
            data = []
            continue
        name, _, value = line.partition(":")
        assert name in ("data", ""), f"a stream has a field {name!r}"
        if name:
            data.append(value.removeprefix(" "))
    assert not data, "the stream ends within an event"
    return events


@attack("server: streams", "a model that writes events", cases={"of a chat": True, "of a completion": False})
def framing(scratch: Path, chat: bool) -> None:
    """Its words stay words: the stream holds what the whole answer does, and ends once."""
    place = CHAT if chat else "/v1/completions"
    body = {"model": "two", "max_tokens": 400, **({"messages": HELLO} if chat else {"prompt": "a"})}
    with honest_client(server()) as besieged, besieged.http() as http:
        whole = http.post(place, json=body).json()["choices"][0]
        events = _events(http.post(place, json={**body, "stream": True}).content)
        assert events[-1] == "[DONE]"
        choices = [json.loads(one)["choices"][0] for one in events[:-1]]
        if chat:
            told = "".join(choice["delta"].get("content", "") for choice in choices)
            assert told == whole["message"]["content"]
        else:
            told = "".join(choice["text"] for choice in choices)
            assert told == whole["text"]
        assert told.replace("\ufffd", "") == SCRIPT.replace("\ufffd", "")


@attack("server: streams", "names and keys that would write a head of their own")
def head_of_its_own(scratch: Path) -> None:
    """What a client sends comes back in bodies only."""
    with honest_client(server()) as besieged, besieged.http() as http:
        evil = "a\r\nX-Evil: 1\r\n\r\nHTTP/1.1 200 OK"
        for answer in (
            http.post(CHAT, json={**GOOD, "model": evil}), http.get("/v1/models/a%0d%0aX-Evil:%201"),
            http.get("/a%0d%0aX-Evil:%201"),
        ):  # fmt: skip
            _is_refusal(answer, 404)
            assert "x-evil" not in answer.headers


@attack("server: bad bodies", "a server that ends after all attacks of this file")
def at_the_end(scratch: Path) -> None:
    """It has logged no error of its own, and ends with status 0 within seconds."""
    besieged = server()
    began = time.monotonic()
    assert besieged.end(signal.SIGTERM) == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in besieged.log.read_text(), besieged.log.read_text()[-1000:]
