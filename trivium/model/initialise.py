"""New weights: small models that learn fast under Muon from their first step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trivium.model.config import ModelConfig
from trivium.model.transformer import Transformer
from trivium.model.unfilled import unfilled

EMBEDDING_DEVIATION = 0.5
HEAD_DEVIATION = 0.002
Put = Callable[[Tensor, Tensor], object]
"""Writes numbers [...] into a weight of the same shape, of which this process may hold a part."""


def empty_model(config: ModelConfig) -> Transformer:
    """A model that has shapes and no numbers."""
    with unfilled():
        return Transformer(config)


def build(config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Transformer:
    """A model whose weights are allocated and not yet filled."""
    model = empty_model(config)
    give_room(model.to(dtype), device)
    return model


def give_room(model: nn.Module, device: str) -> None:
    """Allocate every weight, in place; as `to_empty` does, for which torch would import its compiler."""
    for module in model.modules():
        for name, one in module.named_parameters(recurse=False):
            room = torch.empty(one.shape, dtype=one.dtype, device=device)
            setattr(module, name, nn.Parameter(room, requires_grad=one.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def new_model(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Transformer:
    """A model with fresh weights that depend on the seed alone."""
    model = build(config, dtype=dtype, device=device)
    initialise(model, seed)
    return model


@torch.no_grad()
def initialise(model: Transformer, seed: int, put: Put = Tensor.copy_) -> None:
    """Fill every weight, in the order of their names, from one seeded generator on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def normal(weight: torch.Tensor, deviation: float) -> None:
        values = torch.empty(weight.shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)
        put(weight, values)

    for name, module in sorted(model.named_modules()):
        if isinstance(module, nn.Embedding):
            # A tied matrix is also the head: its scores must start near zero, so it starts small.
            normal(module.weight, model.config.width**-0.5 if model.config.tied else EMBEDDING_DEVIATION)
        elif isinstance(module, nn.Linear):
            if name.endswith((".output", ".down")):
                # What a layer adds starts at zero: the stream is the embedding, every layer's first
                # gradient is clean, and Muon's fixed-size updates need no warm-up for depth.
                module.weight.zero_()
            elif name == "head":
                # Nearly uniform predictions: the loss starts at log(vocabulary).
                normal(module.weight, HEAD_DEVIATION)
            else:
                # The variance of a row's outputs equals that of its (normalised) inputs.
                normal(module.weight, module.in_features**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif hasattr(module, "weight") and isinstance(module.weight, nn.Parameter):
            module.weight.fill_(0.0 if getattr(module, "plus_one", False) else 1.0)
            if getattr(module, "bias", None) is not None:
                module.bias.zero_()
