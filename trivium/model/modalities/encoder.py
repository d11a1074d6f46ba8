"""A bidirectional transformer over the pieces of an item: in our own encoders, CLIP, SigLIP and Whisper."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model.arithmetic import note_module, note_products

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]


@dataclass(frozen=True)
class EncoderConfig:
    """The shape of an encoder, whichever family it is of."""

    width: int
    layers: int
    heads: int
    inner_width: int
    activation: Activation = "gelu_tanh"
    epsilon: float = 1e-6
    key_bias: bool = True
    """Whisper's keys have no bias."""
    norm_before: bool = False
    """CLIP normalises what enters its first layer."""
    norm_after: bool = True
    """Whether what leaves is normalised; LLaVA takes the states of an inner layer, which are not."""


def activated(rows: Tensor, activation: Activation) -> Tensor:
    """The rows after the activation function."""
    if activation == "quick_gelu":
        return rows * torch.sigmoid(1.702 * rows)
    return F.gelu(rows, approximate="tanh" if activation == "gelu_tanh" else "none")


class EncoderLayer(nn.Module):
    """Attention among all pieces, then an inner network, each on normalised rows and added to the stream."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        width = config.width
        self.count, self.activation = config.heads, config.activation
        self.attention_norm = nn.LayerNorm(width, config.epsilon)
        self.query, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=config.key_bias)
        self.output = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, config.epsilon)
        self.up, self.down = nn.Linear(width, config.inner_width), nn.Linear(config.inner_width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """The stream of a batch of items, [items, pieces, width], one layer further."""
        rows = self.attention_norm(stream)
        for part in (self.query, self.key, self.value):
            note_module(part, rows)
        query, key, value = (
            part(rows).unflatten(-1, (self.count, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        times = 3 if torch.is_grad_enabled() and query.requires_grad else 1
        note_products(query.flatten(0, 1), key.flatten(0, 1).mT, 2 * times)
        note_module(self.output, mixed)
        stream = stream + self.output(mixed)
        rows = self.mlp_norm(stream)
        note_module(self.up, rows)
        inner = activated(self.up(rows), self.activation)
        note_module(self.down, inner)
        return stream + self.down(inner)


class Encoder(nn.Module):
    """The layers, with a norm before and after them where the family has one."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_before = nn.LayerNorm(config.width, config.epsilon) if config.norm_before else None
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.layers))
        self.norm_after = nn.LayerNorm(config.width, config.epsilon) if config.norm_after else None

    def forward(self, stream: Tensor) -> Tensor:
        """States of the same shape, [items, pieces, width]."""
        if self.norm_before is not None:
            stream = self.norm_before(stream)
        for layer in self.layers:
            stream = layer(stream)
        return stream if self.norm_after is None else self.norm_after(stream)
