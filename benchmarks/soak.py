"""Twenty minutes of a server under 64 clients of every kind, many of whom misbehave.

Run with `python benchmarks/soak.py --minutes 20`; it needs the extra `serve`. A small model with random
weights is served by `trivium serve` in a process of its own. Each client does again and again what its kind
does: it talks, streams, completes, asks for a form, embeds, scores, sends long prompts, leaves in the middle,
reads nothing, or sends nonsense. For each kind it is known which answers are right; any other counts as an
error of the server's. Reported are the requests and errors by kind, the memory of the server by minute
(medians of a sample a second), how it has grown from the first minute after the warm-up to the last, and the
time to the first token of the honest streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from trivium.model.config import ModelConfig
from trivium.model.folder import save_model
from trivium.model.transformer import Transformer
from trivium.tokens.train import train_tokenizer
from trivium.world import documents

CHAT, COMPLETION, EMBEDDING = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
CONTEXT, ROWS, QUEUED = 512, 32, 64
MOST_GROWTH = 0.02
HELLO = [{"role": "user", "content": "the river rises"}]
REGEXES = ("[a-m ]{3,20}", "(yes|no)", "[0-9]{4}-[0-9]{2}", "[A-Z][a-z]{2,9}")
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@dataclass
class Tally:
    """What came of all requests."""

    done: Counter[str] = field(default_factory=Counter)
    turned_away: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: int = 0

    def error(self, kind: str, problem: str) -> None:
        """Count an error of the server's and keep the first few."""
        self.errors[kind] += 1
        if len(self.examples) < 20:
            self.examples.append(f"{kind}: {problem[:300]}")


@dataclass
class Answer:
    """The status of an answer, its content, and how long its first bytes took."""

    status: int
    content: bytes
    first: float


