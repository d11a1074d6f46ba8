"""One row of `gpu.py` in a process of its own: what it allocates, or breaks, ends with it.

Every figure is printed as soon as it is known, so that a row that runs out of time keeps those it has.
"""

from __future__ import annotations

import gc
import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trivium_contestant import GivenRows

from trivium.data.rows import PackedSequence, row_of_documents
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import Training
from trivium.learn.trainer import Trainer
from trivium.model.config import ModelConfig
from trivium.model.folder import save_model
from trivium.model.initialise import build
from trivium.model.transformer import Transformer
from trivium.tokens.train import train_tokenizer

Shape = dict[str, int]
RATE = 1e-4


def answer(name: str, **figures: Any) -> None:
    """Say what was measured."""
    print("ANSWER " + json.dumps({"name": name, **figures}), flush=True)


def settle(device: str) -> None:
    """Wait until the device has done all that was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def contestant(name: str, device: str) -> Iterator[dict[str, Any]]:
    """One contestant's turn: its figures, the most memory it held, or what went wrong; then all is freed."""
    figures: dict[str, Any] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    try:
        yield figures
        settle(device)
        if device == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    except ImportError as error:
        figures["failed"] = f"{error.name or error} is not installed"
    except Exception as error:
        figures["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[
            :160
        ]
    answer(name, **figures)
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()


