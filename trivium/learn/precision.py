"""The type in which matrices are multiplied; weights, moments and sums stay in float32."""

from typing import Literal

import torch

from trivium.kit.machine import compute_dtype

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_precision(precision: Precision, device: torch.device | str) -> Literal["float32", "bfloat16"]:
    """What `auto` means on a device: bfloat16 on a GPU that has it, float32 everywhere else."""
    if precision != "auto":
        return precision
    return "bfloat16" if compute_dtype(str(device)) == torch.bfloat16 else "float32"


def product_dtype(precision: Precision, device: torch.device | str) -> torch.dtype:
    """The type of the factors of a matrix product under this setting."""
    return torch.bfloat16 if resolve_precision(precision, device) == "bfloat16" else torch.float32


def one_pass(precision: Precision, device: torch.device) -> torch.autocast:
    """A context for one forward pass, in which matrices are multiplied in this type.

    It is entered again for every pass and never spans an optimiser step. Autocast would otherwise keep the
    bfloat16 copies of the weights that it made first, and an update in place does not tell it that they are
    out of date: the model would go on computing with its first weights. For the same reason the cache of
    copies is off. A weight is used once in a pass, so the cache saves nothing, and a copy that a pass
    without gradients has made would hide the weight from the gradients of the next.

    The mechanism is the same on a CPU and on a GPU, so that tests on the one speak for the other.
    """
    rounds = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=rounds, cache_enabled=False)
