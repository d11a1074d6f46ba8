"""A larger model from a smaller one: what a person can ask for, and the model that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.deepen import DepthMethod, Place, blocks_for, deepened, deepened_config, deepened_moments
from trivium.model.families import write_config
from trivium.model.initialise import build
from trivium.model.transformer import Transformer
from trivium.model.widen import (
    NOISE,
    Widening,
    WidthMethod,
    as_experts,
    widened,
    widened_moments,
    widening,
    with_experts,
)

Weights = Mapping[str, Tensor]
TOLERANCE = 1e-4
"""How far logits may move in a growth that promises to keep the function."""


class GrownExperts(Settings):
    """Experts in place of the inner layers (sparse up-cycling)."""

    count: int = Field(ge=2)
    """The number of experts in each layer."""
    per_token: int = Field(default=2, ge=1)
    """How many of them a token passes through."""
    noise: float = Field(default=0.0, ge=0)
    """Noise on every copy of the inner layer, as a share of its deviation; above 0 the function changes."""


class GrowthSettings(Settings):
    """How a model becomes larger."""

    layers: int | None = Field(default=None, ge=1)
    """The number of layers afterwards."""
    method: DepthMethod = "identity"
    """How layers are added: `identity` blocks keep the function, and so do `masked` copies, whose mask rises
    while the model trains; `learned` layers are sums of all old ones, with shares that the first steps learn
    (LiGO); `stack` repeats all layers, `interpolate` puts blends between neighbours,
    `overlap` joins two copies (SOLAR), `random` adds untrained layers."""
    place: Place = "interleaved"
    """Where identity, masked and random blocks go: spread evenly, all in the middle, or all at the end."""
    width: Count | None = Field(default=None, ge=1)
    """The width of the residual stream afterwards; heads and inner layer follow in proportion."""
    heads: int | None = Field(default=None, ge=1)
    """The number of heads afterwards; their width stays."""
    key_value_heads: int | None = Field(default=None, ge=1)
    """The number of key-value heads afterwards; as many heads share one as before."""
    inner_width: Count | None = Field(default=None, ge=1)
    """The width of the inner layer afterwards."""
    width_method: WidthMethod | None = None
    """`tile` copies units (HyperCloning), `pad` adds silent ones; `tile` for whole multiples of the width."""
    noise: float = Field(default=NOISE, ge=0)
    """By how much copies of a unit differ, as a share of the weights' deviation; at 0 they stay equal."""
    experts: GrownExperts | None = None
    """Turn the inner layers into mixtures of experts."""

    @model_validator(mode="after")
    def something_grows(self) -> GrowthSettings:
        if not any(
            (self.layers, self.width, self.heads, self.key_value_heads, self.inner_width, self.experts)
        ):
            raise ValueError(
                "nothing grows here: give `layers`, `width`, `heads`, `inner_width` or `experts`"
            )
        return self

    @property
    def keeps_function(self) -> bool:
        """Whether the grown model has to compute what the small one did."""
        deeper = self.layers is None or self.method in ("identity", "masked")
        return deeper and (self.experts is None or self.experts.noise == 0)

    @property
    def widens(self) -> bool:
        """Whether any width grows."""
        return any((self.width, self.heads, self.key_value_heads, self.inner_width))


@dataclass(frozen=True)
class Grown:
    """A larger model: its config, its weights, and what becomes of the optimiser's state."""

    config: ModelConfig
    weights: dict[str, Tensor]
    moments: Callable[[Weights], dict[str, Tensor]]
    new_layers: tuple[int, ...]
    """The layers that no layer of the small model became."""


def _widening(config: ModelConfig, wish: GrowthSettings) -> Widening:
    whole = wish.width is None or wish.width % config.width == 0
    return widening(
        config, wish.width_method or ("tile" if whole else "pad"), width=wish.width, heads=wish.heads,
        key_value_heads=wish.key_value_heads, inner_width=wish.inner_width,
    )  # fmt: skip


def grown_config(config: ModelConfig, wish: GrowthSettings) -> ModelConfig:
    """The config of the larger model; refused if no family's files can say it."""
    if wish.widens:
        config = _widening(config, wish).after
    if wish.layers is not None:
        config = deepened_config(config, blocks_for(config.layers, wish.layers, wish.method, wish.place))
    if wish.experts is not None:
        config = with_experts(config, wish.experts.count, wish.experts.per_token)
    write_config(config)
    return config


def added_layers(config: ModelConfig, wish: GrowthSettings) -> tuple[int, ...]:
    """The layers of the larger model that no layer of the small one became."""
    if wish.layers is None:
        return ()
    blocks = blocks_for(config.layers, wish.layers, wish.method, wish.place)
    return tuple(layer for layer, block in enumerate(blocks) if not block.kept)


def grow(config: ModelConfig, weights: Weights, wish: GrowthSettings, *, seed: int) -> Grown:
    """Widen, deepen and up-cycle, in this order."""
    larger = grown_config(config, wish)
    steps: list[Callable[[Weights], dict[str, Tensor]]] = []
    found: Weights = weights
    new_layers = added_layers(config, wish)
    if wish.widens:
        how = _widening(config, wish)
        found, config = widened(how, found, noise=wish.noise, seed=seed), how.after
        steps.append(lambda moments: widened_moments(how, moments))
    if wish.layers is not None:
        blocks = blocks_for(config.layers, wish.layers, wish.method, wish.place)
        found = deepened(config, found, blocks, seed=seed + 1)
        steps.append(lambda moments: deepened_moments(moments, blocks))
    if wish.experts is not None:
        found = as_experts(found, wish.experts.count, noise=wish.experts.noise, seed=seed + 2)
        # Every expert sees a part of the tokens: the moments of the one inner layer fit none of them.
        steps.append(lambda moments: {name: one for name, one in moments.items() if ".mlp." not in name})

    def moved(moments: Weights) -> dict[str, Tensor]:
        kept = dict(moments)
        for step in steps:
            kept = step(kept)
        return kept

    return Grown(larger, dict(found), moved, new_layers)


@torch.no_grad()
def become(model: Transformer, config: ModelConfig, weights: Weights) -> None:
    """Give a model another shape in place, so that all references to it see the larger one."""
    larger = build(config, dtype=model.dtype, device=str(model.device))
    larger.load_state_dict(dict(weights))
    larger.recompute = model.recompute
    larger.train(model.training)
    model.__dict__.update(larger.__dict__)


def grown_model(model: Transformer, wish: GrowthSettings, *, seed: int) -> tuple[Transformer, Grown]:
    """The larger model beside the small one."""
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    found = grow(model.config, weights, wish, seed=seed)
    larger = build(found.config, dtype=model.dtype, device=str(model.device))
    larger.load_state_dict(found.weights)
    return larger, found


@torch.no_grad()
def largest_difference(one: Transformer, other: Transformer, texts: Sequence[Sequence[int]]) -> float:
    """The largest difference between two models' logits on these token ids."""
    tokens = torch.tensor([token for text in texts for token in text], device=one.device)
    context = Documents([len(text) for text in texts], device=one.device)
    first, second = (model.logits(model(tokens, context)) for model in (one, other))
    return float((first - second).abs().max())


def probe(vocabulary: int, context: int, seed: int = 0) -> list[list[int]]:
    """Token ids drawn at random, in documents of several lengths, on which exactness is measured."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [min(length, context) for length in (1, 7, 32, 64)]
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
