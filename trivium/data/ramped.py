"""Rows that grow longer within one stage: packed batches one part after the other, all of one mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from trivium.data.batches import PlannedBatches
from trivium.data.ingredients import Ingredient, part_of, weighted
from trivium.data.packed import PackedBatches
from trivium.data.rows import PackedSequence
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint


class RampedBatches(PlannedBatches):
    """Global batches as a pure function of the step, whose rows grow through the given lengths."""

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        *,
        contexts: Sequence[int],
        batch_tokens: int,
        seed: int,
        tokens: int | None = None,
        steps: int | None = None,
        epochs: float | None = None,
    ) -> None:
        count = len(contexts)
        if steps is not None and steps < count:
            raise TriviumError(
                f"context: {count} lengths need a step each, and the stage has {steps}; raise `steps`."
            )
        self.parts: list[PackedBatches] = []
        # Weights tie the parts together, so sources without one count by their tokens.
        self.ingredients = weighted(ingredients)
        seen = [one.seen for one in self.ingredients]
        for number, context in enumerate(contexts):
            now = []
            for one, passes in zip(self.ingredients, seen):
                assert one.weights is not None, "every source has a weight"
                knots = part_of(one.weights, number / count, (number + 1) / count)
                # Every length packs other rows; the part of a pass that is done carries over.
                now.append(replace(one, weights=knots, seen=passes))
            self.parts.append(
                PackedBatches(
                    now,
                    context=context,
                    batch_tokens=batch_tokens,
                    seed=seed,
                    tokens=None if tokens is None else round(tokens / count),
                    steps=None if steps is None else (number + 1) * steps // count - number * steps // count,
                    epochs=None if epochs is None else epochs / count,
                )
            )
            seen = [facts["passes"] for facts in self.parts[-1].report().values()]
        self.names = self.parts[0].names

    @property
    def steps(self) -> int:
        return sum(part.steps for part in self.parts)

    @property
    def fingerprint(self) -> str:
        return fingerprint([part.fingerprint for part in self.parts])

    def rows(self, step: int) -> list[PackedSequence]:
        for part in self.parts:
            if step < part.steps:
                return part.rows(step)
            step -= part.steps
        raise AssertionError("the stage has no such step")

    def order(self) -> Mapping[str, Any]:
        return {"plans": [part.plan.hash for part in self.parts]}

    def consumed(self, step: int) -> dict[str, float]:
        for part in self.parts[:-1]:
            if step <= part.steps:
                return part.consumed(step)
            step -= part.steps
        return self.parts[-1].consumed(step)

    def shares(self, step: int) -> dict[str, float]:
        found = dict.fromkeys(self.names, 0.0)
        left = step
        for part in self.parts:
            here = min(left, part.steps)
            left -= here
            for name, share in part.shares(here).items():
                found[name] += share * here / max(1, step)
        return found

    def report(self) -> dict[str, dict[str, float]]:
        whole: dict[str, dict[str, float]] = {}
        for part in self.parts:
            for name, facts in part.report().items():
                share = facts["share"] * part.steps / self.steps
                before = whole.get(name, {"rows_drawn": 0, "share": 0.0})
                whole[name] = {
                    **facts,
                    "rows_drawn": before["rows_drawn"] + facts["rows_drawn"],
                    "share": before["share"] + share,
                }
        return whole
