"""What all batches that are planned ahead have in common: the step alone says which rows come."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trivium.data.mixture import MixturePlan
from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from torch import Tensor


class PlannedBatches:
    """Batches as a pure function of the step, for any number of processes, before and after a stop."""

    changed: ClassVar[str] = "data, the mixture or the seed has changed"
    plan: MixturePlan
    ahead: ClassVar[bool] = True
    """Whether the rows of a step can be made before those of the step before are trained on."""

    @property
    def steps(self) -> int:
        """How many optimiser steps the plan lasts."""
        return self.plan.steps

    def order(self) -> Mapping[str, Any]:
        """What decides the order of all rows."""
        return {"plan": self.plan.hash}

    def metrics(self, step: int) -> Mapping[str, float]:
        """Nothing to log besides what the objective measures."""
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All there is to remember: which plan this is. Where in it, the trainer's step says."""
        return dict(self.order()), {}

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Refuse to go on with another order than the one the run began with."""
        if any(json.get(name) != value for name, value in self.order().items()):
            raise TriviumError(
                f"The {self.changed} since this run began, so it cannot go on; "
                "undo the change or start the stage again."
            )

    def consumed(self, step: int) -> dict[str, float]:
        """The passes over every source after `step` steps, by its origin, where a later stage counts them."""
        return {}

    def shares(self, step: int) -> dict[str, float]:
        """The share of every source in the first `step` steps, where a later stage may replay them."""
        return {}
