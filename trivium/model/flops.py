"""How much arithmetic a model does, counted from its config."""

from __future__ import annotations

import torch

from trivium.model.arithmetic import layer_matrices
from trivium.model.config import ModelConfig
from trivium.model.transformer import Transformer


def parameter_count(config: ModelConfig) -> int:
    """All weights."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Transformer(config).parameters())


def active_matrix_parameters(config: ModelConfig) -> int:
    """The weights one token is multiplied by: all matrices but the embedding, of experts those picked."""
    layers = sum(layer_matrices(config, layer) for layer in range(config.layers))
    return config.vocabulary * config.width + layers


def visible_keys(length: int, window: int | None, causal: bool) -> float:
    """How many keys a token of a document meets on average; a whole square is what dense kernels compute."""
    if not causal:
        return float(length)
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def flops_per_token(config: ModelConfig, length: int, training: bool = True, *, causal: bool = True) -> float:
    """Floating-point operations per token of a document of `length` tokens, head included.

    A multiplication and an addition are two; the backward pass is twice the forward. With `causal` only
    the half of attention that is needed counts, without it the whole square."""
    forward = 2.0 * active_matrix_parameters(config)
    for layer in range(config.layers):
        met = visible_keys(length, config.window(layer), causal)
        forward += 4 * config.heads * config.head_width * met
    return 3 * forward if training else forward
