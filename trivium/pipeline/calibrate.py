"""What `doctor` measures for the planner: what training, attention, decoding and reading reach or cost.

Two small models of different widths make a few optimiser steps on short documents. From the FLOP/s of both
follow the two numbers of the planner's rule, share = ceiling x width / (width + half_width). The narrow one
also learns from longer documents: what that takes more is attention. Decoding is timed with few rows and
many, for few tokens and many, which tells apart what a step costs, a row, and a request. The fastest of
several counts, so that other work on the machine disturbs little.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trivium import world
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
from trivium.model.flops import parameter_count
from trivium.model.initialise import new_model
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

WIDTHS = (128, 384)
SECONDS = 1.5
"""For each width."""
SHORT, LONGER = 64, (256, 1024)
"""Tokens of a document."""
TOKENS, VOCABULARY = 2048, 2048
TEXT = "The river rises in the hills and reaches the sea after three days. 12 + 30 = 42.\n"
DECODED = (4, 32)
DECODED_ROWS = (8, 64)
TEXTS = 300
clock = time.perf_counter


def measure() -> dict[str, Any]:
    """Peak, bandwidth, the shares, and what attention, decoding and reading cost."""
    peak, bandwidth = machine.matmul_peak(), machine.memory_bandwidth()
    texts = [one.text or "" for one in world.documents("prose", limit=TEXTS)]
    tokenizer: Tokenizer = train_tokenizer(texts, VOCABULARY)
    trainings = [_Training(width) for width in WIDTHS]
    shares = [one.rate(SHORT) / peak for one in trainings]
    ceiling, half_width = fitted(WIDTHS, shares)
    found = {
        "peak": peak, "bandwidth": bandwidth, "ceiling": ceiling, "half_width": half_width,
        "attention": trainings[0].attention(), **_reading(tokenizer, texts),
    }  # fmt: skip
    rate = peak * ceiling * WIDTHS[0] / (WIDTHS[0] + half_width)
    found |= _decoding(tokenizer, rate, bandwidth)
    del trainings
    machine.hand_back_memory()
    resident = machine.resident_memory() if machine.device() == "cpu" else None
    # What a process holds that has trained and answered once, beside any model.
    return found | ({} if resident is None else {"runtime": float(resident)})


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
        vocabulary=VOCABULARY, width=width, layers=4, heads=width // 32, head_width=32,
        inner_width=3 * width, context=LONGER[-1], query_key_norm="head",
    )  # fmt: skip


class _Training:
    """Optimiser steps of a small model, with everything a step does."""

    def __init__(self, width: int) -> None:
        self.device = machine.device()
        self.model = new_model(_config(width), seed=1, device=self.device)
        named = dict(self.model.named_parameters())
        self.optimiser = Optimiser(named, LearningRates(0.01, 0.01, 0.01, 0.01), muon=True)
        self.passes = 2 if self.device == "cpu" else 8

    def _step(self, length: int) -> None:
        tokens = torch.randint(VOCABULARY, (TOKENS,), device=self.device)
        for _ in range(self.passes):
            with one_pass("auto", self.model.device):
                hidden = self.model(tokens, Documents([length] * (TOKENS // length), self.device))
                weights = torch.ones(TOKENS, device=self.device)
                fused_cross_entropy(hidden, self.model.head_weight, tokens, weights).sum.backward()
        self.optimiser.step(1.0)
        for parameter in self.model.parameters():
            parameter.grad = None
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, length: int) -> tuple[float, float]:
        """The fastest step over documents of this length, and its FLOPs."""
        with counted() as tally:
            self._step(length)
        return _fastest(lambda: self._step(length), SECONDS), tally.operations

    def rate(self, length: int) -> float:
        """FLOP/s."""
        seconds, flops = self.seconds(length)
        return flops / seconds

    def attention(self) -> list[list[float]]:
        """FLOP/s of attention's whole square by the length of documents, from what longer ones take more."""
        base, flops = self.seconds(SHORT)
        found = []
        for length in LONGER:
            seconds, more = self.seconds(length)
            # Never faster than eight times the peak of a product: then a difference is noise.
            found.append(
                [float(length), (more - flops) / max(seconds - base, (more - flops) / (8 * flops / base))]
            )
        return found


def _fastest(work: Callable[[], object], seconds: float) -> float:
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop or best == float("inf"):
        start = clock()
        work()
        best = min(best, clock() - start)
    return best


def _decoding(tokenizer: Tokenizer, rate: float, bandwidth: float) -> dict[str, float]:
    """Seconds of a decoding step, of a row in it and of a request, beside their products and reads."""
    config = _config(WIDTHS[0]).changed(vocabulary=tokenizer.vocabulary_size)
    model = new_model(config, seed=1, device=machine.device()).requires_grad_(False)
    prompt = tokenizer.encode(TEXT)

    def seconds(rows: int, tokens: int) -> float:
        """Of one batch, what its products and reads take taken off."""
        engine = Engine(model, tokenizer, max_rows=rows)
        wish = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, seed=1, logprobs=True)
        requests = [Request(prompt, wish) for _ in range(rows)]
        with counted() as tally:
            engine.generate(requests)
        read = 4.0 * parameter_count(config) * tokens / (bandwidth * 0.75)
        return max(
            0.0, _fastest(lambda: engine.generate(requests), SECONDS / 2) - tally.operations / rate - read
        )

    (few, many), (short, long) = DECODED_ROWS, DECODED
    whole = seconds(many, long)
    each = (whole - seconds(many, short)) / (long - short)
    request = max(0.0, (whole - long * each) / many)
    alone = max(0.0, (seconds(few, long) - few * request) / long)
    row = max(0.0, (each - alone) / (many - few))
    return {"step_seconds": max(0.0, alone - few * row), "row_seconds": row, "request_seconds": request}


def _reading(tokenizer: Tokenizer, texts: Sequence[str]) -> dict[str, float]:
    """Characters that are tokenised in a second, and seconds of a conversation beside its characters."""
    seconds = _fastest(lambda: [tokenizer.encode(text) for text in texts], SECONDS / 3)
    read = sum(map(len, texts)) / seconds
    said = [
        [{"role": "user", "content": one[:80]}, {"role": "assistant", "content": one[80:160]}]
        for one in texts
    ]
    chats = _fastest(lambda: [tokenizer.encode_chat(one) for one in said], SECONDS / 3)
    return {"read": read, "conversation_seconds": max(0.0, chats / len(said) - 160 / read)}
