"""Matrices of one input that lie one under the other in memory, so that a GPU multiplies them in one call.

Queries, keys and values are three products of the same rows, gate and up two. In a decode step each of them
is limited by the reading of its weights and by the start of its kernel; together they start once. The
model's own weights become parts of the stack: nothing is held twice, and what is written to them in place
is at once the stack's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from trivium.model.operations import Stack
from trivium.model.quantize import is_quantised
from trivium.model.transformer import Transformer


def gains(device: torch.device) -> bool:
    """Whether stacks are faster there. On a processor `forward.FusedForward` has its own."""
    return device.type == "cuda"


class StackedModel:
    """A model to compute with, made of another one's weights; made anew where its modules have changed."""

    def __init__(self, source: Transformer) -> None:
        self.source = source
        self.model, self._made_of = _stacked(source), _parts(source)

    def follow(self) -> None:
        """Stack the weights again if one of them has moved, or a module has come or gone."""
        if _parts(self.source) != self._made_of:
            self.model, self._made_of = _stacked(self.source), _parts(self.source)


def _parts(model: Transformer) -> list[tuple[int, torch.dtype]]:
    """The modules of a model and where its weights lie."""
    modules = [(id(one), torch.int64) for one in model.modules()]
    return modules + [(one.data_ptr(), one.dtype) for one in model.parameters() if not is_quantised(one)]


GROUPS = {"attention": ("query", "key", "value"), "mlp": ("gate", "up")}
"""The projections of a part of a layer that read the same rows."""


def _can_be_stacked(parts: Sequence[nn.Module | None]) -> TypeGuard[list[nn.Linear]]:
    """Whether these are plain matrices of one type, all with a bias or all without."""
    kinds = set()
    for one in parts:
        if type(one) is not nn.Linear or type(one.weight) is not nn.Parameter:
            return False
        if one._forward_hooks or one._forward_pre_hooks:
            return False
        kinds.add((one.weight.dtype, one.bias is None))
    return len(kinds) == 1


def _stacked(model: Transformer) -> Transformer:
    """Copies of the modules, not of the weights, in which the first of a group computes all of it."""
    fast, layers = _twin(model), _twin(model.layers)
    fast._modules["layers"] = layers
    for number, layer in enumerate(model.layers):
        other = layers._modules[str(number)] = _twin(layer)
        for owner, names in GROUPS.items():
            part = layer.get_submodule(owner)
            parts = [part._modules.get(name) for name in names]
            if _can_be_stacked(parts):
                twin = other._modules[owner] = _twin(part)
                twin._modules[names[0]] = _stack(parts)
    return fast


Module = TypeVar("Module", bound=nn.Module)


def _twin(module: Module) -> Module:
    """The same module with a table of children of its own."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin


def _stack(parts: Sequence[nn.Linear]) -> Stack:
    sizes = [len(one.weight) for one in parts]
    weight, bias = _joined([one.weight for one in parts]), None
    if parts[0].bias is not None:
        bias = _joined([one.bias for one in parts])
    return Stack(weight, bias, sizes)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    """One tensor of which these are made parts, one after the other."""
    # What is made in inference mode could not be trained afterwards.
    with torch.inference_mode(False), torch.no_grad():
        whole = torch.cat([one.detach() for one in weights])
    for weight, part in zip(weights, whole.split([len(one) for one in weights]), strict=True):
        weight.data = part
    return whole