def config_of(shape: Shape) -> ModelConfig:
    """A Llama of this shape."""
    return ModelConfig(
        family="llama", vocabulary=shape["vocabulary"], width=shape["width"], layers=shape["layers"],
        heads=shape["heads"], key_value_heads=shape["key_heads"], inner_width=shape["inner"],
        head_width=shape["width"] // shape["heads"], context=shape["context"],
        rope={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip


@torch.no_grad()
def model_of(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """Random weights, drawn where they are used: on a CPU a billion of them take longer than the row."""
    model = build(config_of(shape), dtype=dtype, device=device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0)
    return model


def peer_of(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same Llama in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["key_heads"], max_position_embeddings=shape["context"],
        attn_implementation="sdpa", dtype=dtype,
    )  # fmt: skip
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype)


# training


def documents(shape: Shape, tokens: int, typical: int | None) -> list[PackedSequence]:
    """Rows as long as the context: one document each, or many of about `typical` tokens."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(max(1, tokens // shape["context"])):
        left, lengths = shape["context"], []
        while left:
            size = left if typical is None else min(left, int(random.lognormal(np.log(typical), 0.8)) + 1)
            lengths.append(size)
            left -= size
        rows.append(row_of_documents([random.integers(0, shape["vocabulary"], size) for size in lengths]))
    return rows


def speed(step: Callable[[], None], tokens: int, seconds: float, device: str) -> float:
    """Tokens a second over whole steps, after two that compile, allocate and choose kernels."""
    for _ in range(2):
        step()
    settle(device)
    done, start = 0, time.perf_counter()
    while done < 2 or time.perf_counter() - start < seconds:
        step()
        settle(device)
        done += 1
    return done * tokens / (time.perf_counter() - start)


def train(asked: dict[str, Any]) -> None:
    """Tokens a second and peak memory of Trivium's own trainer and of a plain loop around transformers."""
    shape, device, tokens = asked["shape"], asked["device"], asked["tokens"]
    for name in asked["contestants"]:
        with contestant(name, device) as figures:
            kind, *how = name.split()
            rows = documents(shape, tokens, asked.get("documents"))
            step = (trivium_step if kind == "Trivium" else peer_step)(asked, how, rows)
            started = time.perf_counter()
            figures["tokens_per_second"] = speed(step, tokens, asked["seconds"], device)
            figures["whole_seconds"] = time.perf_counter() - started
            del step


def trivium_step(asked: dict[str, Any], how: list[str], rows: list[PackedSequence]) -> Callable[[], None]:
    """A step of the one loop that every recipe runs."""
    folder = Path(tempfile.mkdtemp())
    batches = GivenRows()
    batches.given = rows
    trainer = Trainer(
        model=model_of(asked["shape"], asked["device"]), objective=NextToken(), batches=batches,
        settings=Training(
            steps=batches.steps, optimiser="muon" if "Muon" in how else "adamw",
            compile="on" if "compiled" in how else "off",
            micro_batch="auto" if "sized" in how else asked["pass"],
            precision="float8" if "float8" in how else "bfloat16" if asked["device"] == "cuda" else "auto",
            learning_rate={"decay": "constant"},
        ),
        rates=LearningRates(RATE, RATE, RATE, RATE), folder=folder, log=MetricsLog(folder / "metrics.jsonl"),
        progress=Progress("", io.StringIO()),
    )  # fmt: skip
    trainer.make_ready()
    return lambda: trainer._after_step(trainer._one_step(), 0)


def peer_step(asked: dict[str, Any], how: list[str], rows: list[PackedSequence]) -> Callable[[], None]:
    """A step as a person writes it around transformers: autocast, accumulation, clipping, fused AdamW."""
    shape, device = asked["shape"], asked["device"]
    model = peer_of(shape, device)
    forward = torch.compile(model) if "compiled" in how else model
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)
    ids = torch.stack([torch.from_numpy(row.tokens) for row in rows]).to(device)
    # Its loss holds all scores of a pass in float32, so a pass is smaller than Trivium's.
    at_once = max(1, min(asked["pass"], asked["peer_pass"]) // shape["context"])

    def step() -> None:
        for some in ids.split(at_once):
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                loss = forward(input_ids=some, labels=some).loss * (len(some) / len(ids))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


# decoding


def half(device: str) -> torch.dtype:
    return torch.bfloat16 if device == "cuda" else torch.float32


def engine_of(shape: Shape, device: str, rows: int) -> Engine:
    """An engine over random weights; its tokenizer only spells what nobody reads."""
    tokenizer = train_tokenizer(["a town of seven doves and a bell"] * 20, 300)
    model = model_of(shape, device, half(device)).eval()
    return Engine(model, tokenizer, max_rows=rows, compiled=device == "cuda")


def request(shape: Shape, length: int, longest: int, seed: int, **sampling: Any) -> Request:
    ids = torch.randint(10, shape["vocabulary"], (length,), generator=torch.Generator().manual_seed(seed))
    return Request(ids.tolist(), Sampling(max_new_tokens=longest, stop_ids=(), seed=seed, **sampling))


def decode(asked: dict[str, Any]) -> None:
    """New tokens a second with every row in its midst: prompts are read before the clock starts."""
    shape, device, prompt, new = asked["shape"], asked["device"], asked["prompt"], asked["new"]
    for rows in asked["rows"]:
        with contestant(f"Trivium {rows}", device) as figures:
            engine = engine_of(shape, device, rows)
            for seed in range(rows):
                engine.submit(request(shape, prompt, new, seed))
            while engine.counts["generated_tokens"] < 4 * rows:
                engine.step()
            settle(device)
            before, steps = engine.counts["generated_tokens"], engine.counts["steps"]
            start = time.perf_counter()
            while engine.counts["generated_tokens"] < (new - 2) * rows and (
                time.perf_counter() - start < asked["seconds"]
            ):
                engine.step()
            settle(device)
            spent = time.perf_counter() - start
            figures["tokens_per_second"] = (engine.counts["generated_tokens"] - before) / spent
            figures["step_ms"] = 1000 * spent / (engine.counts["steps"] - steps)
            del engine
    for rows in asked["rows"]:
        with contestant(f"transformers {rows}", device) as figures:
            model = peer_of(shape, device, half(device)).eval()
            ids = torch.randint(10, shape["vocabulary"], (rows, prompt), device=device)
            short, long = 4, max(8, min(new, asked["peer_new"]))
            seconds = []
            for count in (short, short, long):
                settle(device)
                start = time.perf_counter()
                model.generate(
                    ids, min_new_tokens=count, max_new_tokens=count, do_sample=True, pad_token_id=0
                )
                settle(device)
                seconds.append(time.perf_counter() - start)
            figures["tokens_per_second"] = rows * (long - short) / (seconds[2] - seconds[1])
            del model


def mixed(asked: dict[str, Any]) -> None:
    """Requests of many lengths at once: tokens asked for a second, the reading of prompts included."""
    shape, device = asked["shape"], asked["device"]
    random = np.random.default_rng(0)
    prompts = random.integers(*asked["prompts"], asked["requests"]).tolist()
    wanted = random.integers(*asked["answers"], asked["requests"]).tolist()
    with contestant("Trivium", device) as figures:
        engine = engine_of(shape, device, asked["requests"])
        engine.generate([request(shape, 20, 4, 0)])
        requests = [
            request(shape, *pair, seed) for seed, pair in enumerate(zip(prompts, wanted, strict=True))
        ]
        settle(device)
        start = time.perf_counter()
        engine.generate(requests)
        settle(device)
        figures["tokens_per_second"] = sum(wanted) / (time.perf_counter() - start)
        del engine
    with contestant("transformers", device) as figures:
        model = peer_of(shape, device, half(device)).eval()
        longest, most = max(prompts), max(wanted)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(prompts):
            ids[row, longest - length :] = torch.randint(10, shape["vocabulary"], (length,), device=device)
            mask[row, longest - length :] = 1
        settle(device)
        start = time.perf_counter()
        model.generate(ids, attention_mask=mask, min_new_tokens=most, max_new_tokens=most, pad_token_id=0)
        settle(device)
        figures["tokens_per_second"] = sum(wanted) / (time.perf_counter() - start)
        del model


def first_token(asked: dict[str, Any]) -> None:
    """From a request to its first token, the median of five."""
    shape, device = asked["shape"], asked["device"]
    with contestant("Trivium", device) as figures:
        engine = engine_of(shape, device, 4)
        times = []
        for seed in range(6):
            settle(device)
            start = time.perf_counter()
            engine.generate([request(shape, asked["prompt"], 1, seed)])
            settle(device)
            times.append(1000 * (time.perf_counter() - start))
        figures["ms"] = float(np.median(times[1:]))
        del engine


def greedy(asked: dict[str, Any]) -> None:
    """Whether greedy texts in float32 are transformers', token for token."""
    from transformers import AutoModelForCausalLM

    shape, device, new = asked["shape"], asked["device"], asked["new"]
    with contestant("Trivium", device) as figures, tempfile.TemporaryDirectory() as folder:
        model = model_of(shape, device)
        save_model(model, Path(folder))
        tokenizer = train_tokenizer(["a town of seven doves and a bell"] * 20, 300)
        engine = Engine(model.eval(), tokenizer, max_rows=8, dtype=torch.float32)
        requests = [request(shape, length, new, length, temperature=0) for length in (7, 40, 100)]
        found = [one.tokens for (one,) in engine.generate(requests)]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        same = 0
        for asked_for, tokens in zip(requests, found, strict=True):
            ids = torch.tensor([list(asked_for.prompt)], device=device)
            out = theirs.generate(
                ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
            same += out[0, ids.shape[1] :].tolist() == tokens
        figures["equal"], figures["of"] = same, len(found)


KINDS = {"train": train, "decode": decode, "mixed": mixed, "first_token": first_token, "greedy": greedy}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    KINDS[asked["kind"]](asked)
