"""Whether a run that goes on ends bit for bit where it would have ended, and how a GPU is made to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

WITHIN_ROUNDING = "within rounding"
BIT_IDENTICAL = "bit-identical"


def how_it_resumes(device: torch.device) -> str:
    """How near a resumed run comes to one that was never stopped, on this device, as it is set now.

    A CPU adds in a fixed order. Some of a GPU's kernels (the gradients of attention, sums by index) add in
    the order in which blocks happen to finish, unless torch is held to deterministic ones.
    """
    fixed = torch.are_deterministic_algorithms_enabled() and not (
        torch.is_deterministic_algorithms_warn_only_enabled()
    )
    return BIT_IDENTICAL if device.type == "cpu" or fixed else WITHIN_ROUNDING


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside the block torch uses kernels that add in a fixed order, and refuses where it has none."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    # With a warning alone FlashAttention would keep its faster gradient.
    torch.use_deterministic_algorithms(True, warn_only=False)
    # Nothing here reads memory that was not written.
    settings.fill_uninitialized_memory = False
    try:
        # The other two kernels of attention have no gradient that adds in a fixed order.
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        settings.fill_uninitialized_memory = fills


def refused(error: BaseException) -> bool:
    """Whether torch found no deterministic kernel for an operation."""
    return isinstance(error, RuntimeError) and "deterministic" in str(error)