class Client:
    """One of the 64: what it asks is drawn from its own random numbers."""

    def __init__(self, port: int, number: int, tally: Tally) -> None:
        self.port, self.tally = port, tally
        self.random = random.Random(number)
        self.kind = list(KINDS)[number % len(KINDS)]

    async def run(self, until: float) -> None:
        """Do what the kind does until the time is over."""
        while time.monotonic() < until:
            try:
                await KINDS[self.kind](self)
            except (TimeoutError, OSError, EOFError, ValueError, KeyError) as error:
                self.tally.error(self.kind, f"{type(error).__name__}: {error}")
            await asyncio.sleep(self.random.random() * 0.5)

    async def open(self, limit: int = 1 << 20) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port, limit=limit)

    def request(self, place: str, body: dict[str, Any] | bytes) -> bytes:
        sent = body if isinstance(body, bytes) else json.dumps({"model": "soak", **body}).encode()
        head = f"POST {place} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        return f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent

    async def ask(self, place: str, body: dict[str, Any] | bytes) -> Answer:
        """Send a whole request and read its whole answer."""
        reader, writer = await self.open()
        try:
            began = time.perf_counter()
            writer.write(self.request(place, body))
            async with asyncio.timeout(300):
                status = await reader.readline()
                await reader.readuntil(b"\r\n\r\n")
                content = await reader.read(1)
                first = time.perf_counter() - began
                content += await reader.read()
            return Answer(int(status.split()[1]), content, first)
        finally:
            writer.close()

    async def asked(self, place: str, body: dict[str, Any], ending: bytes) -> Answer | None:
        """The same where an answer is right that holds something, or a 429; None where there is none."""
        answer = await self.ask(place, body)
        if answer.status == 429:
            self.tally.turned_away[self.kind] += 1
            await asyncio.sleep(0.5 + self.random.random())
            return None
        if answer.status != 200 or ending not in answer.content or b'"error"' in answer.content:
            self.tally.error(self.kind, f"{answer.status} {answer.content.decode(errors='replace')}")
            return None
        self.tally.done[self.kind] += 1
        return answer

    def settings(self) -> dict[str, Any]:
        return {"max_tokens": self.random.randint(8, 48), "temperature": self.random.choice([0, 0.7, 1.0])}

    def text(self, words: int) -> str:
        return " ".join(self.random.choice(["river", "miller", "sack", "bell", "town"]) for _ in range(words))

    async def stream(self) -> None:
        body = {
            "messages": HELLO,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.settings(),
        }
        answer = await self.asked(CHAT, body, b"data: [DONE]")
        if answer is not None:
            self.tally.first.append(answer.first)
            usage = answer.content.rpartition(b'"completion_tokens":')[2].partition(b",")[0]
            self.tally.tokens += int(usage)

    async def talk(self) -> None:
        """A conversation that grows, so that its beginning is cached."""
        turns = list(HELLO)
        for _ in range(3):
            answer = await self.asked(CHAT, {"messages": turns, **self.settings()}, b'"total_tokens"')
            if answer is None:
                return
            said = json.loads(answer.content)["choices"][0]["message"]["content"]
            turns += [
                {"role": "assistant", "content": said or "-"},
                {"role": "user", "content": self.text(3)},
            ]

    async def complete(self) -> None:
        body = {"prompt": self.text(6), "n": self.random.randint(1, 3), "logprobs": 2, **self.settings()}
        await self.asked(COMPLETION, body, b'"total_tokens"')

    async def form(self) -> None:
        form: dict[str, Any] = {"regex": self.random.choice(REGEXES)}
        if self.random.random() < 0.5:
            form = {"response_format": _formed(SCHEMA)}
        await self.asked(CHAT, {"messages": HELLO, **self.settings(), **form}, b'"total_tokens"')

    async def embed(self) -> None:
        await self.asked(EMBEDDING, {"input": [self.text(20) for _ in range(4)]}, b'"embedding"')

    async def score(self) -> None:
        body = {"prompt": self.text(30), "echo": True, "logprobs": 3, "max_tokens": 1}
        await self.asked(COMPLETION, body, b'"token_logprobs"')

    async def long(self) -> None:
        body = {
            "prompt": [self.random.randint(300, 1000) for _ in range(CONTEXT - 60)],
            "max_tokens": 8,
            "stream": True,
        }
        answer = await self.asked(COMPLETION, body, b"data: [DONE]")
        if answer is not None:
            self.tally.first.append(answer.first)

    async def vanish(self) -> None:
        """Leave at any time, by a farewell or by a reset."""
        _reader, writer = await self.open()
        body = {"messages": HELLO, "stream": self.random.random() < 0.7, "max_tokens": 200, "min_tokens": 200}
        sent = self.request(CHAT, body)
        writer.write(sent if self.random.random() < 0.8 else sent[: len(sent) // 2])
        await asyncio.sleep(self.random.random())
        if self.random.random() < 0.5:
            writer.transport.abort()
        writer.close()
        self.tally.done[self.kind] += 1

    async def dawdle(self) -> None:
        """Read an answer in small sips, or not at all for a while."""
        reader, writer = await self.open(limit=1024)
        try:
            body = {"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 5, "max_tokens": 100}
            writer.write(self.request(CHAT, body))
            pause = self.random.choice([0.05, 3.0])
            async with asyncio.timeout(300):
                content = b""
                while piece := await reader.read(2048):
                    content = (content + piece)[-4096:]
                    await asyncio.sleep(pause)
                    pause = 0.01
            if b"data: [DONE]" in content:
                self.tally.done[self.kind] += 1
            elif b"rate_limit_exceeded" in content:
                self.tally.turned_away[self.kind] += 1
                await asyncio.sleep(1)
            else:
                self.tally.error(self.kind, content.decode(errors="replace")[-300:])
        finally:
            writer.close()

    async def nonsense(self) -> None:
        """Bodies that cannot be served; all of them are the client's fault."""
        place, body = self.random.choice(WRONG)
        answer = await self.ask(place, body)
        # A form that is new waits in a line that may be full.
        if answer.status in (400, 404, 413, 429) and b'"error"' in answer.content:
            self.tally.done[self.kind] += 1
        else:
            self.tally.error(self.kind, f"{answer.status} to {body[:80]!r}: {answer.content[:200]!r}")

    async def no_http(self) -> None:
        """Half a head, or what is none; the server ends the connection."""
        reader, writer = await self.open()
        try:
            writer.write(
                self.random.choice([b"", b"POST / HTTP/1.1\r\n", b"\x16\x03\x01\r\n\r\n", b"GET /\r\n\r\n"])
            )
            async with asyncio.timeout(60):
                await reader.read()
            self.tally.done[self.kind] += 1
        except ConnectionResetError:
            self.tally.done[self.kind] += 1
        finally:
            writer.close()


def _formed(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def _wrong(**fields: Any) -> bytes:
    return json.dumps({"model": "soak", "messages": HELLO, **fields}).encode()


WRONG: list[tuple[str, bytes]] = [
    (CHAT, b"{"), (CHAT, b"\xff" * 100), (CHAT, b"[" * 50_000), (CHAT, _wrong(temperature=-1)),
    (CHAT, _wrong(stop_token_ids=[2**31 - 1], min_tokens=2)), (CHAT, _wrong(logit_bias={"99999999": 1})),
    (CHAT, _wrong(model="none")), (CHAT, _wrong(max_tokens=10**9)), (CHAT, _wrong(regex="(")),
    (CHAT, _wrong(response_format=_formed({"type": "integer", "multipleOf": 999983}))),
    (COMPLETION, json.dumps({"model": "soak", "prompt": [True] * 100_000}).encode()),
    (COMPLETION, json.dumps({"model": "soak", "prompt": "word " * 20_000}).encode()),
    (EMBEDDING, json.dumps({"model": "soak", "input": ["a"] * 3000}).encode()),
    (CHAT, b'{"a": "' + b"a" * 2_100_000 + b'"}'),
]  # fmt: skip
KINDS: dict[str, Callable[[Client], Awaitable[None]]] = {
    "stream": Client.stream, "talk": Client.talk, "completion": Client.complete, "form": Client.form,
    "embedding": Client.embed, "score": Client.score, "long prompt": Client.long, "vanish": Client.vanish,
    "slow reader": Client.dawdle, "nonsense": Client.nonsense, "no HTTP": Client.no_http,
}  # fmt: skip


def make_model(folder: Path) -> None:
    texts = [document.text or "" for document in documents("prose", limit=2000)]
    tokenizer = train_tokenizer(texts, 1200)
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary=tokenizer.vocabulary_size, width=128, layers=3, heads=4, key_value_heads=2, head_width=32,
        inner_width=352, context=CONTEXT, query_key_norm="head",
    )  # fmt: skip
    save_model(Transformer(config), folder)
    tokenizer.save(folder)
    if not tokenizer.templates:
        (folder / "chat_template.jinja").write_text(TEMPLATE)


def start_server(folder: Path, log: Path) -> tuple[subprocess.Popen[str], int]:
    command = [
        sys.executable, "-u", "-m", "trivium.cli", "serve", f"soak={folder}", "--port", "0",
        "--max-rows", str(ROWS), "--queued", str(QUEUED), "--cache-mib", "256", "--head-seconds", "5",
    ]  # fmt: skip
    with log.open("w") as told:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving"):
            return process, int(line.partition("http://127.0.0.1:")[2].partition(" ")[0])
    raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")


async def fill(port: int) -> None:
    """Let all rows hold prompts of every size at once, so that the cache has had its largest extent."""
    client = Client(port, 0, Tally())
    for length in (90, 220, CONTEXT - 20):
        prompts = [[client.random.randint(300, 1000) for _ in range(length)] for _ in range(ROWS)]
        bodies = [{"prompt": prompt, "max_tokens": 16, "min_tokens": 16} for prompt in prompts]
        answers = await asyncio.gather(*(client.ask(COMPLETION, body) for body in bodies))
        assert all(answer.status == 200 for answer in answers), answers[0].content
    reader, writer = await client.open()
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    for line in (await reader.read()).decode().splitlines():
        if line.startswith("trivium_cache_bytes"):
            print(f"  cache         {float(line.split()[-1]) / 2**20:.0f} MiB once all rows were filled")
    writer.close()


async def watch_memory(process: int, samples: list[tuple[float, int]], until: float) -> None:
    """Note once a second how much memory the server holds, in bytes."""
    began = time.monotonic()
    while time.monotonic() < until:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        samples.append((time.monotonic() - began, pages * resource.getpagesize()))
        await asyncio.sleep(1)


async def soak(
    port: int, process: int, clients: int, seconds: float
) -> tuple[Tally, list[tuple[float, int]]]:
    tally, samples = Tally(), list[tuple[float, int]]()
    until = time.monotonic() + seconds
    everybody = [Client(port, number, tally).run(until) for number in range(clients)]
    await asyncio.gather(watch_memory(process, samples, until), *everybody)
    return tally, samples


def by_minute(samples: list[tuple[float, int]], minutes: int) -> list[float]:
    """The median of the memory in each minute, in MiB."""
    return [
        statistics.median(held for at, held in samples if minute * 60 <= at < minute * 60 + 60) / 2**20
        for minute in range(minutes)
    ]


def report(tally: Tally, memory: list[float], warm_up: int, log: Path, status: int) -> bool:
    """Print what came of it; whether all held."""
    for kind in KINDS:
        done, away, errors = tally.done[kind], tally.turned_away[kind], tally.errors[kind]
        print(f"  {kind:12} {done:7d} as they should be   {away:5d} told to come back   {errors:4d} errors")
    for example in tally.examples:
        print(f"  an error: {example}")
    first = sorted(tally.first)
    if first:
        late = first[min(len(first) - 1, int(0.99 * len(first)))]
        print(f"  first token   {statistics.median(first):.3f} s, p99 {late:.3f} s, of {len(first)} streams")
    later = memory[warm_up:] or memory
    growth = later[-1] / later[0] - 1
    print(f"  memory        {' '.join(f'{held:.0f}' for held in memory)} MiB by minute")
    print(f"  grown         {growth:+.2%} since minute {len(memory) - len(later) + 1}")
    raised = log.read_text().count("Traceback")
    size = log.stat().st_size
    print(f"  log           {size} bytes, {raised} tracebacks; the server ended with status {status}")
    return not tally.errors and growth < MOST_GROWTH and not raised and status == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=int, default=20)
    parser.add_argument(
        "--warm-up",
        type=int,
        default=8,
        help="Minutes left out of the growth: buffers for a number of rows are made when it first occurs.",
    )
    parser.add_argument("--clients", type=int, default=64)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "model", Path(place) / "log"
        make_model(folder)
        process, port = start_server(folder, log)
        try:
            asyncio.run(fill(port))
            work = soak(port, process.pid, chosen.clients, chosen.minutes * 60)
            tally, samples = asyncio.run(work)
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
        finally:
            process.kill()
            process.wait()
        print(
            f"{chosen.clients} clients of {len(KINDS)} kinds, {chosen.minutes} minutes, {ROWS} rows, "
            f"{sum(tally.done.values())} requests, load {os.getloadavg()[0]:.1f}"
        )
        held = report(tally, by_minute(samples, chosen.minutes), chosen.warm_up, log, status)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
