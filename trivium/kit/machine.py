"""What this machine has, and what of it will be used."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    import torch

PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 products a second, from the makers' tables, by a part of the GPU's name."""
ALLOCATOR, GROWING_SEGMENTS = "PYTORCH_ALLOC_CONF", "expandable_segments:True"
CGROUP, MEMINFO = "/sys/fs/cgroup", "/proc/meminfo"


@dataclass(frozen=True)
class Machine:
    """The facts a result depends on, kept in every `stage.yaml`."""

    cores: int
    threads: int
    memory: int
    cpu: str
    device: str
    device_name: str
    device_memory: int
    dtype: str
    system: str
    python: str
    torch: str


def describe() -> Machine:
    """Look at this machine; takes no measurements."""
    import torch

    here = device()
    gpu = torch.cuda.get_device_properties(here) if here.startswith("cuda") else None
    return Machine(
        cores=cores(),
        threads=torch.get_num_threads(),
        memory=memory(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        device=here,
        device_name=gpu.name if gpu else platform.processor() or platform.machine(),
        device_memory=gpu.total_memory if gpu else memory(),
        dtype=str(compute_dtype(here)).removeprefix("torch."),
        system=platform.platform(),
        python=platform.python_version(),
        torch=str(torch.__version__),
    )


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next step; says whether it will."""
    # A training step frees and takes the same hundreds of megabytes again and again. Handed back to the
    # system in between, every page of them has to be cleared and mapped again: 6 % of a step's time.
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or platform.libc_ver()[0] != "glibc":
        return False
    trim_threshold, map_threshold = -1, -3
    return bool(library.mallopt(map_threshold, 2**30) and library.mallopt(trim_threshold, 2**31 - 1))


def cores() -> int:
    """The processor cores this process may use, a container's quota counted."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    quota = _first_words(f"{CGROUP}/cpu.max")
    if len(quota) == 2 and quota[0] != "max":
        allowed = min(allowed, max(1, round(int(quota[0]) / int(quota[1]))))
    return allowed


def memory() -> int:
    """The bytes of memory this process may use, a container's limit counted."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _first_words(f"{CGROUP}/memory.max")
    return min(total, int(limit[0])) if limit and limit[0] != "max" else total


def free_memory() -> int:
    """The bytes of memory this process may still take; pages that only mirror files are as good as free."""
    free = _table(MEMINFO).get("MemAvailable:", memory() // 1024) * 1024
    limit, used = (_first_words(f"{CGROUP}/memory.{name}") for name in ("max", "current"))
    if limit and limit[0] != "max" and used:
        files = _table(f"{CGROUP}/memory.stat").get("inactive_file", 0)
        free = min(free, int(limit[0]) - int(used[0]) + files)
    return max(free, 0)


def free_on(device: torch.device) -> int:
    """The bytes that are free now on a GPU, or beside it."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free_memory()


def hand_back_memory() -> None:
    """Give freed memory back to the system, so that what the process holds is what it uses."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident_memory() -> int | None:
    """The bytes of memory this process holds now; None where nothing tells."""
    kilobytes = _table("/proc/self/status").get("VmRSS:")
    return None if kilobytes is None else kilobytes * 1024


def forget_peak_memory() -> None:
    """Watch from now on how much memory this process holds at the most."""
    import torch

    # What an earlier stage freed is kept for speed, and would count for the next one.
    hand_back_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Not on Linux, or not allowed: then the peak is that of the whole process so far.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """The most bytes this process held since then, on its GPU if it has one; None where nothing tells."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    kilobytes = _table("/proc/self/status").get("VmHWM:")
    return None if kilobytes is None else kilobytes * 1024


def device() -> str:
    """Where this process computes: its own GPU if there is one, else the processor."""
    import torch

    if torch.cuda.is_available():
        if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            # Read at the first allocation. Passes of many sizes would leave gaps that no later one fits into.
            os.environ.setdefault(ALLOCATOR, GROWING_SEGMENTS)
        # Read once, when cuBLAS is first used: with it products add in a fixed order, and it costs nothing.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return "cpu"


def device_class() -> str:
    """The kind of device this process computes on, `cpu` or `cuda`: each rounds in its own way."""
    return device().partition(":")[0]


def usable(named: str | None) -> str:
    """The device a person named, refused where nothing can be computed on it; else the best there is."""
    import torch

    place = named or device()
    try:
        torch.ones(1, device=place).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise TriviumError(f"the device {place!r} cannot be used here: {reason}; try cpu.") from None
    return place


def compute_dtype(device: str) -> torch.dtype:
    """The type to multiply in: bfloat16 on a GPU that has it, float32 everywhere else."""
    import torch

    if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32


def matmul_peak(seconds: float = 1.0) -> float:
    """The best FLOP/s of a square matrix product in the type and on the device that will be used."""
    import torch

    here = device()
    size = 8192 if here.startswith("cuda") else 1024
    left = torch.randn(size, size, device=here, dtype=compute_dtype(here))
    right = torch.randn_like(left)
    return 2 * size**3 / _best_time(lambda: left @ right, here, seconds)


def peak_products(name: str, dtype: torch.dtype) -> float | None:
    """The FLOP/s that a GPU of this name is sold with, for products of 16-bit numbers; else None."""
    if dtype.itemsize != 2:
        return None
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def product_seconds() -> float:
    """The best time of three products of the same matrices, which no random number goes into."""
    import torch

    here = device()
    size = 4096 if here.startswith("cuda") else 512
    matrix = torch.ones(size, size, device=here, dtype=compute_dtype(here))
    return min(_best_time(lambda: matrix @ matrix, here, 0.0) for _ in range(3))


def memory_bandwidth(seconds: float = 0.5) -> float:
    """The best bytes/s of a copy that no cache can hold (read and write both counted)."""
    import torch

    here = device()
    source = torch.zeros(2**28 if here.startswith("cuda") else 2**25, device=here)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best_time(lambda: target.copy_(source), here, seconds)


def _best_time(work: object, device: str, seconds: float) -> float:
    import torch

    assert callable(work)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best, stop = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < stop or best == float("inf"):
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best


def _first_words(path: str) -> list[str]:
    try:
        return Path(path).read_text().split()
    except OSError:
        return []


def _table(path: str) -> dict[str, int]:
    """The numbers of a file with a name and a number on each line."""
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}
