"""Preference training in pairs a second: Trivium beside TRL's DPOTrainer, in turns.

python benchmarks/dpo.py                 # medians of 5 turns; both at the best of several batch sizes
python benchmarks/dpo.py --adapter       # LoRA beside TRL with PEFT; the adapter off is the reference
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from functools import partial

from peers import Worker, best_batch, take_turns

SHAPE = {"layers": 4, "width": 256, "heads": 4, "inner": 768, "vocabulary": 512}
BATCHES = {"Trivium": [16, 64], "TRL": [4, 8, 16, 32]}
"""Pairs a step."""


def started(contestant: str, wishes: argparse.Namespace, batch: int) -> Worker:
    """A contestant that waits for its turn."""
    arguments = {
        "contestant": contestant, "shape": SHAPE, "pairs": 1000, "batch": batch, "threads": wishes.threads,
        "adapter": wishes.adapter, "stored": wishes.stored,
    }  # fmt: skip
    return Worker(sys.executable, "dpo_worker.py", arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=128, help="pairs per turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--adapter", action="store_true", help="LoRA of rank 16 on all linear layers")
    parser.add_argument("--stored", action="store_true", help="both compute the reference ahead of the time")
    wishes = parser.parse_args()

    workers = {}
    for contestant, sizes in BATCHES.items():
        start = partial(started, contestant, wishes)
        batch = best_batch(sizes, start, "pairs_per_second", pairs=wishes.pairs)
        workers[f"{contestant}, {batch} pairs a step"] = start(batch)
    answers = take_turns(workers, wishes.rounds, pairs=wishes.pairs)
    speeds = {
        name: statistics.median(row["pairs_per_second"] for row in rows) for name, rows in answers.items()
    }
    peer = max(speed for name, speed in speeds.items() if name.startswith("TRL"))
    kind = "LoRA" if wishes.adapter else "all weights"
    beside = "stored ahead of the time" if wishes.stored else "computed in every step"
    print(f"shape {SHAPE}; {kind}; reference {beside}; AdamW; medians of {wishes.rounds}")
    for name, speed in speeds.items():
        print(
            f"  {name:28s} {speed:8.1f} pairs/s  x{speed / peer:.2f} of TRL at its best  "
            f"{answers[name][-1]['peak_mib']:6.0f} MiB peak"
        )
        workers[name].close()


if __name__ == "__main__":
    main()
