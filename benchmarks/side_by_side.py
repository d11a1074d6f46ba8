"""`--jobs 2` beside one stage after the other: the wall time of one experiment as a person starts it.

python benchmarks/side_by_side.py             # two arms and two seeds, about two minutes on two cores

Both commands run with one thread a process (OMP_NUM_THREADS=1) and have to come to the same results, bit for
bit; the ratio of their wall times holds imports, planning, the stages all arms share, and the verdicts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from trivium.kit.seals import read_seal
from trivium.pipeline.store import Store

EXPERIMENT = """\
name: seeds
stages:
  words: {kind: tokenizer, data: [{path: world:prose, limit: 200}], vocabulary: 512}
  corpus: {kind: corpus, data: [{path: world:prose, limit: 400}], tokenizer: words, validation: 0.1}
  base: {kind: pretrain, data: corpus, model: {depth: 4, width: 256}, context: 128, batch: 2048, steps: STEPS}
experiment:
  seeds: 2
  arms: {slow: {base: {learning_rate: 0.0001}}, fast: {}}
  measure: {loss: {stage: base, take: loss}}
  claims: [{says: Fast is better, on: loss, arm: fast, against: slow, below: 0, control: slow}]
"""


def seconds(recipe: Path, runs: Path, *more: str) -> float:
    """How long `trivium run` takes from its start to its end."""
    words = [sys.executable, "-m", "trivium.cli", "run", str(recipe), "--runs", str(runs), *more]
    start = time.monotonic()
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - start


def results(runs: Path) -> dict[str, str]:
    """The checksum of what every stage came to."""
    entries = Store(runs).recipes()["seeds"]
    return {stage: read_seal(entry.folder)["result"] for stage, entry in entries.items()}


def main() -> None:
    """Run both in turns and print the ratio."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--steps", type=int, default=30, help="of each of the four trainings")
    options.add_argument("--rounds", type=int, default=1)
    chosen = options.parse_args()
    ratios = []
    for number in range(chosen.rounds):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            recipe = place / "seeds.yaml"
            recipe.write_text(EXPERIMENT.replace("STEPS", str(chosen.steps)))
            serial = seconds(recipe, place / "serial")
            beside = seconds(recipe, place / "beside", "--jobs", "2")
            assert results(place / "serial") == results(place / "beside"), "the results differ"
            at_work = sum(entry.record["seconds"] for entry in Store(place / "serial").entries())
        ratios.append(beside / serial)
        print(
            f"round {number + 1}: one after the other {serial:.1f} s (stages {at_work:.1f} s),"
            f" --jobs 2 {beside:.1f} s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"median ratio {statistics.median(ratios):.3f}; all results equal bit for bit")


if __name__ == "__main__":
    main()
