"""How much arithmetic a model does, counted from its config alone.

A multiplication and an addition are two FLOPs, as `torch.utils.flop_counter` counts them. A pass over tokens
has three parts: the matrices of the layers, attention, which grows with the square of a document, and the
head. A backward pass costs a product for the gradient of each factor, so twice the forward; where weights
are frozen, the products for their gradients are left out.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from trivium.model.arithmetic import asking_matrices, layer_matrices
from trivium.model.config import ModelConfig
from trivium.model.transformer import Transformer
from trivium.model.unfilled import unfilled

_shapes: dict[str, tuple[int, Counter[tuple[int, int]]]] = {}


def _shapes_of(config: ModelConfig) -> tuple[int, Counter[tuple[int, int]]]:
    """All weights, and how many of the layers' matrices have which shape; every config is built once."""
    # A config holds the dictionary of its RoPE scaling, so it has no hash.
    key = repr(config)
    if key not in _shapes:
        with unfilled():
            model = Transformer(config)
        matrices = (one for one in model.layers.parameters() if one.dim() >= 2)
        sides = ((one.shape[0], one[0].numel()) for one in matrices)
        _shapes[key] = (
            sum(parameter.numel() for parameter in model.parameters()),
            Counter((min(pair), max(pair)) for pair in sides),
        )
    return _shapes[key]


def parameter_count(config: ModelConfig) -> int:
    """All weights."""
    return _shapes_of(config)[0]


def expert_parameter_count(config: ModelConfig) -> int:
    """The weights of the matrices of all experts."""
    experts = config.experts
    if experts is None:
        return 0
    mixtures = sum(config.is_mixture(layer) for layer in range(config.layers))
    each = (3 if config.gated else 2) * config.width * experts.inner_width
    return mixtures * experts.count * each


def active_matrix_parameters(config: ModelConfig) -> int:
    """The weights one token is multiplied by: all matrices but the embedding, of experts those picked."""
    return config.vocabulary * config.width + layer_matrix_parameters(config)


def layer_matrix_parameters(config: ModelConfig) -> int:
    """The weights of all layers by which one token is multiplied."""
    return sum(layer_matrices(config, layer) for layer in range(config.layers))


@dataclass(frozen=True)
class Flops:
    """The FLOPs of some passes, by part."""

    layers: float = 0.0
    attention: float = 0.0
    """Of the whole square of every document, as dense kernels compute it."""
    head: float = 0.0
    optimiser: float = 0.0
    """Of Muon's Newton–Schulz iterations."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def total(self) -> float:
        return self.layers + self.attention + self.head + self.optimiser


def pass_flops(
    config: ModelConfig,
    tokens: float,
    length: float,
    predicted: float | None = None,
    *,
    trained: float | None = None,
    head_trained: bool = True,
    last_layer: float | None = None,
    head_again: bool = False,
    beside: float = 0.0,
) -> Flops:
    """What it costs to read `tokens` and to score the next token at `predicted` of them (at all if None).

    `length` is the number of keys that each token meets: a document's length, or the mean of its square over
    the mean. With `trained` there is a backward pass, and that share of the layers' weights gets a gradient.
    The last layer computes its output for `last_layer` tokens only, where that is given. `head_again`: the
    backward pass makes the scores again. `beside` is the number of an adapter's weights.
    """
    predicted = tokens if predicted is None else predicted
    backward = trained is not None
    layers = 2.0 * tokens * layer_matrix_parameters(config)
    if last_layer is not None:
        asking = asking_matrices(config)
        layers -= 2.0 * (tokens - last_layer) * (layer_matrices(config, config.layers - 1) - asking)
    # Where no output is wanted of the last layer, its keys and values are stored and nothing attends.
    attending = config.layers - (last_layer == 0)
    attention = 4.0 * attending * config.heads * config.head_width * length * tokens
    head = 2.0 * predicted * config.vocabulary * config.width
    adapter = 2.0 * tokens * beside
    still = 0.0
    if beside:
        if last_layer is not None:
            adapter -= 2.0 * (tokens - last_layer) * beside * _last_behind(config)
        # What the first layer reads gets no gradient, as the embedding below is frozen.
        still = 2.0 * tokens * (asking_matrices(config) + beside * _first_downs(config))
    return Flops(
        (layers * (2 + (trained or 0.0)) + 3 * adapter - still) if backward else layers,
        attention * (3 if backward else 1),
        head * (2 + head_trained + head_again if backward else 1),
    )


def adapter_parameters(config: ModelConfig, rank: int) -> float:
    """Two thin matrices beside each of the layers' products."""
    return float(config.layers * rank * sum(sum(pair) for pair in _sides(config)))


def _sides(config: ModelConfig) -> list[tuple[int, int]]:
    """The inputs and outputs of a layer's matrices: queries, keys, values, output, and the inner ones."""
    queries, keys = config.heads * config.head_width, config.key_value_heads * config.head_width
    sides = [(config.width, queries), (config.width, keys), (config.width, keys), (queries, config.width)]
    inner = [(config.width, config.inner_width)] * (2 if config.gated else 1)
    return [*sides, *inner, (config.inner_width, config.width)]


def _first_downs(config: ModelConfig) -> float:
    """The share of an adapter's weights that read the input of the first layer."""
    return 3 * config.width / (config.layers * sum(sum(pair) for pair in _sides(config)))


def _last_behind(config: ModelConfig) -> float:
    """The share of an adapter's weights that lie behind the last layer's attention."""
    sides = [sum(pair) for pair in _sides(config)]
    return sum(sides[3:]) / (config.layers * sum(sides))


def muon_flops(config: ModelConfig, steps: float = 1.0) -> float:
    """Newton–Schulz of all layers' matrices in so many optimiser steps: five rounds of three products."""
    return steps * sum(
        count * newton_schulz_flops(rows, columns) for (rows, columns), count in _shapes_of(config)[1].items()
    )


def newton_schulz_flops(rows: int, columns: int) -> float:
    """Of one matrix: five rounds of three products, of the shorter side."""
    short, long = sorted((rows, columns))
    return 20.0 * short**2 * long + 10.0 * short**3


def visible_keys(length: int, window: int | None, causal: bool) -> float:
    """How many keys a token of a document meets on average; a whole square is what dense kernels compute."""
    if not causal:
        return float(length)
    if window is None or window >= length:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def flops_per_token(config: ModelConfig, length: int, training: bool = True, *, causal: bool = True) -> float:
    """Floating-point operations per token of a document of `length` tokens, head included.

    With `causal` only the half of attention that is needed counts, without it the whole square."""
    forward = 2.0 * active_matrix_parameters(config)
    for layer in range(config.layers):
        met = visible_keys(length, config.window(layer), causal)
        forward += 4 * config.heads * config.head_width * met
    return 3 * forward if training else forward
