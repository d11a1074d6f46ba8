"""The weights the engine computes with: the model's own, or a rounded copy that follows them.

A model that is trained keeps its weights in float32. To read them so for every token costs a GPU twice the
time and the cache twice the room, so there the engine has a bfloat16 copy, half as large as the model: a
plain one, in which adapters are added to their matrices and whole numbers multiplied out. It is written in
place, before the first request after a step of the optimiser.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.generate.matrices import matrix_of
from trivium.kit.errors import TriviumError
from trivium.kit.machine import compute_dtype
from trivium.model.initialise import build
from trivium.model.lora import AdaptedLinear, selection_of
from trivium.model.quantize import is_quantised, rounds_rows
from trivium.model.transformer import Transformer

Versions = list[tuple[int, int] | str | None]


def engine_dtype(model: Transformer) -> torch.dtype:
    """The type the engine computes in unless it is told: float32 weights are rounded where that is faster."""
    best = compute_dtype(str(model.device))
    return best if model.dtype == torch.float32 and can_be_copied(model) else model.dtype


def can_be_copied(model: Transformer) -> bool:
    """Whether a plain model can stand for this one: one adapter at most, and nothing that rounds rows."""
    selection = selection_of(model)
    if selection is not None and selection.names != [selection.active]:
        return False
    return all(
        type(module) in (nn.Linear, AdaptedLinear)
        and not (is_quantised(module.weight) and rounds_rows(module.weight))
        and not module._forward_pre_hooks
        and not module._forward_hooks
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def versions(model: Transformer) -> Versions:
    """What changes whenever an optimiser steps; writes through `.data` leave no trace."""
    weights = [one for one in model.parameters() if not is_quantised(one)]
    selection = selection_of(model)
    seen = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]
    return [*seen, None if selection is None else selection.active]


class Followed:
    """A model in the type the engine computes in: the model itself, or a plain copy that follows it."""

    def __init__(self, source: Transformer, dtype: torch.dtype | None = None) -> None:
        self.source = source
        self.dtype = dtype or engine_dtype(source)
        self.copied = self.dtype != source.dtype
        self.model = source
        if self.copied:
            if not can_be_copied(source):
                raise TriviumError(
                    f"an engine cannot compute in {str(self.dtype).removeprefix('torch.')} with this model, "
                    "which holds several adapters or rounds what it multiplies; load it in that type."
                )
            self.model = build(source.config, dtype=self.dtype, device=str(source.device)).eval()
            self.model.requires_grad_(False)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now."""
        if not self.copied:
            return
        self.seen = versions(self.source)
        for name, target in self.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            target.copy_(_value(self.source.get_submodule(path), leaf))

    def refresh_if_changed(self) -> None:
        """Take over the weights if an optimiser has stepped since."""
        if self.copied and versions(self.source) != self.seen:
            self.refresh()


def _value(module: nn.Module, leaf: str) -> Tensor:
    """A weight of the model as a plain model would hold it."""
    if leaf == "weight" and isinstance(module, nn.Linear):
        return matrix_of(module)
    value: Tensor = getattr(module, leaf)
    return value.detach()
