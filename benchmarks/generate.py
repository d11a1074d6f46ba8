"""How fast the engine generates beside transformers' `generate`: the same weights, in turns, in one run.

Run with `python benchmarks/generate.py`; it needs the extra `dev`. Both answer greedily, and their
answers are compared. In the mixed case 32 requests of different lengths want 8 to 128 new tokens:
transformers pads them to one rectangle and runs until the longest is done; only wanted tokens count.
With `--model FOLDER` a real checkpoint decodes 1 and 8 rows, and with `--llama FOLDER` (the `llama` that
`python tests/real/fetch.py DIR` makes) llama.cpp takes its turns on f16 and q8_0 files of the same weights.
`--dtype bfloat16` opens the weights in 16 bits on both sides; in float32 the engine holds weights that were
published in 16 bits as those, with the numbers of float32.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from peers import Worker

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.folder import load_model
from trivium.model.gguf.write import write_gguf

VOCABULARY, NEW_TOKENS, PAD = 4096, 128, 0


class NoText:
    """Stands for a tokenizer: both sides are measured in ids."""

    stop_ids: frozenset[int] = frozenset()

    def decode(self, ids: list[int]) -> str:
        """Nothing reads the text."""
        return ""


@dataclass(frozen=True)
class Case:
    """Prompts, and how many tokens each of them wants."""

    name: str
    prompts: list[list[int]]
    wanted: list[int]
    target: float


def peer_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
        pad_token_id=PAD, initializer_range=0.06,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def cases(real: bool) -> list[Case]:
    random = torch.Generator().manual_seed(1)

    def prompt(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    def lengths(count: int) -> list[int]:
        return torch.linspace(8, NEW_TOKENS, count).long()[torch.randperm(count, generator=random)].tolist()

    if real:
        return [Case(f"{rows} real", [prompt(32) for _ in range(rows)], [64] * rows, 1.5) for rows in (1, 8)]
    return [
        Case("one row", [prompt(32)], [NEW_TOKENS], 3.0),
        Case("32 rows", [prompt(32) for _ in range(32)], [NEW_TOKENS] * 32, 4.0),
        Case("32 mixed", [prompt(length) for length in lengths(32)], lengths(32), 6.0),
    ]


@torch.inference_mode()
def run_peer(model: transformers.PreTrainedModel, case: Case) -> list[list[int]]:
    longest = max(map(len, case.prompts))
    rows = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in case.prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in case.prompts])
    out = model.generate(
        rows,
        attention_mask=mask,
        max_new_tokens=max(case.wanted),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    return [row[longest : longest + wanted].tolist() for row, wanted in zip(out, case.wanted, strict=True)]


def run_engine(engine: Engine, case: Case) -> list[list[int]]:
    requests = [
        Request(prompt, Sampling(temperature=0, max_new_tokens=wanted, stop_ids=()))
        for prompt, wanted in zip(case.prompts, case.wanted, strict=True)
    ]
    return [completions[0].tokens for completions in engine.generate(requests)]


def llama_workers(folder: Path, package: Path, scratch: Path, rows: int, threads: int) -> dict[str, Worker]:
    """llama.cpp with a file of each kind, waiting for its turn."""
    os.environ["PYTHONPATH"] = str(package)
    workers = {}
    for kind in ("f16", "q8_0"):
        file = scratch / f"{kind}.gguf"
        if not file.exists():
            write_gguf(folder, file, kind, say=lambda note: None)  # type: ignore[arg-type]
        arguments = {"file": str(file), "rows": rows, "threads": threads}
        workers[kind] = Worker(sys.executable, "llama_worker.py", arguments)
    return workers


def seconds(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--model", type=Path, help="a Hugging Face folder in place of a small random model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--llama", type=Path, help="a folder that holds the package xllamacpp")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if arguments.model is None:
            peer_model().save_pretrained(scratch / "model")
        folder = arguments.model or scratch / "model"
        peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        print(
            f"tokens/s, median of {arguments.rounds} rounds, {arguments.threads} threads, {arguments.dtype}"
        )
        print(f"{'':10} {'transformers':>14} {'trivium':>10} {'ratio':>7} {'wanted':>7}")
        for case in cases(arguments.model is not None):
            rows = len(case.prompts)
            # one row is what a chat asks for: an engine of one row need not match what a larger one computes
            engine = Engine(load_model(folder, dtype=dtype), NoText(), max_rows=rows)  # type: ignore[arg-type]
            workers = {}
            if arguments.llama is not None:
                workers = llama_workers(folder, arguments.llama, scratch, rows, arguments.threads)
            measure(case, peer, engine, workers, arguments.rounds)
            for worker in workers.values():
                worker.close()


def measure(
    case: Case, peer: transformers.PreTrainedModel, engine: Engine, workers: dict[str, Worker], rounds: int
) -> None:
    """Let all contestants answer in turns, and print a line."""
    expected, found = run_peer(peer, case), run_engine(engine, case)
    same = sum(one == other for one, other in zip(expected, found, strict=True))
    runs: dict[str, Callable[[], float]] = {
        "transformers": lambda: seconds(lambda: run_peer(peer, case))[0],
        "trivium": lambda: seconds(lambda: run_engine(engine, case))[0],
    }
    for name, worker in workers.items():
        runs[name] = lambda worker=worker: worker.ask(prompts=case.prompts, new_tokens=case.wanted[0])[
            "seconds"
        ]  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in runs if turn % 2 == 0 else reversed(runs):
            times[name].append(runs[name]())
    speeds = {name: sum(case.wanted) / statistics.median(took) for name, took in times.items()}
    ratio = statistics.median(
        theirs / ours for theirs, ours in zip(times["transformers"], times["trivium"], strict=True)
    )
    print(
        f"{case.name:10} {speeds['transformers']:14,.0f} {speeds['trivium']:10,.0f} {ratio:6.1f}x"
        f" {case.target:6.1f}x   {same}/{len(expected)} answers equal to the last token"
    )
    for name in workers:
        print(
            f"{'':10} llama.cpp {name} {speeds[name]:,.0f}, {speeds[name] / speeds['trivium']:.2f} of Trivium"
        )


if __name__ == "__main__":
    main()
