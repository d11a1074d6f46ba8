"""`parallel: auto`: what several processes are given by the planner's memory, and that they keep it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from trivium.lab.planner.catalogue import Machine, shared
from trivium.lab.planner.estimate import estimate
from trivium.lab.planner.work import Job, Phase
from trivium.learn.settings import Parallel
from trivium.model.config import ModelConfig
from trivium.model.flops import parameter_count
from trivium.pipeline.layouts import Chosen, _chosen
from trivium.pipeline.run import _layout

CONFIG = ModelConfig(
    vocabulary=32000, width=4096, layers=32, heads=32, key_value_heads=8, head_width=128, inner_width=11008,
    context=2048, family="llama",
)  # fmt: skip
WEIGHTS = float(parameter_count(CONFIG))
JOB = Job(
    "base", "pretrain", phases=(Phase("training", 1e9, 2048, 1e9, 1.0),), config=CONFIG, tokens=1e9,
    steps=1000.0, batch=1e6, context=2048, trained_parameters=WEIGHTS, optimiser="adamw",
)  # fmt: skip


def of(gib: float, devices: int = 8) -> Machine:
    return Machine(
        "here", "some GPU", {"bfloat16": 1e15}, gib * 2**30, 3e12, devices=devices, local=True, node=8
    )  # fmt: skip


def test_whole_copies_are_held_where_they_fit_and_the_reason_is_said() -> None:
    roomy, tight = _chosen(estimate(JOB, of(300))), _chosen(estimate(JOB, of(80)))
    assert roomy.parallel == Parallel(shard=1)
    assert roomy.why.endswith("of 300.0 GiB a process")
    assert tight.parallel.shard != 1 or tight.parallel.tensor > 1
    assert "needs" in tight.why
    assert "of 80.0 GiB a process, a whole copy" in tight.why
    # What is taken fits, by the very memory that whole copies fail by.
    best = estimate(JOB, of(80))
    assert best.fits
    assert tight.parallel.shard == best.layout.shard
    none = _chosen(estimate(JOB, of(4)))
    assert none.why.endswith("nothing fits")


def test_a_processor_is_shared_by_its_processes_and_a_gpu_is_not() -> None:
    gpu = shared(of(80, 1), 8, 4)
    assert (gpu.devices, gpu.node, gpu.memory) == (8, 4, 80 * 2**30)
    processor = replace(of(80, 1), peak={"float32": 1e11})
    four = shared(processor, 4, 2)
    assert (four.devices, four.node, four.memory, four.peak["float32"]) == (4, 2, 40 * 2**30, 5e10)


@pytest.mark.parametrize(
    ("before", "kept"),
    [
        ({}, 4),
        ({"processes": 1, "layout": {"shard": 1}}, 1),
        # Begun by another number of processes, or under what the recipe said then.
        ({"processes": 2, "layout": {"shard": 2}}, 4),
        ({"processes": 1}, 4),
    ],
    ids=str,
)
def test_a_stage_keeps_the_layout_it_was_begun_under(before: dict[str, Any], kept: int) -> None:
    lines: list[str] = []
    node = SimpleNamespace(name="base")
    prepared = SimpleNamespace(layouts={"base": Chosen(Parallel(shard=4), "it fits")})
    record: dict[str, Any] = {}
    found = _layout(prepared, node, before, record, SimpleNamespace(say=lines.append))  # type: ignore[arg-type]
    assert found == record["layout"]
    assert record["layout"]["shard"] == kept
    assert lines == ([] if kept == 1 else ["parallel: shard 4, as it fits"])
    node.name = "another"
    assert _layout(prepared, node, before, record, SimpleNamespace(say=lines.append)) is None  # type: ignore[arg-type]


RECIPE = """
name: open
stages:
  words: {kind: tokenizer, data: ./texts.jsonl, vocabulary: 300}
  corpus: {kind: corpus, data: ./texts.jsonl, tokenizer: words}
  base: {kind: pretrain, data: corpus, model: {depth: 2, width: 64, head_width: 16}, context: 128,
         batch: 512, tokens: 4k, validation: {times: 0}}
  said: {kind: midtrain, from: base, data: corpus, parallel: {shard: 2}, batch: 512, tokens: 2k}
"""


@pytest.mark.slow
def test_processes_agree_on_a_layout_that_is_kept(tmp_path: Path) -> None:
    """Of two processes; a stage that was begun under another layout goes on under it."""
    rows = [{"text": f"{n} the miller counts his bells and the river goes {n}."} for n in range(300)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "open.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def run(*more: str) -> str:
        done = subprocess.run(
            [*command, "-m", "trivium.cli", "run", "open.yaml", *more], cwd=tmp_path, text=True,
            capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    said = run()
    assert "parallel: whole copies, as a whole copy needs" in said
    assert said.count("parallel: ") == 1
    assert "divided among 2 processes" in said
    record = tmp_path / "runs/open/base/stage.yaml"
    kept = yaml.safe_load(record.read_text())
    assert kept["layout"]["shard"] == 1
    assert "layout" not in yaml.safe_load((tmp_path / "runs/open/said/stage.yaml").read_text())
