"""Fifty steps that must not change unless somebody means them to.

The numbers are keyed by what decides the last bits: the processor's vendor, family and model, the kernels
chosen on it, threads, torch's version. Where the key is known the losses must be equal; elsewhere they must
agree with every known key to 1e-4.
To write them anew on purpose: `python tests/test_golden.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SmallBatches, small_trainer

from trivium.kit.files import write_json
from trivium.kit.kernels import kernels
from trivium.kit.metrics import read_metrics

FILE = Path(__file__).parent / "golden" / "pretrain.json"
STEPS = 50


def trained(folder: Path) -> list[float]:
    """The losses of fifty steps from the seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        small_trainer(
            folder, batches=SmallBatches(STEPS), learning_rate={"warmup": 5, "decay": "cosine"}
        ).run()
    finally:
        torch.set_num_threads(threads)
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]


def one_thread_key() -> str:
    """What decides the last bits of a sum on this machine with one thread."""
    return str(replace(kernels(), threads=1, torch=torch.__version__.partition("+")[0]))


def test_fifty_steps_are_the_golden_ones(tmp_path: Path) -> None:
    known = json.loads(FILE.read_text())
    losses = trained(tmp_path)
    assert len(losses) == STEPS
    if one_thread_key() in known:
        assert losses == known[one_thread_key()]
    for name, expected in known.items():
        assert losses == pytest.approx(expected, abs=1e-4), name


if __name__ == "__main__":
    golden = json.loads(FILE.read_text()) if FILE.exists() and "--all" not in sys.argv else {}
    with tempfile.TemporaryDirectory() as where:
        golden[one_thread_key()] = trained(Path(where))
    write_json(FILE, golden)
    print(f"wrote {FILE} for {one_thread_key()}")
