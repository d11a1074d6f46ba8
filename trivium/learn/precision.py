"""The type in which matrices are multiplied; weights, moments and sums stay in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from trivium.kit.machine import compute_dtype
from trivium.model.float8 import float8_products

Precision = Literal["auto", "float32", "bfloat16", "float8"]


def resolve_precision(
    precision: Precision, device: torch.device | str
) -> Literal["float32", "bfloat16", "float8"]:
    """What `auto` means on a device: bfloat16 on a GPU that has it, float32 everywhere else."""
    if precision != "auto":
        return precision
    return "bfloat16" if compute_dtype(str(device)) == torch.bfloat16 else "float32"


def product_dtype(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The type of the factors of a matrix product under this setting, but for layers in float8."""
    return torch.float32 if resolve_precision(precision, device) == "float32" else torch.bfloat16


@contextmanager
def one_pass(precision: Precision, device: torch.device) -> Iterator[None]:
    """A context for one forward pass, in which matrices are multiplied in this type.

    It is entered again for every pass and never spans an optimiser step. Autocast would otherwise keep the
    bfloat16 copies of the weights that it made first, and an update in place does not tell it that they are
    out of date: the model would go on computing with its first weights. For the same reason the cache of
    copies is off. A weight is used once in a pass, so the cache saves nothing, and a copy that a pass
    without gradients has made would hide the weight from the gradients of the next.

    The mechanism is the same on a CPU and on a GPU, so that tests on the one speak for the other.
    """
    how = resolve_precision(precision, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=how != "float32", cache_enabled=False)
    with autocast, float8_products(how == "float8"):
        yield
