"""Quality: a classifier's score for every document, and only the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as arrow
from pydantic import Field, model_validator

from trivium.curate.batch import Batch, Outcome
from trivium.curate.keys import joined, split_by_shard
from trivium.curate.step import Decision, Keys, WholeStep


class Quality(WholeStep):
    """Score documents in the column `quality`, and keep the best share or those above a score.

    A share is a quantile of this corpus: thresholds cannot be carried from one corpus to another.
    """

    name: ClassVar[str] = "quality"
    short: ClassVar[str] = "classifier"

    classifier: str
    """A `quality_classifier` stage."""
    keep: float | None = Field(default=None, gt=0, le=1)
    """The share of documents that is kept, the best first; all if neither this nor `least` is said."""
    least: float | None = Field(default=None, ge=0, le=1)
    """The score a document needs."""

    @model_validator(mode="after")
    def _one_bound(self) -> Quality:
        if self.keep is not None and self.least is not None:
            raise ValueError("say `keep` or `least`, not both")
        return self

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("classifier", self.classifier, ("classifier",))]

    def locate(self, where: Mapping[str, Path]) -> None:
        self.classifier = str(where[self.classifier])

    def columns(self) -> dict[str, arrow.DataType]:
        return {"quality": arrow.float32()}

    def run(self, batch: Batch) -> Outcome:
        # Torch is needed for this step alone.
        from trivium.curate.classifier import loaded

        scores = loaded(self.classifier).scores(batch.texts)
        return Outcome(columns={"quality": arrow.array(scores.astype(np.float32))})

    def keys(self, batch: Batch) -> Keys:
        return {"quality": batch.numbers("quality").astype(np.float32)}

    def decide(self, shards: Sequence[Path], to: Path) -> dict[str, Any]:
        scores = joined(shards, "quality")
        kept = np.ones(len(scores), dtype=bool)
        if self.least is not None:
            kept = scores >= self.least
        elif self.keep is not None:
            kept[np.argsort(-scores, kind="stable")[round(self.keep * len(scores)) :]] = False
        split_by_shard(shards, to, kept=kept)
        bound = float(scores[kept].min()) if kept.any() else None
        return {"lowest score kept": bound, "kept": int(kept.sum())}

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        place = slice(decision.row, decision.row + batch.size)
        kept = np.load(decision.folder / f"{decision.shard:05d}.kept.npy", mmap_mode="r")[place]
        scores = batch.numbers("quality")
        return Outcome(
            [None if one else f"low quality: score {score:.3f}" for one, score in zip(kept, scores)]
        )
