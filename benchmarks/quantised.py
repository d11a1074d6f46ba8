"""Decoding with fewer bits on a processor: tokens per second beside float32, memory, perplexity.

Run with `python benchmarks/quantised.py FOLDER --text FILE`; FOLDER is any model that opens here, such as
the folder that `python tests/real/fetch.py DIR` makes. One row is decoded greedily, in turns, and the best
turn of each counts: on a machine that others use, the best is what the kernels can do. Perplexity is over
the first tokens of the text in rows of 512, by the engine's own log-probabilities. `blas` is float32 as BLAS
reads it, which ratios refer to; `float32` is held in the layout that the engine takes by itself.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from trivium.generate.engine import Engine
from trivium.generate.matrices import Blocks, Matrix, layouts
from trivium.generate.packed import HalfMatrix, PackedMatrix
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.model.folder import load_model
from trivium.model.quantize import is_quantised, quantise
from trivium.tokens.tokenizer import Tokenizer

ROW = 512


def engine_of(folder: Path, scheme: str, tokenizer: Tokenizer) -> Engine:
    dtype = torch.bfloat16 if scheme == "bfloat16" else torch.float32
    model = load_model(folder, dtype=dtype).requires_grad_(False).eval()
    if scheme in ("int8", "int4"):
        quantise(model, scheme)  # type: ignore[arg-type]
    with patch(
        "trivium.generate.forward.layouts", lambda model: ["blas"] if scheme == "blas" else layouts(model)
    ):
        return Engine(model, tokenizer, max_rows=1)


def bytes_of(engine: Engine) -> int:
    """All tensors that the model and the engine's forward pass hold of weights."""
    seen: dict[int, int] = {}
    packed = 0

    def note(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()

    for weight in engine.model.parameters():
        for part in (weight.qdata, weight.scale) if is_quantised(weight) else (weight,):  # type: ignore[attr-defined]
            note(part)
    forward: Any = engine._forward
    held = [forward.head, *(one for layer in forward.layers for one in vars(layer).values())]
    for one in held:
        if isinstance(one, torch.Tensor):
            note(one)
        elif isinstance(one, HalfMatrix):
            packed += one.bytes
        elif isinstance(one, PackedMatrix):
            note(one.values)
            note(one.scales)
        elif isinstance(one, Matrix):
            note(one.weight)
        elif isinstance(one, Blocks):
            for block in one.blocks:
                note(block.weight)
    return sum(seen.values()) + packed


def perplexity(engine: Engine, ids: list[int]) -> float:
    rows = [ids[start : start + ROW] for start in range(0, len(ids), ROW)]
    logprobs = [one for row in rows for one in engine.score([[]], [row])[0].logprobs if one is not None]
    return math.exp(-sum(logprobs) / len(logprobs))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="Rows of 512 tokens for the perplexity.")
    words = parser.parse_args()
    tokenizer = Tokenizer.load(words.folder)
    ids = tokenizer.encode(words.text.read_text(encoding="utf-8")[: ROW * words.rows * 8])[: ROW * words.rows]
    prompt = ids[:16]
    schemes = ("blas", "float32", "bfloat16", "int8", "int4")
    engines = {scheme: engine_of(words.folder, scheme, tokenizer) for scheme in schemes}
    best = dict.fromkeys(engines, 0.0)
    sampling = Sampling(max_new_tokens=words.tokens, min_new_tokens=words.tokens, temperature=0)
    for _ in range(words.turns):
        for scheme, engine in engines.items():
            start = time.perf_counter()
            engine.generate([Request(prompt, sampling)])
            best[scheme] = max(best[scheme], words.tokens / (time.perf_counter() - start))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print("scheme     tokens/s  ratio  MiB  ratio  perplexity")
    base = bytes_of(engines["blas"])
    for scheme, engine in engines.items():
        held = bytes_of(engine)
        ratio = best[scheme] / best["blas"]
        print(
            f"{scheme:<10} {best[scheme]:8.1f} {ratio:6.2f} {held / 2**20:4.0f} {held / base:6.2f}"
            f"  {perplexity(engine, ids):.3f}"
        )
        gc.collect()


if __name__ == "__main__":
    main()
