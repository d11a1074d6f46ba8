"""Rollouts per second, generation and training together: Trivium beside TRL's GRPOTrainer, in turns.

python benchmarks/rl.py                  # medians of 3 turns; fixed 64 tokens, and answers that end early
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

from peers import Worker, take_turns

SHAPE = {"layers": 4, "width": 256, "heads": 4, "inner": 768, "vocabulary": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64], help="TRL's sizes of a pass")
    wishes = parser.parse_args()
    print(f"shape {SHAPE}; 64 answers a step in groups of 8; AdamW; medians of {wishes.rounds}")
    for early in (False, True):
        shared = {
            "shape": SHAPE, "answers": 64, "group": 8, "longest": 64, "early": early,
            "threads": wishes.threads,
        }  # fmt: skip
        contestants = [("Trivium", 64), *(("TRL", batch) for batch in wishes.batches)]
        workers = {
            name if name == "Trivium" else f"{name}, {batch} a pass": Worker(
                sys.executable, "rl_worker.py", {**shared, "contestant": name, "batch": batch}
            )
            for name, batch in contestants
        }
        answers = take_turns(workers, wishes.rounds, steps=wishes.steps)
        speeds = {
            name: statistics.median(row["rollouts_per_second"] for row in rows)
            for name, rows in answers.items()
        }
        peer = max(speed for name, speed in speeds.items() if name != "Trivium")
        print("answers of 4 to 64 tokens" if early else "answers of 64 tokens")
        for name, speed in speeds.items():
            length = statistics.mean(row["mean_length"] for row in answers[name])
            print(
                f"  {name:16s} {speed:8.1f} rollouts/s  x{speed / peer:.2f} of TRL at its best  "
                f"mean length {length:5.1f}  {answers[name][-1]['peak_mib']:6.0f} MiB peak"
            )
            workers[name].close()


if __name__ == "__main__":
    main()
