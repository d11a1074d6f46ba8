"""What this machine can do, measured, and what a run would use of it."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from trivium import __version__
from trivium.generate.exactness import BIT_EXACT, typical
from trivium.grade.sandbox.client import sandbox
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.kernels import kernels
from trivium.kit.numbers import short

_EXTRAS = {
    "serve": "fastapi",
    "hub": "datasets",
    "eval": "lm_eval",
    "quant": "torchao",
    "structured": "llguidance",
}


def rows(runs: str | Path) -> list[list[str]]:
    """A table of what is here."""
    here = machine.describe()
    place = Path(runs).absolute()
    while not place.exists():
        place = place.parent
    there = [name for name, module in _EXTRAS.items() if find_spec(module)]
    absent = [name for name in _EXTRAS if name not in there]
    table = [
        ["trivium", f"{__version__} with torch {here.torch}, Python {here.python}"],
        ["system", here.system],
        ["processor", f"{here.cores} cores ({here.threads} threads used), {here.cpu}"],
        ["memory", f"{here.memory / 2**30:.1f} GiB"],
        ["computes on", f"{here.device} ({here.device_name}), in {here.dtype}"],
        ["kernels", str(kernels())],
        ["generation", _promise()],
        ["matrix peak", f"{short(machine.matmul_peak())}FLOP/s"],
        ["memory bandwidth", f"{short(machine.memory_bandwidth())}B/s"],
        ["disk", f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free under {place}"],
        ["sandbox", _sandbox()],
        ["extras", ", ".join(there) or "none"],
    ]
    if absent:
        table.append(["not installed", f"{', '.join(absent)} (pip install 'trivium[{','.join(absent)}]')"])
    return table


def _promise() -> str:
    """What holds of a small model's answer whatever else is in the batch."""
    found = typical()
    if found.promise != BIT_EXACT:
        return f"{found.promise}, alone or among other requests"
    alone = [
        name for name, alike in (("prompts", found.prompts), ("generating rows", found.steps)) if not alike
    ]
    how = f"; attention over {' and '.join(alone)} one by one" if alone else ""
    return f"{found.promise}, alone or among other requests (products of {found.rows} rows{how})"


def _sandbox() -> str:
    """The layers that isolate a program here, or why none can."""
    try:
        return sandbox().described
    except TriviumError as error:
        return str(error)
