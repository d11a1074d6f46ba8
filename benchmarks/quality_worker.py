"""One contestant of `time_to_quality.py`: trains for a given time and says how well it reads unseen text."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import torch


def windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """Rows of `context` + 1 tokens that overlap by one: each token but the first is predicted once."""
    count = (len(tokens) - 1) // context
    return np.stack([tokens[i * context : i * context + context + 1] for i in range(count)])


class Texts:
    """Shuffled training windows, one pass after another, and the unseen windows."""

    def __init__(self, path: str, context: int) -> None:
        content = np.load(path)
        self.train = windows(content["train"], context)
        self.unseen = windows(content["unseen"], context)
        self.bytes = float(content["byte_lengths"][self.unseen[:, 1:]].sum())
        self.random = np.random.default_rng(0)
        self.order: list[int] = []

    def rows(self, count: int) -> np.ndarray:
        """The next rows in the shuffled order."""
        while len(self.order) < count:
            self.order += self.random.permutation(len(self.train)).tolist()
        drawn, self.order = self.order[:count], self.order[count:]
        return self.train[drawn].astype(np.int64)

    def bits_per_byte(self, loss_sum: Callable[[np.ndarray], float]) -> float:
        """The summed loss of all unseen windows, in bits, per byte of the text they predict."""
        total = sum(loss_sum(rows.astype(np.int64)) for rows in np.array_split(self.unseen, 32))
        return total / math.log(2) / self.bytes


def transformers_contestant(texts: Texts, shape: dict, seconds: float, rate: float) -> tuple[float, int]:
    """transformers' Llama with AdamW: five per cent of warm-up, then a cosine to a tenth, by the clock."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape["vocabulary"], hidden_size=shape["width"], intermediate_size=shape["inner"],
            num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
            num_key_value_heads=shape["heads"], max_position_embeddings=shape["context"],
            tie_word_embeddings=False, attn_implementation="sdpa", use_cache=False,
        )
    )  # fmt: skip
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    spent, tokens = 0.0, 0
    while spent < seconds:
        rows = torch.from_numpy(texts.rows(shape["rows"]))
        start = time.perf_counter()
        done = spent / seconds
        factor = max(done, 0.01) / 0.05 if done < 0.05 else 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for group in optimiser.param_groups:
            group["lr"] = rate * factor
        for piece in rows.split(shape["micro"]):
            logits = model(input_ids=piece[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())
            (loss * len(piece) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        spent += time.perf_counter() - start
        tokens += rows[:, 1:].numel()

    @torch.no_grad()
    def loss_sum(rows: np.ndarray) -> float:
        ids = torch.from_numpy(rows)
        logits = model(input_ids=ids[:, :-1]).logits
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        )

    return texts.bits_per_byte(loss_sum), tokens


def trivium_contestant(texts: Texts, shape: dict, seconds: float, precision: str) -> tuple[float, int]:
    """Trivium's trainer with what its preset suggests for the tokens there is time for."""
    from trivium_contestant import GivenRows, rows_of, trainer_of

    from trivium.learn.precision import products
    from trivium.learn.settings import Training
    from trivium.learn.validation import measure
    from trivium.model.preset import preset

    class Clocked(GivenRows):
        """A batch source that ends when the time does, so that the schedule follows the clock."""

        @property
        def steps(self) -> int:  # type: ignore[override]
            return max(trainer.step + 1, round(trainer.step * seconds / spent)) if spent else 1_000_000

    spent = 0.0
    batches = Clocked()
    settings = Training(tokens=1, compile="off", precision=precision)  # type: ignore[arg-type]
    trainer = trainer_of(shape, batches, settings)
    suggested = preset(
        shape["layers"], shape["vocabulary"], shape["context"], width=shape["width"],
        token_budget=int(shape["tokens_per_second"] * seconds),
    )  # fmt: skip
    rows_per_step = suggested.values["batch_tokens"] // shape["context"]
    with products(settings.precision, trainer.model.device):
        while spent < seconds:
            batches.given = rows_of(texts.rows(rows_per_step))
            start = time.perf_counter()
            trainer._one_step()
            spent += time.perf_counter() - start
    lengths = np.ones(shape["vocabulary"])

    def loss_sum(rows: np.ndarray) -> float:
        unseen = measure(trainer.model, rows_of(rows, lengths))
        return unseen.loss * unseen.tokens

    return texts.bits_per_byte(loss_sum), trainer.tokens


def main() -> None:
    arguments = json.loads(sys.argv[1])
    shape = arguments["shape"]
    torch.manual_seed(0)
    torch.set_num_threads(arguments["threads"])
    texts = Texts(arguments["texts"], shape["context"])
    print("ANSWER " + json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        seconds = json.loads(line)["seconds"]
        if arguments["contestant"] == "transformers":
            bits, tokens = transformers_contestant(texts, shape, seconds, arguments["rate"])
        else:
            bits, tokens = trivium_contestant(texts, shape, seconds, arguments["precision"])
        print("ANSWER " + json.dumps({"bits_per_byte": bits, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
