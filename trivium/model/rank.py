"""How many directions the weights of a grown model use: whether new capacity is real.

Two numbers of a matrix with singular values s. Its rank counts those above `LEAST` times the largest. Its
effective rank (Roy and Vetterli, 2007) is exp(-sum p log p) with p = s / sum(s): how many directions it uses,
where one that is used little counts little. Both are given as shares of the full rank. Copies of units that
were not made to differ have equal gradients: however long they are trained, their matrices keep their rank.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from trivium.model.deepen import LAYER

LEAST = 1e-3
_MATRICES = 24
_LARGEST = 4096
"""Matrices whose smaller side is longer are left out: their singular values take minutes."""


def shares(matrix: Tensor) -> tuple[float, float]:
    """The rank and the effective rank of a matrix, each as a share of the full rank."""
    values = torch.linalg.svdvals(matrix.detach().float())
    total = float(values.sum())
    if total == 0:
        return 0.0, 0.0
    chances = values / total
    entropy = float(-(chances * chances.clamp(min=1e-30).log()).sum())
    rank = int((values > LEAST * values[0]).sum())
    return rank / len(values), float(torch.tensor(entropy).exp()) / len(values)


@torch.no_grad()
def ranks(weights: Mapping[str, Tensor], layers: Collection[int] = ()) -> dict[str, Any]:
    """The mean shares over the matrices of these layers, or of all; over some of them where they are many."""
    names = [
        name for name, one in sorted(weights.items())
        if one.dim() == 2 and min(one.shape) <= _LARGEST
        and (match := LAYER.match(name)) and (not layers or int(match[1]) in layers)
    ]  # fmt: skip
    every = max(1, -(-len(names) // _MATRICES))
    found = {name: shares(weights[name]) for name in names[::every]}
    if not found:
        return {}
    low = min(found, key=lambda name: found[name])
    return {
        "matrices": len(found),
        "rank": sum(rank for rank, _ in found.values()) / len(found),
        "effective_rank": sum(effective for _, effective in found.values()) / len(found),
        "lowest": low,
        "lowest_rank": found[low][0],
    }


def has_risen(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> bool:
    """Whether new weights use more directions than at first, or nearly all there are."""
    return after["rank"] > 0.95 or (before is not None and after["rank"] > before["rank"] + 0.01)
