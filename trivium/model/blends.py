"""Learned linear growth (LiGO, Wang et al., 2023): the large model's layers are sums of the small one's.

Each weight of new layer l starts as W_l = sum_j a_lj V_j over the weights V_j of the same part in all small
layers. For some steps the shares a are trained in place of the layers' weights, a few hundred numbers in all,
so that the loss itself says how the large model is best made of the small one; then the sums become plain
weights that train. At first a_lj is 1 for the layer that stacking would copy, and 0 for the others. The paper
also learns linear maps between widths; here width grows by `widen`, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trivium.kit.errors import TriviumError
from trivium.model.deepen import LAYER, Block
from trivium.model.growth import become
from trivium.model.transformer import Transformer

SHARES = ".parametrizations."
"""In the name of what is trained of a weight that is a sum."""


class Blend(nn.Module):
    """A weight as a sum of others: shares [old] times a stack [old, ...]."""

    def __init__(self, stack: nn.Parameter, first: Tensor) -> None:
        super().__init__()
        self.stack = stack
        self.first = first

    def forward(self, shares: Tensor) -> Tensor:
        """The weight."""
        return torch.tensordot(shares, self.stack, dims=1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The shares to begin with."""
        return self.first.to(weight)


def blend(model: Transformer, weights: Mapping[str, Tensor], blocks: Sequence[Block]) -> None:
    """Make all weights of layers sums of those of the small model's layers, and train the shares alone."""
    old = 1 + max(int(match[1]) for name in weights if (match := LAYER.match(name)))
    for part in sorted({match[2] for name in weights if (match := LAYER.match(name))}):
        found = [weights.get(f"layers.{layer}.{part}") for layer in range(old)]
        parts = [one for one in found if one is not None]
        if len(parts) < old or len({one.shape for one in parts}) > 1:
            raise TriviumError("`learned` adds up layers of one shape, and this model's differ: use `stack`.")
        stack = nn.Parameter(torch.stack(parts).to(model.device), requires_grad=False)
        owner, _, name = part.rpartition(".")
        for layer, block in enumerate(blocks):
            module = model.get_submodule(f"layers.{layer}.{owner}")
            first = torch.zeros(old)
            first[block.source] = 1.0
            parametrize.register_parametrization(module, name, Blend(stack, first), unsafe=True)


def settle(model: Transformer) -> None:
    """Make the sums plain weights that train, in a model of plain modules."""
    plain = {name: one for name, one in model.state_dict().items() if SHARES not in name}
    become(model, model.config, {**plain, **sums(model)})


@torch.no_grad()
def sums(model: Transformer) -> dict[str, Tensor]:
    """The weights that are sums at this moment, by the names that they will have."""
    return {
        f"{path}.{name}": getattr(module, name).detach()
        for path, module in model.named_modules() if parametrize.is_parametrized(module)
        for name in module.parametrizations  # type: ignore[union-attr]
    }  # fmt: skip
