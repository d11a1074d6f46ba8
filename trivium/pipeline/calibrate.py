"""What `doctor` measures for the planner: the share of the peak that training reaches, the cost of decoding.

Two small models of different widths make a few optimiser steps. From the FLOP/s of both follow the two
numbers of the planner's rule, share = ceiling x width / (width + half_width). The fastest step counts, so
that other work on the machine disturbs little.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit import machine
from trivium.learn.head_loss import fused_cross_entropy
from trivium.learn.optimisers import LearningRates, Optimiser
from trivium.learn.precision import one_pass
from trivium.model.arithmetic import counted
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.initialise import new_model
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

WIDTHS = (128, 384)
SECONDS = 1.5
"""For each width."""
CONTEXT, ROWS = 256, 16
TEXT = "The river rises in the hills and reaches the sea after three days. 12 + 30 = 42.\n"
DECODED, DECODE_ROWS = 32, 64


def measure() -> dict[str, Any]:
    """Peak, bandwidth, the two numbers of the shares, and the cost of a decoding step."""
    peak, bandwidth = machine.matmul_peak(), machine.memory_bandwidth()
    shares = [_training_rate(width) / peak for width in WIDTHS]
    ceiling, half_width = fitted(WIDTHS, shares)
    return {
        "peak": peak, "bandwidth": bandwidth, "ceiling": ceiling, "half_width": half_width,
        "step_seconds": _decoding_step(peak, ceiling, half_width),
    }  # fmt: skip


def fitted(widths: tuple[int, int], shares: list[float]) -> tuple[float, float]:
    """Ceiling and half width of the rule through two measurements; flat where the wider reaches no more."""
    (small, large), (low, high) = widths, shares
    if high <= low:
        return max(shares), 0.0
    # 1/share is linear in 1/width.
    slope = (1 / low - 1 / high) / (1 / small - 1 / large)
    inverse = 1 / high - slope / large
    if inverse <= 0.5:
        # So steep a rise is no saturation: keep both points by the larger share alone.
        return high * (large + small) / large, float(small)
    return 1 / inverse, slope / inverse


def _config(width: int) -> ModelConfig:
    return ModelConfig(
        vocabulary=2048, width=width, layers=4, heads=width // 32, head_width=32, inner_width=3 * width,
        context=CONTEXT, query_key_norm="head",
    )  # fmt: skip


def _training_rate(width: int) -> float:
    """FLOP/s of optimiser steps, with everything a step does."""
    device = machine.device()
    model = new_model(_config(width), seed=1, device=device)
    optimiser = Optimiser(dict(model.named_parameters()), LearningRates(0.01, 0.01, 0.01, 0.01), muon=True)
    passes = 2 if device == "cpu" else 8
    tokens = torch.randint(2048, (ROWS // 2 * CONTEXT,), device=device)
    documents = [CONTEXT] * (ROWS // 2)

    def step() -> None:
        for _ in range(passes):
            with one_pass("auto", model.device):
                hidden = model(tokens, Documents(documents, device))
                weights = torch.ones(len(tokens), device=device)
                fused_cross_entropy(hidden, model.head_weight, tokens, weights).sum.backward()
        optimiser.step(1.0)
        for parameter in model.parameters():
            parameter.grad = None
        if device != "cpu":
            torch.cuda.synchronize()

    with counted() as tally:
        step()
    best, stop = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < stop or best == float("inf"):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    return tally.operations / best


def _decoding_step(peak: float, ceiling: float, half_width: float) -> float:
    """Seconds of a decoding step of a small model beside its products."""
    config, device = _config(WIDTHS[0]), machine.device()
    tokenizer: Tokenizer = train_tokenizer([TEXT * 20], 300)
    model = new_model(config.changed(vocabulary=tokenizer.vocabulary_size), seed=1, device=device)
    engine = Engine(model.requires_grad_(False), tokenizer, max_rows=DECODE_ROWS)
    ids = tokenizer.encode(TEXT)
    wish = Sampling(max_new_tokens=DECODED, min_new_tokens=DECODED, seed=1)
    requests = [Request(ids, wish) for _ in range(DECODE_ROWS)]
    engine.generate(requests)
    seconds = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with counted() as tally:
            engine.generate(requests)
        seconds = min(seconds, time.perf_counter() - start)
    rate = peak * ceiling * config.width / (config.width + half_width)
    return max(0.0, seconds - tally.operations / rate) / DECODED
