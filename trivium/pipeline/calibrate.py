"""What `doctor` measures for the planner: what training, attention, decoding and reading reach or cost.

Two small models of different widths make a few optimiser steps on short documents of many lengths. From the
FLOP/s of both follow the two numbers of the planner's rule, share = ceiling x width / (width + half_width).
The narrow one also learns from longer documents: what that takes more is attention. How far the memory of the
process grows meanwhile, against the formula, is what the allocator loses between tensors. Decoding is timed
with few rows and many, for few tokens and many, after short prompts and long ones, which tells apart what a
step costs, a row, a request, and a byte of the cache. The fastest of several counts, so that other work on
the machine disturbs little.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from trivium import world
from trivium.generate.engine import Engine
from trivium.generate.kv_cache import BLOCK
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit import machine
from trivium.lab.planner.catalogue import COPY, this_machine
from trivium.lab.planner.layout import Layout
from trivium.lab.planner.memory import memory_of
from trivium.lab.planner.work import Job
from trivium.learn.head_loss import fused_cross_entropy
from trivium.learn.optimisers import LearningRates, Optimiser
from trivium.learn.precision import one_pass
from trivium.model.arithmetic import counted
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.flops import parameter_count
from trivium.model.initialise import new_model
from trivium.stages import kinds
from trivium.tokens.tokenizer import Tokenizer
from trivium.tokens.train import train_tokenizer

WIDTHS = (128, 384)
SECONDS = 1.5
"""For each width."""
SHORT, LONGER = 64, (256, 1024)
"""Tokens of a document."""
MIXED = (16, 112)
"""Between which lengths documents are drawn that are SHORT in the mean: each length is a group of its own."""
STEPS = 8
"""Optimiser steps after which the memory of the process has stopped growing."""
TOKENS, VOCABULARY = 2048, 2048
TEXT = "The river rises in the hills and reaches the sea after three days. 12 + 30 = 42.\n"
DECODED = ((8, 24, 16), (32, 24, 16), (32, 4, 16), (8, 24, 240), (32, 24, 240), (64, 24, 16))
"""Rows at once, tokens of an answer in the mean, and of a prompt."""
SAMPLES = 8
"""Answers to a prompt, and for each row so many requests: rows end and begin while others go on."""
TEXTS = 300
clock = time.perf_counter


def measure() -> dict[str, Any]:
    """Peak, bandwidth, the shares, and what attention, decoding and reading cost."""
    peak, bandwidth = machine.matmul_peak(), machine.memory_bandwidth()
    texts = [one.text or "" for one in world.documents("prose", limit=TEXTS)]
    tokenizer: Tokenizer = train_tokenizer(texts, VOCABULARY)
    # A run has the code of every kind in memory.
    kinds()
    found: dict[str, Any] = _Training(WIDTHS[0]).gaps()
    runtime = _held()
    narrow = _Training(WIDTHS[0])
    trainings = [narrow, _Training(WIDTHS[1])]
    shares = [one.rate() / peak for one in trainings]
    ceiling, half_width = fitted(WIDTHS, shares)
    found |= {
        "peak": peak, "bandwidth": bandwidth, "ceiling": ceiling, "half_width": half_width,
        "attention": narrow.attention(), **_reading(tokenizer, texts),
    }  # fmt: skip
    rate = peak * ceiling * WIDTHS[0] / (WIDTHS[0] + half_width)
    del narrow, trainings
    before = _held()
    found |= _decoding(tokenizer, rate, bandwidth)
    return found | ({"runtime": runtime, "answering": max(0.0, _held() - before)} if runtime else {})


def _held() -> float:
    """The bytes that this process holds beside any model; 0 on a GPU, whose memory is another."""
    machine.hand_back_memory()
    return float(machine.resident_memory() or 0) if machine.device() == "cpu" else 0.0


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
        self.random = np.random.default_rng(1)

    def _mixed(self) -> list[int]:
        """Lengths of documents that fill a pass, other ones each time."""
        drawn = self.random.integers(*MIXED, size=TOKENS // MIXED[0], endpoint=True)
        ends = np.minimum(drawn.cumsum(), TOKENS)
        return [int(one) for one in np.diff(ends, prepend=0) if one]

    def _step(self, length: int | None = None) -> None:
        """With documents of this length, else of many."""
        for _ in range(self.passes):
            lengths = self._mixed() if length is None else [length] * (TOKENS // length)
            tokens = torch.randint(VOCABULARY, (TOKENS,), device=self.device)
            with one_pass("auto", self.model.device):
                hidden = self.model(tokens, Documents(lengths, self.device))
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

    def rate(self) -> float:
        """FLOP/s over documents of many lengths."""
        best, stop = 0.0, time.perf_counter() + SECONDS
        while time.perf_counter() < stop or not best:
            start = clock()
            with counted() as tally:
                self._step()
            best = max(best, tally.operations / (clock() - start))
        return best

    def gaps(self) -> dict[str, float]:
        """By what share the memory that a training takes is more than the planner's formula says."""
        if self.device != "cpu" or not machine.keep_freed_memory():
            return {}
        machine.forget_peak_memory()
        before, config = machine.resident_memory(), self.model.config
        for _ in range(STEPS):
            self._step()
        after = machine.peak_memory()
        if before is None or after is None:
            return {}
        weights = float(parameter_count(config))
        job = Job("", "pretrain", config, optimiser="muon", trained_parameters=weights)
        held = memory_of(
            job, this_machine({"peak": 1.0, "runtime": 0.0, "gaps": 0.0}), Layout(micro_batch=TOKENS)
        ).total
        # The weights were there before.
        return {"gaps": max(0.0, (after - before + 4 * weights) / held - 1)}

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
    """What decoding costs beside its products and the reading of weights, by what follows from its counts."""
    config = _config(WIDTHS[0]).changed(vocabulary=tokenizer.vocabulary_size)
    model = new_model(config, seed=1, device=machine.device()).requires_grad_(False)
    text = tokenizer.encode(TEXT * 50)
    keys = 4.0 * 2 * config.layers * config.key_value_heads * config.head_width
    counts, seconds, whole = [], [], []
    for rows, answer, prompt in DECODED:
        engine, requests = Engine(model, tokenizer, max_rows=rows), []
        for number in range(SAMPLES * rows):
            # From half to one and a half times the mean.
            tokens = answer // 2 + number * 7 % (answer + 1)
            wish = Sampling(max_new_tokens=tokens, min_new_tokens=tokens, seed=number, logprobs=True)
            first = number // SAMPLES
            requests.append(Request(text[first : first + prompt], wish))
        with counted() as tally:
            engine.generate(requests)
        steps, written = (float(engine.counts[name]) for name in ("steps", "generated_tokens"))
        met = written * (prompt + (answer + BLOCK) / 2)
        counts.append([steps, written, float(len(requests)), met * keys])
        products = tally.operations / rate + 4.0 * parameter_count(config) * steps / (bandwidth * COPY)
        whole.append(_fastest(partial(engine.generate, requests), SECONDS / 2))
        seconds.append(whole[-1] - products)
    # What is off by a tenth of a short batch counts as much as a tenth of a long one.
    each = not_negative(np.array(counts) / np.array(whole)[:, None], np.array(seconds) / np.array(whole))
    found = dict(zip(("step_seconds", "row_seconds", "request_seconds"), map(float, each), strict=False))
    return found | ({"cache_rate": 1 / float(each[3])} if each[3] else {})


def not_negative(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """The costs [m], none below zero, with which counts [n, m] come nearest to the seconds [n]."""
    best, least = np.zeros(counts.shape[1]), np.inf
    for chosen in range(1, 2 ** counts.shape[1]):
        columns = [one for one in range(counts.shape[1]) if chosen >> one & 1]
        found = np.linalg.lstsq(counts[:, columns], seconds, rcond=None)[0]
        error = float(np.square(counts[:, columns] @ found - seconds).sum())
        if (found >= 0).all() and error < least:
            best, least = np.zeros(counts.shape[1]), error
            best[columns] = found
    return best


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
