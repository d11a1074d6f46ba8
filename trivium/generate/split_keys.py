"""Attention of one more token for each row, whose cached keys are split among a GPU's processors.

With one query for each head, the kernels behind `scaled_dot_product_attention` give a whole row of keys to
one processor, and most of a GPU waits. FlexAttention (2412.05496) has a kernel for decoding that splits the
keys, reads them once for all queries that share them, and takes the mask as a formula. It has to be compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trivium.model.attention import Scoring
from trivium.model.compiling import allow_programs
from trivium.model.config import ModelConfig

NARROWEST, WIDEST = 16, 256
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def splits_keys(config: ModelConfig) -> bool:
    """Whether that kernel takes this model's heads."""
    shared, width = config.heads // config.key_value_heads, config.head_width
    powers = all(one & (one - 1) == 0 for one in (shared, width))
    return powers and NARROWEST <= width <= WIDEST


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    allow_programs()
    return torch.compile(flex_attention, dynamic=False)


def score_of(positions: Tensor, window: int | None, cap: float | None) -> Score:
    """What becomes of a score: capped, and only for keys that are no later than their row's position."""

    def score(found: Tensor, row: Tensor, head: Tensor, place: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            found = torch.tanh(found / cap) * cap
        distance = positions[row] - key
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        return torch.where(seen, found, -float("inf"))

    return score


def attend(query: Tensor, key: Tensor, value: Tensor, score: Score, scoring: Scoring) -> Tensor:
    """Queries [M, K, Q, D], Q of which share each key, over cached keys and values [M, K, L, D]."""
    heads = query.flatten(1, 2)[:, :, None]
    found: Tensor = _compiled()(heads, key, value, score_mod=score, scale=scoring.scale, enable_gqa=True)
    return found.view_as(query)
