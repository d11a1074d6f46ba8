"""Models of which only the shapes are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

DRAWN = (nn.init.kaiming_uniform_, nn.init.uniform_)
"""How torch fills its own layers."""


class _Undrawn(TorchFunctionMode):
    """What has no room for numbers draws none, which takes most of the time of making it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in DRAWN and kwargs and "tensor" in kwargs and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def unfilled() -> Iterator[None]:
    """What is made in this block has shapes and no numbers."""
    with torch.device("meta"), _Undrawn():
        yield
