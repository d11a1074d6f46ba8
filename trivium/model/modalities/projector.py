"""The projector: an encoder's states, some of them joined, to rows as wide as the embeddings of tokens."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model.arithmetic import note_module
from trivium.model.modalities.encoder import Activation, activated


@dataclass(frozen=True)
class ProjectorConfig:
    """`linear`, or the `mlp` of LLaVA-1.5; `join` states become one row: so many along each side of a
    picture (pixel shuffle), or in the time of a sound."""

    kind: Literal["linear", "mlp"]
    states: int
    """The width of a state."""
    width: int
    """The width of the language model."""
    join: int = 1
    bias: bool = True
    activation: Activation = "gelu"


class Projector(nn.Module):
    """One or two matrices."""

    def __init__(self, config: ProjectorConfig, joined: int) -> None:
        """`joined` states are one row."""
        super().__init__()
        self.config = config
        wide = config.states * joined
        hidden = config.width if config.kind == "mlp" else None
        self.up = None if hidden is None else nn.Linear(wide, hidden, bias=config.bias)
        self.out = nn.Linear(hidden or wide, config.width, bias=config.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows of joined states, [..., states × joined] -> [..., width]."""
        if self.up is not None:
            note_module(self.up, rows)
            rows = activated(self.up(rows), self.config.activation)
        note_module(self.out, rows)
        return self.out(rows)


def pixel_shuffled(states: Tensor, join: int) -> Tensor:
    """Squares of join × join neighbouring patches as one row: [tiles, n × n, width] -> [tiles, (n/join)²,
    width × join²]."""
    if join == 1:
        return states
    across = round(states.shape[1] ** 0.5)
    grid = states.unflatten(1, (across // join, join, across // join, join))
    return grid.transpose(2, 3).flatten(3).flatten(1, 2)


def stacked(states: Tensor, join: int) -> Tensor:
    """Runs of `join` states in time as one row, the last filled with zeros: [sounds, n, width] -> [sounds,
    n / join, width × join]."""
    if join == 1:
        return states
    return F.pad(states, (0, 0, 0, -states.shape[1] % join)).unflatten(1, (-1, join)).flatten(2)
