"""Counts the arithmetic of every pass while it is done, as torch's flop counter would: what a stage cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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


@contextmanager
def uncounted() -> Iterator[None]:
    """Count nothing meanwhile; the caller notes what is done."""
    before = _open[:]
    _open.clear()
    try:
        yield
    finally:
        _open[:] = before


def layer_matrices(config: ModelConfig, layer: int) -> int:
    """The weights of a layer by which one token is multiplied: of experts, those it is sent to."""
    queries, keys = config.heads * config.head_width, config.key_value_heads * config.head_width
    attention = config.width * (2 * queries + 2 * keys)
    per_inner = (3 if config.gated else 2) * config.width
    if config.experts is None or not config.is_mixture(layer):
        return attention + per_inner * config.inner_width
    experts = config.experts
    return attention + config.width * experts.count + per_inner * experts.inner_width * experts.per_token


def asking_matrices(config: ModelConfig) -> int:
    """The weights of a layer that make queries, keys and values."""
    return config.width * (config.heads + 2 * config.key_value_heads) * config.head_width


# Nothing of this is part of the graph that a compiler should see.
@uncompiled
def note(operations: float) -> None:
    """So many operations, counted before."""
    for tally in _open:
        tally.operations += operations


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
    model: Transformer,
    tokens: int,
    context: Context,
    wanted: int | None = None,
    *,
    filling: bool = False,
    merged: bool = False,
) -> None:
    """A pass of this model over so many tokens, and the backward pass if there will be one.

    Of the last layer only so many as are `wanted`, and nothing after keys and values when `filling` a cache.
    Adapters cost nothing of their own where they are `merged` into the layers' matrices.
    """
    if not _open:
        return
    config = model.config
    sizes = [layer_matrices(config, layer) for layer in range(config.layers)]
    products = 2.0 * tokens * sum(sizes)
    if wanted is not None or filling:
        products -= 2.0 * (tokens - (wanted or 0)) * (sizes[-1] - asking_matrices(config))
    # Kernels compute the whole square of a document and mask one half of it.
    attention = 4.0 * (config.layers - filling) * config.heads * config.head_width * context.pairs
    total = products + attention
    thin = [] if merged else _adapters(model)
    # Of the last layer's adapters, too, those behind attention read wanted tokens alone.
    last = tokens if wanted is None and not filling else wanted or 0
    rows = [last if one.layer == config.layers - 1 and not one.asks else tokens for one in thin]
    total += sum(2.0 * count * one.weights for count, one in zip(rows, thin, strict=True))
    if torch.is_grad_enabled() and (trained := _share_trained(model)) is not None:
        first, normed = _first_trained(model)
        # No gradient flows into what lies below the first trained weight, nor into what that layer reads.
        unread = 0 if normed else asking_matrices(config)
        still = 0.0 if first is None else 2.0 * tokens * (sum(sizes[:first]) + unread)
        share = 1.0 if first is None else 1.0 - first / config.layers
        total += products * (1 + trained) - still + 2 * share * attention
        for count, one in zip(rows, thin, strict=True):
            into = normed or not (one.down and one.asks and one.layer == first)
            total += 2.0 * count * one.weights * (into + one.trained)
    for tally in _open:
        tally.operations += total


@dataclass(frozen=True)
class _Thin:
    """One of the two matrices of an adapter."""

    layer: int
    asks: bool
    """Whether it belongs to queries, keys or values."""
    down: bool
    weights: int
    trained: bool


def _adapters(model: Transformer) -> list[_Thin]:
    """The matrices of the adapter that acts in all rows of a pass."""
    found = []
    for index, layer in enumerate(model.layers):
        for name, module in layer.named_modules():
            if getattr(module, "shapes", None) and module.original is None:
                active = module.selection.active
                if module.selection.parts is None and active in module.shapes:
                    asks = name.rpartition(".")[2] in ("query", "key", "value")
                    for side in ("down", "up"):
                        one = getattr(module, side)[active]
                        found.append(_Thin(index, asks, side == "down", one.numel(), one.requires_grad))
    return found


def _of_adapter(name: str) -> bool:
    """Whether a parameter is an adapter's, as `...query.down.mine`; a layer's own ends in `weight`."""
    return name.split(".")[-2] in ("down", "up") and not name.endswith((".weight", ".bias"))


def _share_trained(model: Transformer) -> float | None:
    """The share of the layers' weights that get a gradient; None where nothing does."""
    matrices = [
        one for name, one in model.layers.named_parameters() if one.dim() > 1 and not _of_adapter(name)
    ]
    trained = sum(one.numel() for one in matrices if one.requires_grad)
    if not trained and not any(one.requires_grad for one in model.parameters()):
        return None
    return trained / max(sum(one.numel() for one in matrices), 1)


def _first_trained(model: Transformer) -> tuple[int | None, bool]:
    """The first layer that learns, where nothing below it does, and whether its first norm does, too.

    None where the embedding learns."""
    below = [
        one for name, one in model.named_parameters() if not name.startswith(("layers.", "norm.", "head"))
    ]
    if any(one.requires_grad for one in (*below, model.embedding.weight)):
        return None, False
    for index, layer in enumerate(model.layers):
        if any(one.requires_grad for one in layer.parameters()):
            # Where the norm before queries, keys and values learns, what they read needs a gradient.
            named = layer.named_parameters()
            norms = [one for name, one in named if name.startswith("attention_norm.")]
            return index, any(one.requires_grad for one in norms)
    return None, False


def note_module(module: nn.Linear | nn.Conv1d, rows: Tensor) -> None:
    """A layer of an encoder or a projector, over [..., inputs], or [n, inputs, places] if it convolves."""
    places = rows.numel() // rows.shape[-1]
    if isinstance(module, nn.Conv1d):
        places = rows.shape[0] * (rows.shape[2] // module.stride[0])
    learns = torch.is_grad_enabled() and module.weight.requires_grad
    note_product(places, module.weight, 1 + learns + (torch.is_grad_enabled() and rows.requires_grad))
