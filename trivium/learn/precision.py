"""The type in which matrices are multiplied; weights, moments and sums stay in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from trivium.kit.machine import compute_dtype

Precision = Literal["auto", "float32", "bfloat16"]


def chosen(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """What `auto` means here: bfloat16 on a GPU that has it, float32 everywhere else."""
    if precision != "auto":
        return precision
    return "bfloat16" if compute_dtype(str(device)) == torch.bfloat16 else "float32"


@contextmanager
def products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Multiply in this type inside the block.

    A processor rounds the factors inside its own products, and gains by it if it has AMX or AVX-512 bfloat16;
    a GPU gets them rounded by autocast.
    """
    if chosen(precision, device) == "float32":
        yield
    elif device.type == "cpu":
        settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = settings.fp32_precision
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = before
    else:
        with torch.autocast(device.type, torch.bfloat16):
            yield
