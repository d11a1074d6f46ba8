"""What a stage gives the loop: an objective and a batch source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from trivium.data.rows import Batch, PackedSequence

Measure = tuple[Tensor | float, Tensor | float]
"""A sum and its weight, by which it is divided at the end."""


class Minimum(NamedTuple):
    """A measure of which the smallest of all parts is logged."""

    value: Tensor | float
    weight: float = 1.0


class Maximum(NamedTuple):
    """A measure of which the largest of all parts is logged."""

    value: Tensor | float
    weight: float = 1.0


def accumulate(known: dict[str, Measure], more: Mapping[str, Measure]) -> None:
    """Add to what is known what another pass, or another process, has measured."""
    for name, measure in more.items():
        known[name] = _joined(known[name], measure) if name in known else measure


def _joined(one: Measure, other: Measure) -> Measure:
    if isinstance(one, Minimum):
        return Minimum(min(one[0], other[0]))
    if isinstance(one, Maximum):
        return Maximum(max(one[0], other[0]))
    return one[0] + other[0], one[1] + other[1]


@dataclass
class Loss:
    """The differentiable sum over a batch, and what to log."""

    sum: Tensor
    metrics: Mapping[str, Measure] = field(default_factory=dict)


class Objective(Protocol):
    """Turns packed batches into a loss sum; what divides it is the weight of the whole step."""

    name: str

    @property
    def extra(self) -> nn.Module | None:
        """Weights of its own that are trained and saved along, such as a value head."""

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """What these rows add to the divisor of the step's loss."""

    def loss(self, model: Any, batch: Batch) -> Loss:
        """The loss sum of a batch under the model."""


class BatchSource(Protocol):
    """Where batches come from: shards, whose batches follow from the step alone, or rollouts."""

    @property
    def steps(self) -> int:
        """How many optimiser steps it lasts."""

    @property
    def fingerprint(self) -> str:
        """Changes when any batch could change."""

    def rows(self, step: int) -> list[PackedSequence]:
        """The global batch of an optimiser step."""

    def metrics(self, step: int) -> Mapping[str, float]:
        """What to log of the batch of a step that `rows` has made."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it needs to go on from here after a stop."""

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
