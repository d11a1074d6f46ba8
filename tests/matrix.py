"""The quick tests, in all their cases, under other kernels, threads and versions of torch.

    python tests/matrix.py                      every cell, the quick tests
    python tests/matrix.py mkl-avx2 threads-2   these cells
    python tests/matrix.py --kernels            only the files whose numbers depend on kernels
    python tests/matrix.py --strict             a cell that cannot be made is a failure too

A cell is made of environment variables that make torch's libraries take the kernels they take on other
processors, or of an environment of its own with another torch (kept in `.matrix`). One that cannot be made
here is printed with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
VENVS = ROOT / ".matrix"
SETTINGS = {
    "plain": {},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "aten-avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "mkl-sse4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "onednn-sse4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "threads-2": {"OMP_NUM_THREADS": "2"},
}
CELLS = [*SETTINGS, "torch-oldest", "torch-newest"]
NEEDED = {"aten-avx2": "avx2", "aten-avx512": "avx512f"}
"""What the processor must have: torch takes the kernels it is told to, also where they cannot run."""
KERNELS = (
    "test_generate_*.py",
    "test_golden.py",
    "test_model_[bdv]*.py",
    "test_model_families.py",
    "test_learn_head_loss.py",
    "test_quantize.py",
)


class NotMade(Exception):
    """A cell that this machine cannot have, and why."""


def python_of(cell: str) -> str:
    """The interpreter of a cell."""
    if not cell.startswith("torch-"):
        return sys.executable
    oldest, below = bounds()
    wanted = oldest if cell == "torch-oldest" else below
    if version_of(torch.__version__) == wanted:
        return sys.executable
    name = ".".join(map(str, wanted))
    python = VENVS / f"torch-{name}" / "bin" / "python"
    if not python.exists() or installed(str(python)) != wanted:
        print(f"{cell}: installing torch {name} into {python.parent.parent}", flush=True)
        must([sys.executable, "-m", "venv", str(python.parent.parent)])
        # Each torchao is made for one torch and later ones.
        fitting = [f"torch=={name}.*", *(["torchao<0.18"] if wanted == oldest else [])]
        must([str(python), "-m", "pip", "install", "-q", "-e", f"{ROOT}[dev]", *fitting])
    return str(python)


def bounds() -> tuple[tuple[int, int], tuple[int, int]]:
    """The oldest and the newest minor version of torch that the project allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (wish,) = [one for one in project["dependencies"] if re.match(r"torch\W", one)]
    found = re.fullmatch(r"torch>=(\d+)\.(\d+),<(\d+)\.(\d+)", wish)
    assert found is not None, wish
    low, least, high, below = map(int, found.groups())
    return (low, least), (high, below - 1)


def version_of(text: str) -> tuple[int, int]:
    """`2.13.0+cpu` -> (2, 13)."""
    first, second = text.split(".")[:2]
    return int(first), int(second)


def installed(python: str) -> tuple[int, int] | None:
    """The torch that an interpreter imports, if any."""
    done = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True
    )
    return version_of(done.stdout) if done.returncode == 0 else None


def must(command: list[str]) -> None:
    """Run it, or say that the cell cannot be made."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NotMade((done.stderr or done.stdout).strip().splitlines()[-1])


def check(cell: str) -> None:
    """Refuse kernels that the processor does not have."""
    flag = NEEDED.get(cell)
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return
    if flag is not None and flag not in flags:
        raise NotMade(f"the processor has no {flag}")


def words(cell: str, kernels: bool) -> list[str]:
    """What pytest is told."""
    files = sorted(str(file) for name in KERNELS for file in (ROOT / "tests").glob(name)) if kernels else []
    workers = "1" if cell == "threads-2" else "2"
    return [
        "-m",
        "pytest",
        "-m",
        # Kernels decide numbers, so every case of a test counts here.
        "not slow or quick_cases",
        "-n",
        workers,
        "--dist",
        "loadfile",
        "-p",
        "no:cacheprovider",
        *files,
    ]


def environment_of(cell: str) -> Mapping[str, str]:
    """The variables under which a cell's tests run."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **SETTINGS.get(cell, {})}


FINDING = """
from trivium.generate.exactness import typical
found = typical()
print(f"{found.promise}; rows {found.rows}; prompts {found.prompts}, steps {found.steps}")
"""


def finding(cell: str) -> str:
    """What the engine's probe finds there, for a small model."""
    done = subprocess.run(
        [python_of(cell), "-c", FINDING], cwd=ROOT, env={**environment_of(cell), "TRIVIUM_CACHE": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    return ((done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or [""])[-1]


def run(cell: str, kernels: bool) -> tuple[int, str]:
    """The exit status of a cell's tests, and their last lines."""
    done = subprocess.run(
        [python_of(cell), *words(cell, kernels)], cwd=ROOT, env=environment_of(cell),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout


def main() -> int:
    """Run the cells one after the other; 1 if the tests of one fail."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cells", nargs="*", metavar="CELL", help=", ".join(CELLS))
    parser.add_argument(
        "--kernels", action="store_true", help="only the files whose numbers depend on kernels"
    )
    parser.add_argument("--strict", action="store_true", help="fail where a cell cannot be made")
    asked = parser.parse_args()
    if unknown := [cell for cell in asked.cells if cell not in CELLS]:
        parser.error(f"there is no cell {unknown[0]!r}; there are {', '.join(CELLS)}")
    cells = asked.cells or CELLS
    failed, missing = [], []
    for cell in cells:
        start = time.monotonic()
        try:
            check(cell)
            print(f"{cell:15} {finding(cell)}", flush=True)
            status, said = run(cell, asked.kernels)
        except NotMade as reason:
            missing.append(cell)
            print(f"{cell:15} not made: {reason}", flush=True)
            continue
        lines = said.strip().splitlines() or [""]
        if status:
            failed.append(cell)
            print(said, flush=True)
        print(
            f"{cell:15} {'FAILED' if status else 'passed'} in {time.monotonic() - start:.0f} s: {lines[-1]}",
            flush=True,
        )
    print(f"{len(cells)} cells: {len(failed)} failed, {len(missing)} not made")
    return int(bool(failed or (asked.strict and missing)))


if __name__ == "__main__":
    sys.exit(main())
