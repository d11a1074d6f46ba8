"""Training speed and memory of one small shape: Trivium beside LitGPT and transformers, in turns, in one run.

python benchmarks/pretrain.py            # uncompiled and compiled, medians of 5 turns each
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

from peers import Worker, peer_python, take_turns

from trivium.learn.trainer import CPU_TOKENS

SHAPE = {"layers": 4, "width": 256, "heads": 4, "inner": 768, "vocabulary": 4096, "context": 256, "rows": 16}


def contest(compiled: bool, rounds: int, steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Every contestant's medians for one setting of compilation."""
    peers = peer_python("litgpt", "transformers")
    workers = {}
    for name, python, optimiser in [
        ("trivium", sys.executable, "adamw"),
        ("trivium, default optimiser", sys.executable, "muon"),
        ("litgpt", peers, "adamw"),
        ("transformers", peers, "adamw"),
    ]:
        arguments = {
            "contestant": name.split(",")[0], "compiled": compiled, "optimiser": optimiser,
            "shape": SHAPE, "threads": threads, "micro": SHAPE["rows"],
        }  # fmt: skip
        if name.startswith("trivium"):
            # What a person gets who sets nothing.
            arguments["micro"] = CPU_TOKENS // SHAPE["context"]
        elif not compiled:
            # Sizes are tried in a process of their own, so that the largest does not count as memory used;
            # a compiled contestant would compile anew for every size, so it runs all rows in one pass.
            tuning = Worker(python, "pretrain_worker.py", {**arguments, "micro": None})
            arguments["micro"] = tuning.ready["micro"]
            tuning.close()
        workers[name] = Worker(python, "pretrain_worker.py", arguments)
    answers = take_turns(workers, rounds, steps=steps)
    medians = {}
    for name, rows in answers.items():
        medians[name] = {
            "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows),
            "peak_mib": rows[-1]["peak_mib"],
            "ready_seconds": workers[name].ready["ready"],
            "micro": workers[name].ready["micro"],
        }
        workers[name].close()
    return medians


def training_flops_per_token() -> float:
    """Six times the matrix parameters, plus attention's scores and values, forward and backward."""
    width, inner, layers = SHAPE["width"], SHAPE["inner"], SHAPE["layers"]
    matrices = layers * (4 * width * width + 3 * width * inner) + SHAPE["vocabulary"] * width
    attention = layers * 2 * width * SHAPE["context"] // 2
    return 6 * (matrices + attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=["uncompiled", "compiled"])
    arguments = parser.parse_args()

    from trivium.kit.machine import matmul_peak

    peak = matmul_peak()
    print(f"matmul peak of this machine: {peak / 1e9:.0f} GFLOP/s; shape {SHAPE}; AdamW unless said")
    for compiled in [False, True]:
        title = "compiled" if compiled else "uncompiled"
        if arguments.only not in (None, title):
            continue
        medians = contest(compiled, arguments.rounds, arguments.steps, arguments.threads)
        peers = [medians["litgpt"], medians["transformers"]]
        fastest = max(row["tokens_per_second"] for row in peers)
        smallest = min(row["peak_mib"] for row in peers)
        print(f"\n{title}, medians of {arguments.rounds}")
        for name, row in medians.items():
            speed, memory = row["tokens_per_second"], row["peak_mib"]
            print(
                f"  {name:28s} {speed:8.0f} tokens/s  x{speed / fastest:.2f} of the faster peer  "
                f"{speed * training_flops_per_token() / peak:5.1%} of peak  {memory:6.0f} MiB peak "
                f"(x{memory / smallest:.2f} of the smaller peer)  ready after {row['ready_seconds']:.0f} s  "
                f"{row['micro']} rows a pass"
            )


if __name__ == "__main__":
    main()
