"""What the server costs: 64 streaming clients at once, in turns with the engine alone on the same requests.

Run with `python benchmarks/serve.py`; it needs the extra `serve`. The engine alone answers the same prompts
with the same settings and nobody listening; the server runs in a process of its own, and the clients share
the machine with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.config import ModelConfig
from trivium.model.folder import save_model
from trivium.model.transformer import Transformer
from trivium.serve.models import open_engine
from trivium.tokens.train import train_tokenizer
from trivium.world import documents

CLIENTS, ROWS, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 64, 32, 32, 128, 4096
SERVE = "import sys; from trivium.serve.server import serve; serve(sys.argv[1:], port=0, max_rows={rows})"


@dataclass(frozen=True)
class Round:
    """One round of all clients: how long it took, what came, and how long each waited for its first token."""

    seconds: float
    tokens: int
    errors: int
    first: tuple[float, ...] = ()

    @property
    def speed(self) -> float:
        """Tokens per second over all clients."""
        return self.tokens / self.seconds


def make_model(folder: Path) -> None:
    texts = [document.text or "" for document in documents("prose", limit=3000)]
    tokenizer = train_tokenizer(texts, 1200)
    torch.manual_seed(0)
    config = ModelConfig(
        vocabulary=VOCABULARY, width=256, layers=4, heads=4, key_value_heads=4, head_width=64,
        inner_width=704, context=512, query_key_norm="head",
    )  # fmt: skip
    save_model(Transformer(config), folder)
    tokenizer.save(folder)


def prompts() -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return torch.randint(300, 1000, (CLIENTS, PROMPT_TOKENS), generator=random).tolist()


def engine_alone(engine: Engine) -> Round:
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    requests = [Request(prompt, Sampling(seed=index, **settings)) for index, prompt in enumerate(prompts())]
    began = time.perf_counter()
    answers = engine.generate(requests)
    seconds = time.perf_counter() - began
    return Round(seconds, sum(len(one.tokens) for many in answers for one in many), 0)


async def one_client(port: int, prompt: list[int], seed: int) -> tuple[int, float]:
    """Send one request and read its stream; gives the tokens and the wait for the first of them."""
    body = json.dumps({
        "model": "bench", "prompt": prompt, "seed": seed, "max_tokens": NEW_TOKENS, "min_tokens": NEW_TOKENS,
        "stream": True, "stream_options": {"include_usage": True},
    }).encode()  # fmt: skip
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = [
        "POST /v1/completions HTTP/1.1",
        "Host: localhost",
        "Connection: close",
        f"Content-Length: {len(body)}",
    ]
    writer.write("\r\n".join([*head, "", ""]).encode() + body)
    status = await reader.readline()
    await reader.readuntil(b"\r\n\r\n")
    first, received = 0.0, b""
    while chunk := await reader.read(65536):
        first = first or time.perf_counter() - began
        received += chunk
    writer.close()
    if b" 200 " not in status or b"data: [DONE]" not in received:
        raise RuntimeError((status + received)[:300].decode("utf-8", "replace"))
    usage = received.rpartition(b'"completion_tokens":')[2].partition(b",")[0]
    return int(usage), first


async def all_clients(port: int) -> Round:
    began = time.perf_counter()
    work = [one_client(port, prompt, index) for index, prompt in enumerate(prompts())]
    results = await asyncio.gather(*work, return_exceptions=True)
    seconds = time.perf_counter() - began
    good = [result for result in results if not isinstance(result, BaseException)]
    for problem in [result for result in results if isinstance(result, BaseException)][:3]:
        print(f"  an error: {problem}", file=sys.stderr)
    tokens = sum(count for count, _ in good)
    return Round(seconds, tokens, len(results) - len(good), tuple(first for _, first in good))


def start_server(folder: Path) -> tuple[subprocess.Popen, int]:
    command = [sys.executable, "-u", "-c", SERVE.format(rows=ROWS), f"bench={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Serving"):
            return process, int(line.partition("http://127.0.0.1:")[2].partition(" ")[0])
    raise SystemExit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_model(folder)
        engine = open_engine(folder, max_rows=ROWS)
        process, port = start_server(folder)
        try:
            asyncio.run(all_clients(port))
            engine_alone(engine)
            alone, served = [], []
            for _ in range(rounds):
                alone.append(engine_alone(engine))
                served.append(asyncio.run(all_clients(port)))
        finally:
            process.terminate()
            process.wait()
    ratios = [two.speed / one.speed for one, two in zip(alone, served, strict=True)]
    waits = sorted(first for one in served for first in one.first)
    print(f"{CLIENTS} clients, {ROWS} rows, {NEW_TOKENS} new tokens each, {rounds} rounds, medians")
    print(f"  engine alone   {statistics.median(one.speed for one in alone):8.0f} tokens/s")
    print(f"  server         {statistics.median(one.speed for one in served):8.0f} tokens/s")
    spread = f"({min(ratios):.2f} to {max(ratios):.2f}; aim 0.80)"
    print(f"  ratio          {statistics.median(ratios):8.2f}   {spread}")
    late = waits[int(0.95 * len(waits))]
    print(f"  first token    {statistics.median(waits):8.3f} s  (95 % within {late:.3f} s)")
    print(f"  errors         {sum(one.errors for one in served):8d}")


if __name__ == "__main__":
    main()
