"""torch's attention kernel for packed documents of several lengths, called as the installed version wants it.

`varlen_attn` came with torch 2.10 and has changed with every version since: 2.10 takes no scale and no
window, 2.11 takes both, and 2.12 wants `enable_gqa` where several query heads share a key head. So its
signature is asked once. Where something is lacking, documents are attended in groups of like length, which is
said once.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trivium.model.uncompiled import uncompiled

log = logging.getLogger("trivium.model")
NEEDED = frozenset({"scale", "window_size"})
HALF = (torch.bfloat16, torch.float16)
WIDEST_HEAD = 256
"""FlashAttention's limit; a head's width has to be a multiple of 8 besides."""


@dataclass(frozen=True)
class VarlenKernel:
    """A `varlen_attn` with what its signature says about it."""

    function: Callable[..., Any]
    shares_heads: bool
    """Whether it lets several query heads share a key head, if asked to; else each gets a copy of its own."""

    @classmethod
    def of(cls, function: Callable[..., Any]) -> VarlenKernel | None:
        """The kernel behind a function, or None where its signature lacks what attention needs."""
        parameters = inspect.signature(function).parameters
        if not parameters.keys() >= NEEDED:
            return None
        return cls(function, "enable_gqa" in parameters)

    def takes(self, query: Tensor) -> bool:
        """Whether it computes heads [N, H, D] of this type and width."""
        width = query.shape[-1]
        return query.dtype in HALF and width <= WIDEST_HEAD and width % 8 == 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, borders: tuple[Tensor, Tensor],
        longest: tuple[int, int], *, scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        """Causal attention of query [N, H, D] over key and value [M, K, D] -> [N, H, D].

        `borders` are where documents begin and end among the queries and among the keys, `longest` bounds
        their lengths. A document may have more keys than queries: its last query then sees its last key, its
        first one those that come before.
        """
        heads, key_heads = query.shape[1], key.shape[1]
        options: dict[str, Any] = {}
        if heads != key_heads and self.shares_heads:
            options["enable_gqa"] = True
        elif heads != key_heads:
            key, value = (rows.repeat_interleave(heads // key_heads, dim=1) for rows in (key, value))
        back = -1 if window is None else window - 1
        return self.function(
            query, key, value, *borders, *longest, scale=scale, window_size=(back, 0), **options
        )


@cache
def varlen_kernel(device: torch.device) -> VarlenKernel | None:
    """The kernel for tensors on this device, or None where there is none."""
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) < (8, 0):
        return without(f"{torch.cuda.get_device_name(device)} is older than the kernel, which needs an A100")
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return without(f"torch {torch.__version__} has no varlen_attn; 2.11 has")
    kernel = VarlenKernel.of(varlen_attn)
    if kernel is None:
        return without(f"varlen_attn of torch {torch.__version__} takes no scale or no window; 2.11's does")
    return kernel


@uncompiled
def without(reason: str) -> None:
    """Say once in a process why documents of several lengths are attended in groups."""
    if reason not in _said:
        _said.add(reason)
        log.warning("attention is slower than it could be: %s.", reason)


_said: set[str] = set()
