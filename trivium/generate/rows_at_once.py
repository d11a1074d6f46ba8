"""How many rows a product takes at once, so that a row's numbers do not depend on its neighbours."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from trivium.model.arithmetic import note_product


@dataclass(frozen=True)
class RowsAtOnce:
    """The numbers of rows for which every row of a product has the same bits; empty where there are none."""

    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As ranges: `2-32, 36, 40`."""
        ranges: list[list[int]] = []
        for size in self.sizes:
            if ranges and ranges[-1][1] == size - 1:
                ranges[-1][1] = size
            else:
                ranges.append([size, size])
        return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

    def padded(self, count: int) -> int:
        """The smallest number of rows, `count` or more, that can be cut into such sizes."""
        return sum(_pieces(self.sizes, count)) if self.sizes else count

    def cuts(self, count: int) -> list[slice]:
        """The products into which a padded number of rows is cut."""
        ends = list(accumulate(_pieces(self.sizes, count))) if self.sizes else [count]
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    def apply(self, rows: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """`multiply` on rows [N, in], a verified number at a time: [N, out]."""
        count = len(rows)
        padded = self.padded(count)
        if padded > count:
            # copies of a row that is there, since a kernel that rounds rows may not like zeros
            rows = torch.cat((rows, rows[:1].expand(padded - count, -1)))
        cuts = self.cuts(padded)
        if len(cuts) == 1:
            return multiply(rows)[:count]
        return torch.cat([multiply(rows[cut]) for cut in cuts])[:count]


@lru_cache(maxsize=4096)
def _pieces(sizes: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Sizes that add up to as little above `count` as can be, the largest first."""
    for total in range(max(count, sizes[0]), count + sizes[-1] + 1):
        pieces, rest = [], total
        while rest >= sizes[0]:
            pieces.append(sizes[bisect_right(sizes, rest) - 1])
            rest -= pieces[-1]
        if rest == 0:
            return tuple(pieces)
    raise AssertionError("a multiple of the largest size is always there")


_PRODUCTS = (F.linear, torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__)


class InVerifiedSizes(TorchFunctionMode):
    """Inside the block every product of rows with a matrix is computed in these numbers of rows."""

    def __init__(self, rows: RowsAtOnce) -> None:
        super().__init__()
        self.rows = rows

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and not kwargs and args[0].dim() == 2 and args[1].dim() == 2 and len(args[0]):
            count = len(args[0])
            # What the model notes itself are the rows it was given; these come on top.
            note_product(self.rows.padded(count) - count, args[1])
            return self.rows.apply(args[0], lambda rows: func(rows, *args[1:]))
        return func(*args, **kwargs)
