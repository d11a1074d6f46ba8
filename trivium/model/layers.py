"""The parts of a layer: norms and the inner network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model.config import ModelConfig
from trivium.model.operations import gated_inner, multiply, normalise, project


class RMSNorm(nn.Module):
    """Divide by the root mean square, then scale."""

    def __init__(self, width: int, epsilon: float, plus_one: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width) if plus_one else torch.ones(width))
        self.epsilon = epsilon
        self.plus_one = plus_one

    def forward(self, rows: Tensor) -> Tensor:
        if self.plus_one:
            # Gemma rounds to the weights' precision only after scaling.
            scaled = normalise(rows.float(), 1.0 + self.weight.float(), self.epsilon)
            return scaled.to(rows.dtype)
        return normalise(rows, self.weight, self.epsilon)


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
            (up,) = multiply(rows, self.up)
            return multiply(activate(self.activation, up), self.down)[0]
        if self.activation == "silu":
            return gated_inner(rows, self.gate, self.up, self.down)
        gate, up = project(rows, self.gate, self.up)
        return multiply(activate(self.activation, gate) * up, self.down)[0]
