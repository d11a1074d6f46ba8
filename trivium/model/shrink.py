"""A smaller model from a larger one: the start of a student.

Layers are dropped evenly, or those that change the stream least (block influence, ShortGPT,
arXiv:2403.03853: one minus the mean cosine between what enters a layer and what leaves it). Inner units,
heads and places of the stream go by the size of their activations on some text (Minitron, arXiv:2407.14679).
Where a share e of the stream's energy goes with d' - d of its places, the root mean square of the rest is
sqrt((1 - e) d' / d) times the old one, by which the norms' scales are multiplied. What is left computes
something near the old function and is meant to be trained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.deepen import LAYER
from trivium.model.experts import Mixture
from trivium.model.families import write_config
from trivium.model.transformer import Layer, Transformer


@dataclass(frozen=True)
class Importance:
    """How much each part did on some text; larger is more."""

    layers: Tensor
    """[layers], block influence"""
    inner: tuple[Tensor, ...]
    """Of each layer [inner width], the mean size of what enters its down projection"""
    heads: tuple[Tensor, ...]
    """Of each layer [key-value heads], the mean size of what its heads hand to the output projection"""
    stream: Tensor
    """[width], the share of the stream's energy in each place, the mean over norms"""


@torch.no_grad()
def importance(model: Transformer, texts: Sequence[Sequence[int]]) -> Importance:
    """Run the model over these token ids and note what its parts do."""
    config, handles = model.config, []
    influence = torch.zeros(config.layers)
    inner: list[Tensor] = [torch.zeros(0)] * config.layers
    heads: list[Tensor] = [torch.zeros(0)] * config.layers
    stream = torch.zeros(config.width)

    def layer_hook(layer: int) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            cosine = torch.nn.functional.cosine_similarity(inputs[0].float(), output.float(), dim=-1)
            influence[layer] = 1 - float(cosine.mean())

        return note

    def size_hook(found: list[Tensor], layer: int) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found[layer] = inputs[0].float().abs().mean(0).cpu()

        return note

    def norm_hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        energy = inputs[0].float().square()
        stream.add_((energy / energy.sum(-1, keepdim=True)).mean(0).cpu())

    for place, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        if isinstance(layer.mlp, Mixture):
            raise TriviumError("The importance of experts is not measured; drop layers evenly.")
        handles.append(layer.register_forward_hook(layer_hook(place)))
        handles.append(layer.mlp.down.register_forward_pre_hook(size_hook(inner, place)))
        handles.append(layer.attention.output.register_forward_pre_hook(size_hook(heads, place)))
        for norm in (layer.attention_norm, layer.mlp_norm):
            if norm is not None:
                handles.append(norm.register_forward_hook(norm_hook))
    handles.append(model.norm.register_forward_hook(norm_hook))
    try:
        tokens = torch.tensor([token for text in texts for token in text], device=model.device)
        model(tokens, Documents([len(text) for text in texts], device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    shared = (config.key_value_heads, -1)
    return Importance(
        influence,
        tuple(inner),
        tuple(one.view(shared).mean(1) for one in heads),
        stream / (2 * config.layers + 1),
    )


def kept_layers(config: ModelConfig, count: int, scores: Importance | None = None) -> list[int]:
    """Which layers stay, in their order: the most influential, or without scores evenly spread ones."""
    if not 1 <= count <= config.layers:
        raise TriviumError(f"The model has {config.layers} layers: keep from 1 to all of them, not {count}.")
    if scores is None:
        last = config.layers - 1
        return [round(one * last / max(count - 1, 1)) for one in range(count)]
    return sorted(scores.layers.topk(count).indices.tolist())


def without_layers(
    config: ModelConfig, weights: Mapping[str, Tensor], kept: Sequence[int]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with these layers alone."""
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = LAYER.match(name)
        if match is None:
            found[name] = tensor
        elif int(match[1]) in kept:
            found[f"layers.{list(kept).index(int(match[1]))}.{match[2]}"] = tensor
    return config.of_layers(kept), found


def narrowed_config(
    config: ModelConfig,
    *,
    width: int | None = None,
    key_value_heads: int | None = None,
    inner_width: int | None = None,
) -> ModelConfig:
    """The config of the narrower model; what is not given stays."""
    group = config.heads // config.key_value_heads
    shared = key_value_heads or config.key_value_heads
    wanted = {"width": width, "key_value_heads": key_value_heads, "inner_width": inner_width}
    for name, value in wanted.items():
        if value is not None and not 1 <= value <= getattr(config, name):
            raise TriviumError(
                f"`{name}` is {getattr(config, name)}: it shrinks to 1 or more, not to {value}."
            )
    if config.query_key_norm == "full" and shared != config.key_value_heads:
        raise TriviumError("Queries are normalised over all heads together: none of them can be left out.")
    if config.experts is not None and any(wanted.values()):
        raise TriviumError("A mixture of experts is not narrowed; drop `layers` only.")
    wide = width or config.width
    # Gemma's scale is the root of the width; Granite's is a number of its own.
    follows = config.embedding_scale == math.sqrt(config.width)
    scale = math.sqrt(wide) if follows else config.embedding_scale
    smaller = replace(
        config, width=wide, key_value_heads=shared, heads=shared * group, head_width=config.head_width,
        inner_width=inner_width or config.inner_width, embedding_scale=scale,
    )  # fmt: skip
    write_config(smaller)
    return smaller


def narrowed(
    config: ModelConfig, weights: Mapping[str, Tensor], scores: Importance, after: ModelConfig
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The model with its most active units: places of the stream, groups of heads, inner units."""
    group = config.heads // config.key_value_heads
    places = _best(scores.stream, after.width)
    kept = float(scores.stream[places].sum() / scores.stream.sum())
    rescale = (kept * config.width / after.width) ** 0.5
    one = 1.0 if config.norm_plus_one else 0.0
    scale = config.embedding_scale / after.embedding_scale
    # A tied head is the embedding: the norm before it takes back what the embedding is scaled by.
    last = rescale / scale if config.tied else rescale
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        *_, module, kind = name.split(".")
        layer = int(name.split(".")[1]) if name.startswith("layers.") else 0
        units = _best(scores.inner[layer], after.inner_width)
        keys = _best(scores.heads[layer], after.key_value_heads)
        per_key = _units(keys, config.head_width)
        per_query = _units(_units(keys, group), config.head_width)
        rows = {
            "query": per_query, "key": per_key, "value": per_key, "gate": units, "up": units,
            "output": places, "down": places,
        }.get(module)  # fmt: skip
        columns = {"output": per_query, "down": units}.get(module, places)
        if module in ("query_norm", "key_norm"):
            found[name] = tensor
        elif tensor.dim() == 1:
            found[name] = tensor[places if rows is None else rows].clone()
            if module.endswith("norm") and kind == "weight":
                found[name] = (found[name] + one) * (last if name == "norm.weight" else rescale) - one
        else:
            found[name] = (tensor if rows is None else tensor[rows])[:, columns].clone()
    if scale != 1:
        found["embedding.weight"] = found["embedding.weight"] * scale
    return after, found


def _best(scores: Tensor, count: int) -> Tensor:
    """The places of the largest scores, in order."""
    return scores.topk(count).indices.sort().values


def _units(places: Tensor, size: int) -> Tensor:
    """The numbers of these units, each `size` long."""
    return (places[:, None] * size + torch.arange(size)).flatten()
