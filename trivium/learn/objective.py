"""What a stage gives the loop: an objective and a feed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from trivium.data.rows import Batch, Row

Measure = tuple[Tensor | float, Tensor | float]


@dataclass
class Loss:
    """The differentiable sum over a batch, and what to log: name -> (sum, weight), divided at the end."""

    sum: Tensor
    metrics: Mapping[str, Measure] = field(default_factory=dict)


class Objective(Protocol):
    """Turns packed batches into a loss sum; what divides it is the weight of the whole step."""

    name: str

    @property
    def extra(self) -> nn.Module | None:
        """Weights of its own that are trained and saved along, such as a value head."""
        ...

    def weight(self, rows: Sequence[Row]) -> float:
        """What these rows add to the divisor of the step's loss."""
        ...

    def loss(self, model: Any, batch: Batch) -> Loss:
        """The loss sum of a batch under the model."""
        ...


class Feed(Protocol):
    """Where batches come from: shards, whose batches follow from the step alone, or rollouts."""

    @property
    def steps(self) -> int:
        """How many optimiser steps it lasts."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when any batch could change."""
        ...

    def rows(self, step: int) -> list[Row]:
        """The global batch of an optimiser step."""
        ...

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it needs to go on from here after a stop."""
        ...

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        ...
