"""The parts of a layer: norms and the inner network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model.config import ModelConfig


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale."""

    def __init__(self, width: int, epsilon: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.epsilon = epsilon
        self.plus_one = plus_one

    def forward(self, rows: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float() if self.plus_one else self.weight
        if rows.dtype == torch.float32:
            return F.rms_norm(rows, rows.shape[-1:], weight, self.epsilon)
        normal = F.rms_norm(rows.float(), rows.shape[-1:], None, self.epsilon)
        if self.plus_one:
            return (normal * weight).to(rows.dtype)
        return normal.to(rows.dtype) * weight


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """The family's norm over the last `width` numbers."""
    if config.norm == "layer":
        return nn.LayerNorm(width, eps=config.norm_epsilon)
    return RMSNorm(width, config.norm_epsilon, config.norm_plus_one)


def activate(name: str, rows: Tensor) -> Tensor:
    """The inner network's non-linearity."""
    if name == "silu":
        return F.silu(rows)
    return F.gelu(rows, approximate="tanh" if name == "gelu_tanh" else "none")


class Inner(nn.Module):
    """The inner network: gated (SwiGLU, GeGLU) or plain."""

    def __init__(self, config: ModelConfig, inner_width: int) -> None:
        super().__init__()
        bias = config.inner_bias
        self.activation = config.activation
        self.gate = nn.Linear(config.width, inner_width, bias=bias) if config.gated else None
        self.up = nn.Linear(config.width, inner_width, bias=bias)
        self.down = nn.Linear(inner_width, config.width, bias=bias)

    def forward(self, rows: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(activate(self.activation, self.up(rows)))
        return self.down(activate(self.activation, self.gate(rows)) * self.up(rows))
