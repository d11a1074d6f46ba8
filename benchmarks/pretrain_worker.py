"""One contestant of `pretrain.py`: builds the shared shape in its own library and trains when told to."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

import torch

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1


def random_tokens(shape: dict, rows: int, seed: int) -> torch.Tensor:
    """The same random rows for every contestant: time does not depend on what the tokens say."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, shape["vocabulary"], (rows, shape["context"] + 1), generator=generator)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """The optimiser every contestant uses, in torch's fused form."""
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
    )


def best_micro_batch(step: Callable[[int, int], None], rows: int) -> int:
    """How many rows a pass make this contestant fastest, so no peer runs at its worst."""
    timings = {}
    for micro in [rows, rows // 2, rows // 4, rows // 8]:
        step(0, micro)
        best = float("inf")
        for index in range(2):
            start = time.perf_counter()
            step(index, micro)
            best = min(best, time.perf_counter() - start)
        timings[micro] = best
    return min(timings, key=lambda micro: timings[micro])


def litgpt_step(shape: dict, compiled: bool) -> Callable[[int, int], None]:
    """LitGPT's model with its chunked cross-entropy, in the loop its pre-training script writes."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        name="shape", block_size=shape["context"], n_layer=shape["layers"], n_embd=shape["width"],
        n_head=shape["heads"], n_query_groups=shape["heads"], padded_vocab_size=shape["vocabulary"],
        vocab_size=shape["vocabulary"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=shape["inner"],
    )  # fmt: skip
    model = GPT(config)
    model.max_seq_length = shape["context"]
    optimiser = adamw(model)
    forward = torch.compile(model) if compiled else model

    def step(index: int, micro: int) -> None:
        rows = random_tokens(shape, shape["rows"], index)
        for piece in rows.split(micro):
            logits = forward(piece[:, :-1])
            loss = chunked_cross_entropy(logits, piece[:, 1:].contiguous(), chunk_size=0)
            (loss * len(piece) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def transformers_step(shape: dict, compiled: bool) -> Callable[[int, int], None]:
    """transformers' Llama with SDPA, in the loop its documentation shows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"], max_position_embeddings=shape["context"],
        tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimiser = adamw(model)
    forward = torch.compile(model) if compiled else model

    def step(index: int, micro: int) -> None:
        rows = random_tokens(shape, shape["rows"], index)
        for piece in rows.split(micro):
            logits = forward(input_ids=piece[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().view(-1, shape["vocabulary"]), piece[:, 1:].reshape(-1)
            )
            (loss * len(piece) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def trivium_step(shape: dict, compiled: bool, optimiser: str) -> Callable[[int, int], None]:
    """Trivium's own trainer, step by step, on the same rows."""
    from trivium_contestant import trainer_step

    return trainer_step(shape, compiled, optimiser, LEARNING_RATE, WEIGHT_DECAY, random_tokens)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    shape = arguments["shape"]
    torch.manual_seed(0)
    torch.set_num_threads(arguments["threads"])
    start = time.perf_counter()
    name = arguments["contestant"]
    if name == "litgpt":
        step = litgpt_step(shape, arguments["compiled"])
    elif name == "transformers":
        step = transformers_step(shape, arguments["compiled"])
    else:
        step = trivium_step(shape, arguments["compiled"], arguments["optimiser"])
    micro = arguments["micro"] or best_micro_batch(step, shape["rows"])
    for index in range(3):
        step(index, micro)
    print("ANSWER " + json.dumps({"ready": time.perf_counter() - start, "micro": micro}), flush=True)
    for line in sys.stdin:
        steps = json.loads(line)["steps"]
        start = time.perf_counter()
        for index in range(steps):
            step(index, micro)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        answer = {"tokens_per_second": steps * shape["rows"] * shape["context"] / seconds, "peak_mib": peak}
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
