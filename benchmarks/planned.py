"""What `trivium plan` expects of every kind of stage against what it takes here, after `doctor`.

    python benchmarks/planned.py                      # about 5 minutes on two quiet cores
    python benchmarks/planned.py --processor-time     # one thread on a machine that others use

The recipe is the laptop's road with fewer tokens. It is planned twice: before anything of it exists, and each
stage again when its parents are there. With `--processor-time` all clocks, the doctor's too, count the
processor seconds of this process and not what others take of the cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

RECIPE = """
name: planned
seed: 1
stages:
  words:
    {kind: tokenizer, vocabulary: 2048, data: [{path: world:prose, limit: 2k}, {path: world:facts, limit: 4k},
     {path: world:sums, limit: 1k}, {path: "world:chronicle?characters=700", limit: 500}]}
  corpus:
    {kind: corpus, tokenizer: words, data: [{path: world:prose, limit: 2k}, {path: world:facts, limit: 4k},
     {path: world:sums, limit: 2k}]}
  base:
    {kind: pretrain, data: corpus, model: {depth: 4, width: 128, head_width: 32}, context: 256, batch: 4k,
     tokens: 300k, learning_rate: {decay: wsd}}
  mid:
    kind: midtrain
    from: base
    data:
      "world:tongue?facts_share=0.7&parallel_share=0.2": {limit: 2k, weight: 0.6}
      world:craft: {limit: 1k, weight: 0.4}
    replay: 0.4
    batch: 4k
    tokens: 150k
    learning_rate: {from: 0.02, decay: linear}
  long:
    kind: midtrain
    from: mid
    data: {"world:chronicle?kind=passkey&characters=4100": {limit: 500}}
    replay: 0.4
    context: {length: 1024, method: yarn}
    batch: 4k
    tokens: 120k
    learning_rate: {from: 0.01, decay: linear}
  sft:
    kind: sft
    from: long
    data:
      world:chat: {limit: 3k, weight: 0.4}
      "world:sums?form=chat&steps_low=2&steps_high=3&largest=12": {limit: 4k, weight: 0.6}
    replay: {share: 0.2, data: {world:facts: {limit: 2k}}}
    tokens: 500k
    batch: 4k
    optimiser: muon
    learning_rate: 0.02
  dpo:
    kind: preference
    from: sft
    data: {"world:taste?people=40&taught=true&sums=0&cause=plain": {limit: 800, validation: 0.1}}
    learning_rate: 1e-4
  judge:
    kind: reward
    from: sft
    data: {"world:taste?people=40&taught=true&sums=0&cause=plain": {limit: 800, validation: 0.1}}
  wins:
    kind: compare
    from: dpo
    against: sft
    data: {"world:taste?people=40&taught=true&sums=0&form=prompt&split=test&cause=plain": {limit: 150}}
    judge: [{name: instructions, partial: true}]
    max_new_tokens: 40
  rl:
    kind: rlvr
    from: sft
    data: {"world:sums?form=prompt&steps_low=2&steps_high=3&largest=12": {limit: 2k}}
    reward: [math]
    algorithm: dapo
    steps: 12
    prompts_per_step: 32
    num_generations: 8
    max_new_tokens: 48
    optimiser: muon
    learning_rate: 0.005
  sums:
    {kind: evaluate, from: rl, on: [{task: sums, steps_low: 2, steps_high: 3, largest: 12, samples: 8}]}
"""
PROCESSOR_TIME = "PLANNED_PROCESSOR_TIME"
NAMES = ("seconds", "memory_bytes", "flops", "tokens")


def main() -> None:
    """Measure the machine, plan, run stage by stage, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, help="keep the results here; else nothing is kept")
    parser.add_argument("--to", type=Path, help="write the table as JSON as well")
    parser.add_argument("--only", nargs="*", help="print these stages; what they need is run all the same")
    parser.add_argument("--processor-time", action="store_true")
    chosen = parser.parse_args()
    if chosen.processor_time:
        # Before torch is imported: threads that wait for one another would count twice.
        os.environ["OMP_NUM_THREADS"] = "1"
        os.environ[PROCESSOR_TIME] = "1"
        count_processor_time()
    with tempfile.TemporaryDirectory() as scratch:
        rows = measured(chosen.runs or Path(scratch) / "runs", Path(scratch) / "planned.yaml", chosen.only)
    if chosen.to is not None:
        chosen.to.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    show(rows)


