"""Counts the arithmetic of every pass while it is done, as torch's flop counter would: what a stage cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trivium.model.uncompiled import uncompiled

if TYPE_CHECKING:
    from trivium.model.attention import Context
    from trivium.model.config import ModelConfig
    from trivium.model.transformer import Transformer


@dataclass(eq=False)
class Tally:
    """How many operations were done; a multiplication and an addition are two."""

    operations: float = 0.0


_open: list[Tally] = []


@contextmanager
def counted() -> Iterator[Tally]:
    """Count what all models do meanwhile."""
    tally = Tally()
    _open.append(tally)
    try:
        yield tally
    finally:
        _open.remove(tally)


def layer_matrices(config: ModelConfig, layer: int) -> int:
    """The weights of a layer by which one token is multiplied: of experts, those it is sent to."""
    queries, keys = config.heads * config.head_width, config.key_value_heads * config.head_width
    attention = config.width * (2 * queries + 2 * keys)
    per_inner = (3 if config.gated else 2) * config.width
    if config.experts is None or not config.is_mixture(layer):
        return attention + per_inner * config.inner_width
    experts = config.experts
    return attention + config.width * experts.count + per_inner * experts.inner_width * experts.per_token


# Nothing of this is part of the graph that a compiler should see.
@uncompiled
def note_product(rows: int, weight: Tensor, times: int = 1) -> None:
    """So many rows times this matrix, so many times: once forward, once for each gradient."""
    for tally in _open:
        tally.operations += 2.0 * rows * weight.numel() * times


@uncompiled
def note_products(first: Tensor, second: Tensor, times: int = 1) -> None:
    """Stacked matrices [n, r, k] times [n, k, c], so many times."""
    for tally in _open:
        tally.operations += 2.0 * first.numel() * second.shape[-1] * times


@uncompiled
def note_pass(
    model: Transformer, tokens: int, context: Context, wanted: int | None = None, *, filling: bool = False
) -> None:
    """A pass of this model over so many tokens, and the backward pass if there will be one.

    Of the last layer only so many as are `wanted`, and nothing after keys and values when `filling` a cache.
    """
    if not _open:
        return
    config = model.config
    sizes = [layer_matrices(config, layer) for layer in range(config.layers)]
    products = 2.0 * tokens * sum(sizes)
    if wanted is not None or filling:
        asking = config.width * (config.heads + 2 * config.key_value_heads) * config.head_width
        products -= 2.0 * (tokens - (wanted or 0)) * (sizes[-1] - asking)
    # Kernels compute the whole square of a document and mask one half of it.
    attention = 4.0 * (config.layers - filling) * config.heads * config.head_width * context.pairs
    total = products + attention
    if torch.is_grad_enabled() and (trained := _share_trained(model)) is not None:
        total += products * (1 + trained) + 2 * attention + 6.0 * tokens * _beside(model)
    for tally in _open:
        tally.operations += total


def _of_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, as `...query.down.mine`; a layer's own ends in `weight`."""
    return name.split(".")[-2] in ("down", "up") and not name.endswith((".weight", ".bias"))


def _beside(model: Transformer) -> int:
    """The weights of the adapters that are trained beside the layers' matrices."""
    named = model.layers.named_parameters()
    return sum(one.numel() for name, one in named if one.requires_grad and _of_adapter(name))


def _share_trained(model: Transformer) -> float | None:
    """The share of the layers' weights that get a gradient; None where nothing does."""
    matrices = [
        one for name, one in model.layers.named_parameters() if one.dim() > 1 and not _of_adapter(name)
    ]
    trained = sum(one.numel() for one in matrices if one.requires_grad)
    if not trained and not any(one.requires_grad for one in model.parameters()):
        return None
    return trained / max(sum(one.numel() for one in matrices), 1)
