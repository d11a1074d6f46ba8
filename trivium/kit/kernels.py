"""What decides how sums are rounded: the processor, torch's build, the settings that its libraries read."""

import os
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SETTINGS = (
    "ATEN_CPU_CAPABILITY",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
)


@dataclass(frozen=True)
class Kernels:
    """Two machines with equal kernels add the same numbers in the same order."""

    processor: str
    """Vendor, family and model, as the processor itself names them."""
    capability: str
    threads: int
    torch: str
    settings: str
    """The environment variables that change which kernels are chosen, as `NAME=value`."""

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        parts = (self.processor, self.capability, threads, f"torch {self.torch}", self.settings)
        return ", ".join(part for part in parts if part)


def kernels() -> Kernels:
    """The kernels that this process computes with on its processor."""
    import torch

    set_here = [f"{name}={os.environ[name]}" for name in SETTINGS if os.environ.get(name)]
    return Kernels(
        processor=processor(),
        capability=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        settings=" ".join(set_here),
    )


@cache
def processor() -> str:
    """Vendor, family and model; where the system does not tell them, the architecture."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        lines = []
    facts: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            facts.setdefault(name.strip(), value.strip())
    if "vendor_id" in facts:
        return f"{facts['vendor_id']} family {facts.get('cpu family')} model {facts.get('model')}"
    if "CPU implementer" in facts:
        return f"{platform.machine()} implementer {facts['CPU implementer']} part {facts.get('CPU part')}"
    return platform.processor() or platform.machine()
