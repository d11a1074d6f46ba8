"""Fine-tuning speed in real (non-padding) tokens: Trivium beside TRL's SFTTrainer, in turns.

python benchmarks/sft.py --adapter       # LoRA beside TRL with PEFT
python benchmarks/sft.py                 # medians of 5 turns; TRL at its best of padded, packed, and sizes
python benchmarks/sft.py --adapter --model FOLDER --rounds 3 --steps 2   # a real checkpoint,
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial
from pathlib import Path

from peers import Worker, best_batch, take_turns

SHAPE = {"layers": 4, "width": 256, "heads": 4, "inner": 768, "vocabulary": 512}
BATCHES = {"Trivium": [16, 64], "TRL padded": [8, 16, 32], "TRL packed": [1, 2, 4]}
"""Rows a step: examples for Trivium and padded TRL, packed rows of `longest` tokens for packed TRL."""
REAL_BATCHES = {"Trivium": [16], "TRL padded": [2], "TRL packed": [1]}
"""The same for a real checkpoint, whose steps are of seconds."""


def started(contestant: str, wishes: argparse.Namespace, batch: int) -> Worker:
    """A contestant that waits for its turn."""
    shape = {"folder": str(wishes.model)} if wishes.model else SHAPE
    arguments = {
        "contestant": contestant, "shape": shape, "rows": 400 if wishes.model else 2000, "longest": 1024,
        "batch": batch, "threads": wishes.threads, "adapter": wishes.adapter,
    }  # fmt: skip
    return Worker(sys.executable, "sft_worker.py", arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--adapter", action="store_true", help="LoRA of rank 16 on all linear layers")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder in place of a small random model")
    wishes = parser.parse_args()

    workers = {}
    for contestant, sizes in (REAL_BATCHES if wishes.model else BATCHES).items():
        start = partial(started, contestant, wishes)
        batch = sizes[0]
        if len(sizes) > 1:
            batch = best_batch(sizes, start, "tokens_per_second", steps=wishes.steps)
        workers[f"{contestant}, {batch} rows a step"] = start(batch)
    answers = take_turns(workers, wishes.rounds, steps=wishes.steps)
    speeds = {
        name: statistics.median(row["tokens_per_second"] for row in rows) for name, rows in answers.items()
    }
    peer = max(speed for name, speed in speeds.items() if name.startswith("TRL"))
    kind = "LoRA" if wishes.adapter else "all weights"
    print(
        f"{wishes.model or SHAPE}; prompt-completion rows of uneven length; {kind}; AdamW;"
        f" medians of {wishes.rounds}"
    )
    for name, speed in speeds.items():
        print(
            f"  {name:28s} {speed:8.0f} real tokens/s  x{speed / peer:.2f} of TRL at its best  "
            f"{answers[name][-1]['peak_mib']:6.0f} MiB peak"
        )
        workers[name].close()


if __name__ == "__main__":
    main()
