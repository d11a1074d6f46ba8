"""What this machine can do, measured, and what a run would use of it."""

import re
import shutil
import subprocess
from collections.abc import Collection, Mapping
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import torch

from trivium import __version__
from trivium.generate.exactness import BIT_EXACT, typical
from trivium.grade.sandbox.client import sandbox
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.kernels import kernels
from trivium.kit.numbers import with_unit
from trivium.pipeline.calibrate import measure
from trivium.pipeline.measured import keep

EXTRAS: dict[str, tuple[str, str]] = {
    "serve": ("fastapi", "`trivium serve` and `trivium watch`"),
    "hub": ("datasets", "data sets of the Hugging Face hub as `data`"),
    "eval": ("lm_eval", "tasks of the LM evaluation harness"),
    "quant": ("torchao", "the `quantize` stage, QLoRA, quantised models"),
    "gguf": ("gguf", "GGUF files: reading them, and `trivium export --to gguf`"),
    "structured": ("llguidance", "answers bound to JSON, a regular expression or a grammar"),
    "curate": ("trafilatura", "cleaning web pages in the `curate` stage"),
    "ray": ("ray", "curating on many machines"),
    "pictures": ("PIL", "pictures in the `multimodal` stage and the server"),
    "store": ("fsspec", "a store on S3, GCS or over ssh"),
    "endpoint": ("httpx", "models behind an address in `synthesize` and `evaluate`"),
    "track": ("wandb", "`track: [wandb]` in a recipe"),
}
"""Every extra: a module that tells whether it is there, and what it is for."""
CUDA_INDEX = "https://download.pytorch.org/whl"


def rows(runs: str | Path) -> list[list[str]]:
    """A table of what is here."""
    here = machine.describe()
    place = Path(runs).absolute()
    while not place.exists():
        place = place.parent
    there = [name for name, (module, _) in EXTRAS.items() if find_spec(module)]
    measured = measure()
    keep(Path(runs) / "store", measured)
    table = [
        ["trivium", f"{__version__} with torch {here.torch}, Python {here.python}"],
        ["system", here.system],
        ["processor", f"{here.cores} cores ({here.threads} threads used), {here.cpu}"],
        ["memory", f"{here.memory / 2**30:.1f} GiB"],
        ["computes on", f"{here.device} ({here.device_name}), in {here.dtype}"],
        ["kernels", str(kernels())],
        ["generation", _promise()],
        ["matrix peak", with_unit(measured["peak"], "FLOP/s")],
        ["memory bandwidth", with_unit(measured["bandwidth"], "B/s")],
        ["training", _shares(measured)],
        ["disk", f"{shutil.disk_usage(place).free / 2**30:.1f} GiB free under {place}"],
        ["sandbox", _sandbox()],
        ["extras", ", ".join(there) or "none"],
    ]
    table[5:5] = cuda()
    return [*table, *missing(there)]


def _shares(measured: Mapping[str, float]) -> str:
    """What a training reaches here by the model's width, as a plan will take it."""
    rate = lambda width: measured["ceiling"] * width / (width + measured["half_width"])
    return f"{rate(128):.0%} of the matrix peak at width 128, {rate(1024):.0%} at 1,024"


def missing(there: Collection[str]) -> list[list[str]]:
    """A row for every extra that is not installed: what it is for, and the packages that can be installed."""
    rows = []
    for name, (_, purpose) in EXTRAS.items():
        if name not in there:
            packages = " ".join(f"'{one}'" for one in packages_of(name)) or f"'.[{name}]' in a clone"
            rows.append([f"without {name}", f"for {purpose}: pip install {packages}"])
    return rows


def packages_of(extra: str) -> list[str]:
    """The packages of an extra, as the installed package names them; they install without a clone of it."""
    listed = requires("trivium") or []
    mark = re.compile(rf"""extra\s*==\s*["']{extra}["']""")
    return [one.partition(";")[0].strip() for one in listed if mark.search(one)]


def cuda() -> list[list[str]]:
    """What is known of NVIDIA's side: torch's build, the driver, and the command that makes them fit."""
    built = torch.version.cuda
    rows = [["torch for", f"CUDA {built}" if built else "processors"]]
    asking = shutil.which("nvidia-smi")
    if asking is None:
        return rows
    found = subprocess.run([asking], capture_output=True, text=True, timeout=20, check=False).stdout
    driver = re.search(r"Driver Version: (\S+).*?CUDA Version: (\d+)\.(\d+)", found)
    if driver is None:
        return rows
    version, major, minor = driver[1], int(driver[2]), int(driver[3])
    rows.append(["NVIDIA driver", f"{version}, for CUDA up to {major}.{minor}"])
    if built is None or tuple(map(int, built.split(".")[:2])) > (major, minor):
        suits = "cu130" if major >= 13 else "cu128" if (major, minor) >= (12, 8) else "cu126"
        rows.append(
            ["torch that fits", f"pip install --force-reinstall torch --index-url {CUDA_INDEX}/{suits}"]
        )
    return rows


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
