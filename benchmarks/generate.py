"""How fast the engine generates beside transformers' `generate`: the same weights, in turns, in one run.

Run with `python benchmarks/generate.py`; it needs the extra `dev`. Both answer greedily, and their
answers are compared. In the mixed case 32 requests of different lengths want 8 to 128 new tokens:
transformers pads them to one rectangle and runs until the longest is done; only wanted tokens count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.folder import load_model

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


def cases() -> list[Case]:
    random = torch.Generator().manual_seed(1)

    def prompt(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    def lengths(count: int) -> list[int]:
        return torch.linspace(8, NEW_TOKENS, count).long()[torch.randperm(count, generator=random)].tolist()

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


def seconds(run: Callable[[], list[list[int]]]) -> tuple[float, list[list[int]]]:
    start = time.perf_counter()
    tokens = run()
    return time.perf_counter() - start, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.logging.set_verbosity_error()
    peer = peer_model()
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(folder)
        # one row is what a chat asks for: an engine of one row need not match what a larger one computes
        engines = {
            rows: Engine(load_model(folder), NoText(), max_rows=rows)  # type: ignore[arg-type]
            for rows in (1, 32)
        }
    print(f"tokens/s, median of {arguments.rounds} rounds, {arguments.threads} threads")
    print(f"{'':10} {'transformers':>14} {'trivium':>10} {'ratio':>7} {'wanted':>7}")
    for case in cases():
        peer_times, own_times, ratios = [], [], []
        engine = engines[len(case.prompts)]
        expected, found = run_peer(peer, case), run_engine(engine, case)
        same = sum(one == other for one, other in zip(expected, found, strict=True))
        for turn in range(arguments.rounds):
            runs = [
                (peer_times, lambda case=case: run_peer(peer, case)),
                (own_times, lambda case=case, engine=engine: run_engine(engine, case)),
            ]
            for times, run in runs if turn % 2 == 0 else reversed(runs):
                times.append(seconds(run)[0])
            ratios.append(peer_times[-1] / own_times[-1])
        total = sum(case.wanted)
        theirs, ours = total / statistics.median(peer_times), total / statistics.median(own_times)
        ratio = statistics.median(ratios)
        print(
            f"{case.name:10} {theirs:14,.0f} {ours:10,.0f} {ratio:6.1f}x {case.target:6.1f}x   "
            f"{same}/{len(expected)} answers equal to the last token"
        )


if __name__ == "__main__":
    main()
