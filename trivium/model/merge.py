"""Souping: one set of weights made from several that share an ancestor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig

Weights = Mapping[str, Tensor]


def check_one_shape(configs: Sequence[ModelConfig], names: Sequence[str]) -> None:
    """Refuse models whose configurations differ, as in their positions, though every tensor may fit."""
    first = asdict(configs[0])
    for config, name in zip(configs[1:], names[1:]):
        for key, value in asdict(config).items():
            if key != "extra" and value != first[key]:
                raise TriviumError(
                    f"'{names[0]}' and '{name}' cannot be merged: {key.replace('_', ' ')} is {first[key]} in "
                    f"one and {value} in the other; merge models of one shape"
                )


def check_alike(models: Sequence[Weights], names: Sequence[str]) -> None:
    """Refuse models whose tensors differ in name or shape, naming the first that does."""
    first = models[0]
    for model, name in zip(models[1:], names[1:]):
        for key in first.keys() ^ model.keys():
            raise TriviumError(
                f"'{names[0]}' and '{name}' cannot be merged: only one of them has the tensor '{key}'; "
                "merge models of one shape"
            )
        for key, tensor in first.items():
            if tensor.shape != model[key].shape:
                raise TriviumError(
                    f"'{names[0]}' and '{name}' cannot be merged: '{key}' is {tuple(tensor.shape)} in one "
                    f"and {tuple(model[key].shape)} in the other; merge models of one shape"
                )


def mean(models: Sequence[Weights], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of every tensor, summed in double precision; weights are scaled to sum to one."""
    shares = [1.0] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or sum(shares) == 0:
        raise TriviumError(f"{len(models)} models need as many weights with a sum other than 0, not {shares}")
    total = sum(shares)
    merged = {}
    for key, tensor in models[0].items():
        soup = sum((share / total) * model[key].double() for share, model in zip(shares, models))
        assert isinstance(soup, Tensor)
        merged[key] = soup.to(tensor.dtype)
    return merged


def slerp(first: Weights, second: Weights, share: float) -> dict[str, Tensor]:
    """Move along the great circle from the first model to the second, tensor by tensor."""
    merged = {}
    for key, start in first.items():
        a, b = start.double(), second[key].double()
        lengths = a.norm() * b.norm()
        cosine = float((a * b).sum() / lengths) if lengths > 0 else 1.0
        angle = math.acos(max(-1.0, min(1.0, cosine)))
        if math.sin(angle) < 1e-6:
            # Parallel tensors span no circle; the straight line is its limit.
            mixed = (1 - share) * a + share * b
        else:
            mixed = (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
        merged[key] = mixed.to(start.dtype)
    return merged


def task_vectors(base: Weights, models: Sequence[Weights]) -> list[dict[str, Tensor]]:
    """What each model learnt since the base: its weights minus the base's (Ilharco et al., 2212.04089)."""
    return [{key: model[key].double() - tensor.double() for key, tensor in base.items()} for model in models]


def add_task_vectors(base: Weights, vectors: Sequence[Weights], scales: Sequence[float]) -> dict[str, Tensor]:
    """Task arithmetic: the base plus each task vector times its scale; a negative scale makes it forget."""
    merged = {}
    for key, tensor in base.items():
        moved = tensor.double()
        for vector, scale in zip(vectors, scales, strict=True):
            moved = moved + scale * vector[key]
        merged[key] = moved.to(tensor.dtype)
    return merged


def trim(vector: Weights, density: float) -> dict[str, Tensor]:
    """Keep the largest share of a whole task vector's entries by magnitude and set the rest to zero."""
    # One threshold for all tensors, as in the paper: where little was learnt, little is kept.
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.values()])
    count = max(1, round(density * sizes.numel()))
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    return {key: torch.where(tensor.abs() >= threshold, tensor, 0.0) for key, tensor in vector.items()}


def ties(
    base: Weights, models: Sequence[Weights], *, density: float = 0.2, scale: float = 1.0
) -> dict[str, Tensor]:
    """TIES (Yadav et al., 2306.01708): trim, elect each sign by total mass, average those that agree."""
    trimmed = [trim(vector, density) for vector in task_vectors(base, models)]
    merged = {}
    for key, tensor in base.items():
        stack = torch.stack([vector[key] for vector in trimmed])
        elected = torch.sign(stack.sum(0))
        agrees = (torch.sign(stack) == elected) & (stack != 0)
        average = (stack * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        merged[key] = (tensor.double() + scale * average).to(tensor.dtype)
    return merged


def drop_and_rescale(vector: Weights, density: float, seed: int) -> dict[str, Tensor]:
    """DARE (Yu et al., 2311.03099): drop entries at random and scale the rest so that the mean stays."""
    generator = torch.Generator().manual_seed(seed)
    thinned = {}
    for key in sorted(vector):
        kept = torch.rand(vector[key].shape, generator=generator) < density
        thinned[key] = vector[key] * kept / density
    return thinned


def dare(
    base: Weights, models: Sequence[Weights], *, density: float = 0.5, scale: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """The base plus the mean of the models' task vectors, each thinned by DARE."""
    vectors = [
        drop_and_rescale(vector, density, seed + index)
        for index, vector in enumerate(task_vectors(base, models))
    ]
    return add_task_vectors(base, vectors, [scale / len(vectors)] * len(vectors))
