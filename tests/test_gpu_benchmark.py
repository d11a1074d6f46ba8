"""The GPU benchmark's own arithmetic, and what it says where there is no GPU; its rows run in `--tiny`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

PLACE = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PLACE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("how", [["eager"], ["eager", "Muon"], ["eager", "float8"]])
def test_a_step_of_the_rows_that_train_and_of_the_benchmark_beside_litgpt(
    monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    """Both drive the trainer itself, and fail where it asks more of a source of batches than they give."""
    monkeypatch.syspath_prepend(str(PLACE.parent))
    from gpu_worker import documents, trivium_step
    from pretrain_worker import random_tokens
    from trivium_contestant import trainer_step

    shape = {
        "layers": 1,
        "width": 32,
        "heads": 2,
        "key_heads": 2,
        "inner": 64,
        "vocabulary": 64,
        "context": 32,
        "rows": 2,
    }
    rows = documents(shape, 64, None)
    trivium_step({"shape": shape, "device": "cpu", "pass": 64}, how, rows)()
    trainer_step(shape, False, "muon" if "Muon" in how else "adamw", 1e-3, 0.1, random_tokens)(0, 2)


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_ends(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(PLACE), "--to", str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "benchmarks/gpu.py: this machine has no CUDA device; add --tiny --device cpu to try the code."
    )
    assert list(tmp_path.iterdir()) == []


def test_without_a_gpu_the_table_says_that_nothing_was_measured(gpu: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--list"])
    said: list[str] = []
    assert gpu.main(said.append) == 0
    lines = said[0].splitlines()[2:]
    assert len(lines) == len(gpu.every_row(False))
    assert all("not measured: no GPU was at hand" in line for line in lines)
    kept = (PLACE.parent / "results" / "gpu.md").read_text(encoding="utf-8")
    assert said[0] in kept, "benchmarks/results/gpu.md: the rows have changed; run gpu.py --list again"


def test_toy_rows_are_the_real_rows(gpu: ModuleType) -> None:
    real, toy = gpu.every_row(False), gpu.every_row(True)
    assert [(row.name, row.job, row.script) for row in real] == [
        (row.name, row.job, row.script) for row in toy
    ]
    assert len({row.name for row in real}) == len(real)
    assert all((PLACE.parent / row.script).is_file() for row in real)
    assert gpu.LIMIT < 9 * 60


@pytest.mark.parametrize(("name", "matrices", "attention"), [("124M", 0.66, 0.11), ("350M", 2.05, 0.30)])
def test_operations_of_a_token(gpu: ModuleType, name: str, matrices: float, attention: float) -> None:
    """In GFLOP, six for each weight of a matrix; the causal half of attention is counted once or twice."""
    causal, whole = gpu.flops_per_token(gpu.shape_of(name, 2048, False), 2048)
    assert causal / 1e9 == pytest.approx(matrices + attention, abs=0.01)
    assert whole / 1e9 == pytest.approx(matrices + 2 * attention, abs=0.02)


def test_a_row_cut_short_keeps_what_it_had_measured(gpu: ModuleType, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    (tmp_path / "slow.py").write_text(
        "import time\n"
        "print('ANSWER {\"name\": \"Trivium\", \"tokens_per_second\": 1234.5}', flush=True)\n"
        "time.sleep(600)\n"
    )  # fmt: skip
    (tmp_path / "broken.py").write_text("raise MemoryError('all of it')\n")
    late = gpu.run(gpu.Row("a", "job", "slow.py", {}, 0), "cpu", 1, 3.0)
    assert [one["tokens_per_second"] for one in late.answers] == [1234.5]
    assert late.trouble == "not done within 3 s"
    broken = gpu.run(gpu.Row("b", "job", "broken.py", {}, 0, contestant="TRL"), "cpu", 1, 30.0)
    assert (broken.answers, broken.trouble) == ([], "MemoryError: all of it")
    lines = "\n".join(gpu.table([late, broken], None))
    assert "| job | Trivium | 1,234 | tokens per second |" in lines
    assert "| job | TRL | not measured: MemoryError: all of it |" in lines
