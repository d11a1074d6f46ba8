"""Masked growth (MSG, Yao et al., 2023): what is new is multiplied by a mask that rises from 0 to 1.

A new layer adds c * f(h) to the stream. At c = 0 the grown model computes exactly what the small one did,
whatever the new weights are: so a layer can start as a whole copy of the one before it, and need not be
silenced weight by weight as identity blocks are. While c rises, the model meets what is new a little at a
time; at 1 the mask is gone. Only layers have masks; a wider one is kept exact by its weights (`widen`).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from trivium.model.deepen import silenced
from trivium.model.transformer import Transformer


def set_mask(model: Transformer, layers: Collection[int], share: float) -> None:
    """Let these layers add this share of what they compute."""
    for number in layers:
        model.layers[number].residual_scale = model.config.residual_scale * share  # type: ignore[assignment]


def is_masked(model: Transformer) -> bool:
    """Whether a mask of any layer is below 1."""
    return any(layer.residual_scale != model.config.residual_scale for layer in model.layers)


@torch.no_grad()
def unmasked(model: Transformer) -> dict[str, Tensor]:
    """The weights of masked layers that make the same model without a mask: what a file can say."""
    found = {}
    for number, layer in enumerate(model.layers):
        share = float(layer.residual_scale) / model.config.residual_scale  # type: ignore[arg-type]
        if share != 1.0:
            prefix = f"layers.{number}."
            for name, weight in layer.named_parameters():
                found[prefix + name] = silenced(model.config, name, weight.detach(), share)
    return found
