"""What a step of curation is, and how the list `steps:` of a recipe names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as arrow
from pydantic import PrivateAttr

from trivium.curate.batch import Batch, Outcome
from trivium.curate.engines import Workers
from trivium.kit.steps import NamedStep, read_steps

Keys = dict[str, np.ndarray]


class Step(NamedStep):
    """One step: settings, and a function from a batch to what is said of its documents."""

    package: ClassVar[str] = "trivium.curate.steps"
    known: ClassVar[dict[str, type[Step]]] = {}
    needs_raw: ClassVar[bool] = False
    """Whether it reads bytes, as `extract` does, and so comes first."""

    _place: Path | None = PrivateAttr(default=None)
    _answers: Sequence[Path] = PrivateAttr(default=())
    """Files of answers that models gave to other stages."""

    @property
    def title(self) -> str:
        """What the funnel calls this step."""
        return self.name

    def columns(self) -> dict[str, arrow.DataType]:
        """The columns it adds."""
        return {}

    def check(self) -> None:
        """Refuse what could not run here, such as a library that is missing, before any work begins."""

    def prepare(self, place: Path, where: Mapping[str, Path]) -> None:
        """Write to `place` what every process needs of it; `where` says where what it mentions lies."""

    def run(self, batch: Batch) -> Outcome:
        """What is said of these documents."""
        return Outcome()


@dataclass
class Decision:
    """Where the decisions on a shard stand, and how far in it the batches have come."""

    folder: Path
    shard: int
    row: int = 0
    """The batch's first document in its shard."""
    seen: int = 0
    """How many keys the batches before had, where a document has several."""

    def of(self, batch: Batch, name: str) -> np.ndarray:
        """What was decided on the batch's documents under this name, as `split_by_shard` wrote it."""
        rows = slice(self.row, self.row + batch.size)
        return np.load(self.folder / f"{self.shard:05d}.{name}.npy", mmap_mode="r")[rows]


class WholeStep(Step):
    """A step that has to see all documents: keys of each, one decision on all keys, then the verdicts.

    `run` comes before the keys and may add columns.
    """

    def keys(self, batch: Batch) -> Keys:
        """What decides about these documents, as arrays that are joined along their first axis."""
        raise NotImplementedError

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        """Write the decision on all shards' keys to the folder `to`; returns facts for the funnel.

        Each path holds one array a key: `<path>/<name>.npy`.
        """
        raise NotImplementedError

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        """What was decided about these documents."""
        raise NotImplementedError


def parse_steps(written: Any) -> list[Step]:
    """The steps of a list such as `[repair, {filters: gopher}]`; a ValueError says what is wrong."""
    steps = read_steps(written, Step.all(), "[repair, {filters: gopher}]")
    for place, step in enumerate(steps):
        if step.needs_raw and place:
            raise ValueError(f"`{step.name}` reads the files themselves, so it has to be the first step")
    return steps
