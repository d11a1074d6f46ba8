"""Rows a second of a stage that asks an endpoint, and of distilabel with the same questions.

    python benchmarks/synthesize.py MODEL [--with /path/to/python-with-distilabel] [--rows 400] [--repeat 3]

The server is one process, each contestant another; both ask the same questions, with as many requests in
flight, and write the answers to disk. Half are word problems and half are answered in a few words, so
answers differ in length, as they do in use. Before it is timed, a contestant writes a few rows in the same
process: imports are not counted. Neither is the first run of each, which warms the server. What a run
spends on starting processes and reading data is.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
FEW = [f"What is {n} + 2?" for n in range(4)]


def ours(job: dict, folder: Path) -> float:
    import yaml

    import trivium

    folder.mkdir(parents=True)
    questions = "".join(json.dumps({"prompt": one}) + "\n" for one in job["prompts"])
    (folder / "seeds.jsonl").write_text(questions)
    stage = {
        "kind": "synthesize", "data": "./seeds.jsonl",
        "steps": [{"answer": {"max_new_tokens": job["tokens"], "cut": True}}],
        "endpoint": {"url": job["url"], "model": job["model"], "concurrency": job["concurrency"]},
        "per_round": len(job["prompts"]),
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump({"name": "r", "stages": {"asked": stage}}))
    start = time.perf_counter()
    run = trivium.run(folder / "r.yaml", runs=folder / "runs")
    seconds = time.perf_counter() - start
    rows = (run["asked"].folder / "data" / "rows.jsonl").read_text().count("\n")
    # A small model may say nothing, and such a row is dropped.
    assert rows > 0.9 * len(job["prompts"]), f"{rows} rows"
    return seconds


def distilabel(job: dict, folder: Path) -> float:
    from distilabel.models import OpenAILLM
    from distilabel.pipeline import Pipeline
    from distilabel.steps import LoadDataFromDicts
    from distilabel.steps.tasks import TextGeneration

    start = time.perf_counter()
    with Pipeline(name="r", cache_dir=str(folder)) as pipeline:
        load = LoadDataFromDicts(
            data=[{"instruction": one} for one in job["prompts"]], batch_size=job["concurrency"]
        )
        generate = TextGeneration(
            llm=OpenAILLM(
                base_url=job["url"], api_key="none", model=job["model"],
                generation_kwargs={"max_new_tokens": job["tokens"], "temperature": 1.0},
            ),
            input_batch_size=job["concurrency"],
        )  # fmt: skip
        load >> generate
    made = pipeline.run(use_cache=False)["default"]["train"]
    made.to_json(str(folder / "rows.jsonl"))
    seconds = time.perf_counter() - start
    assert len([one for one in made["generation"] if one]) > 0.9 * len(job["prompts"])
    return seconds


def prompts(count: int, place: int) -> list[str]:
    """Word problems and short questions of the world, each once; others for every place."""
    from trivium.data.sources import Source, read_documents

    first, last = 2 * place * count, 2 * (place + 1) * count
    kinds = [
        [one.fields["messages"][0]["content"] for one in read_documents(Source(path=path, limit=last))][
            first:
        ]
        for path in ("world:sums?form=chat", "world:chat")
    ]
    found = list(dict.fromkeys(chain.from_iterable(zip(*kinds, strict=True))))[:count]
    random.Random(place).shuffle(found)
    return found


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def measured(python: str, name: str, job: dict) -> float:
    """Seconds of one contestant, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT) if name == "ours" else "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, __file__, "--job", name], input=json.dumps(job), env=environment, text=True,
        capture_output=True,
    )  # fmt: skip
    found = re.findall(r"^SECONDS ([\d.]+)$", done.stdout, re.M)
    if not found:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return float(found[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--with", dest="peer")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--job")
    wanted = parser.parse_args()
    if wanted.job:
        contestant, job = {"ours": ours, "distilabel": distilabel}[wanted.job], json.loads(sys.stdin.read())
        folder = Path(job["folder"])
        contestant({**job, "prompts": FEW}, folder / "before")
        seconds = contestant(job, folder / "timed")
        print(f"SECONDS {seconds}")
        return
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "trivium.cli", "serve", wanted.model, "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            try:
                with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
                    model = json.load(answer)["data"][0]["id"]
                break
            except OSError:
                assert server.poll() is None, "the server did not start"
                time.sleep(0.2)
        contestants = {"ours": sys.executable, **({"distilabel": wanted.peer} if wanted.peer else {})}
        found: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(wanted.repeat + 1):
            for number, (name, python) in enumerate(contestants.items()):
                # Of its own, or the server would know the prompts of the side that comes second.
                asked = prompts(wanted.rows, len(contestants) * turn + number)
                with tempfile.TemporaryDirectory() as folder:
                    job = {"url": f"{address}/v1", "model": model, "prompts": asked,
                           "folder": folder, "tokens": wanted.tokens,
                           "concurrency": wanted.concurrency}  # fmt: skip
                    seconds = measured(python, name, job)
                if turn:
                    found[name].append(wanted.rows / seconds)
    finally:
        server.terminate()
        server.wait(20)
    for name, rates in found.items():
        middle = statistics.median(rates)
        ratio = (
            f", {statistics.median(found['ours']) / middle:.2f} x less than ours" if name != "ours" else ""
        )
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        print(f"{name}: {middle:.1f} rows/s (median of {len(rates)}, {spread}){ratio}")


main()