def measured(runs: Path, recipe: Path, only: list[str] | None) -> list[dict[str, Any]]:
    """By stage what was planned at the start, what with its parents there, and what was spent."""
    import trivium

    recipe.write_text(RECIPE, encoding="utf-8")
    # A process of its own measures and plans, as `doctor` and `plan` are: what they leave in memory is no
    # stage's.
    with ProcessPoolExecutor(1, get_context("spawn"), count_processor_time) as beside:
        print(json.dumps(beside.submit(measure_machine, runs).result()), file=sys.stderr)
        before = {one["stage"]: one for one in beside.submit(plan, recipe, runs, only or ()).result()}
        rows = []
        for stage in before:
            planned = beside.submit(plan, recipe, runs, [stage]).result()
            [late] = [one for one in planned if one["stage"] == stage]
            trivium.run(recipe, runs=runs, only=[stage])
            record = _record(runs, stage)
            spent = {
                "seconds": record["seconds"], "memory_bytes": record["peak_memory"], "flops": record["flops"],
                "tokens": (record.get("summary") or {}).get("tokens"),
            }  # fmt: skip
            rows.append({
                "stage": stage, "kind": record["kind"], "spent": spent,
                "before": {name: before[stage][name] for name in NAMES},
                "with parents": {name: late[name] for name in NAMES},
                "phases": late["phases"], "memory": late["memory"],
            })  # fmt: skip
            # What was spent must not teach the plan of the next stage: the doctor's numbers alone are asked.
            _forget(runs)
            print(_line(rows[-1]), flush=True, file=sys.stderr)
    return rows


def measure_machine(runs: Path) -> dict[str, Any]:
    """What `doctor` finds, kept where the plan looks for it."""
    from trivium.pipeline.calibrate import measure
    from trivium.pipeline.measured import keep

    start = time.perf_counter()
    keep(runs / "store", found := measure())
    return found | {"took": time.perf_counter() - start}


def plan(recipe: Path, runs: Path, only: Sequence[str]) -> list[dict[str, Any]]:
    """The plan of every stage that these need."""
    from trivium.pipeline.plan import planned

    return [one.as_json() for one in planned(recipe, runs, only=only).estimates]


def count_processor_time() -> None:
    """Let all clocks of this process count processor seconds, where `--processor-time` is asked for."""
    if os.environ.get(PROCESSOR_TIME):
        time.perf_counter = time.monotonic = time.process_time


def _record(runs: Path, stage: str) -> dict[str, Any]:
    import yaml

    return dict(yaml.safe_load((runs / "planned" / stage / "stage.yaml").read_text(encoding="utf-8")))


def _forget(runs: Path) -> None:
    place = runs / "store" / "machine.json"
    known = json.loads(place.read_text(encoding="utf-8"))
    for device in known.values():
        device.pop("stages", None)
    place.write_text(json.dumps(known), encoding="utf-8")


def _apart(planned: float | None, spent: float | None) -> str:
    return f"{planned / spent - 1:+.0%}" if planned and spent else ""


def _line(row: dict[str, Any]) -> str:
    before, late, spent = row["before"], row["with parents"], row["spent"]
    cells = [f"{row['stage']:>8} {row['kind']:<11}"]
    cells.append(
        f"seconds {before['seconds']:7.1f} {late['seconds']:7.1f} {spent['seconds']:7.1f} "
        f"{_apart(before['seconds'], spent['seconds']):>6} {_apart(late['seconds'], spent['seconds']):>6}"
    )
    cells.append(
        f"MiB {late['memory_bytes'] / 2**20:6.0f} {(spent['memory_bytes'] or 0) / 2**20:6.0f} "
        f"{_apart(late['memory_bytes'], spent['memory_bytes']):>6}"
    )
    cells.append(
        f"GFLOP {late['flops'] / 1e9:8.1f} {spent['flops'] / 1e9:8.1f} "
        f"{_apart(late['flops'], spent['flops']):>6}"
    )
    return " | ".join(cells)


def show(rows: list[dict[str, Any]]) -> None:
    """Planned at the start, planned with the parents there, spent, and how far each plan was off."""
    print("seconds: planned at the start, planned with its parents there, spent, both plans against it")
    print("MiB at peak and GFLOP: planned with its parents there, spent, the plan against it")
    for row in rows:
        print(_line(row))


if __name__ == "__main__":
    main()
