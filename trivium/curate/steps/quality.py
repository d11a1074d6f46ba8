"""Quality: a classifier's score for every document, and only the best of them.

With `rejudge` a model reads the documents whose score lies nearest to the bound, where the classifier is
least sure on which side they are: of all documents in the order of their scores, a stretch around the bound.
Within it the model's score decides, and the classifier's where two are equal; outside it nothing is asked.
All is asked by the process that decides, so neither the number of processes nor a kill changes what is asked;
answers lie on disk as they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
from pydantic import Field, PrivateAttr, model_validator

from trivium.curate.batch import Batch, Outcome
from trivium.curate.engines import Workers
from trivium.curate.keys import joined, sizes, split_by_shard
from trivium.curate.step import Decision, Keys, WholeStep
from trivium.generate.asking.journal import ANSWERS
from trivium.generate.asking.rubric import TextJudge


class Rejudge(TextJudge):
    """A model that scores again the documents about which the classifier is least sure."""

    band: float = Field(default=0.2, gt=0, le=1)
    """The share of all documents that it reads: those nearest to the bound, half on each side of it."""


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
    rejudge: Rejudge | None = None
    """A model (`model` or `endpoint`, `rubric`, `scale`) that decides in a `band` around the bound."""

    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _one_bound(self) -> Quality:
        if self.keep is not None and self.least is not None:
            raise ValueError("say `keep` or `least`, not both")
        if self.rejudge is not None and self.keep is None and self.least is None:
            raise ValueError("`rejudge` decides around a bound: say `keep` or `least`")
        return self

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        found: list[tuple[str, str, tuple[str, ...]]] = [("classifier", self.classifier, ("classifier",))]
        if self.rejudge is not None and self.rejudge.model is not None:
            found.append(("rejudge.model", self.rejudge.model, ("model",)))
        return found

    def locate(self, where: Mapping[str, Path]) -> None:
        self.classifier = str(where[self.classifier])
        if self.rejudge is not None and self.rejudge.model is not None:
            self._folder = where[self.rejudge.model]

    def columns(self) -> dict[str, arrow.DataType]:
        judged = {} if self.rejudge is None else {"judged": arrow.float32()}
        return {"quality": arrow.float32(), **judged}

    def check(self) -> None:
        if self.rejudge is not None and self.rejudge.endpoint is not None:
            self.rejudge.endpoint.key()

    def run(self, batch: Batch) -> Outcome:
        # Torch is needed for this step alone.
        from trivium.curate.classifier import loaded

        scores = loaded(self.classifier).scores(batch.texts)
        columns = {"quality": arrow.array(scores.astype(np.float32))}
        if self.rejudge is not None:
            columns["judged"] = arrow.nulls(batch.size, arrow.float32())
        return Outcome(columns=columns)

    def keys(self, batch: Batch) -> Keys:
        return {"quality": batch.numbers("quality").astype(np.float32)}

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        scores = joined(shards, "quality")
        # The best first, equal ones in the order of the corpus.
        order = np.argsort(-scores, kind="stable")
        if self.least is not None:
            count = int((scores >= self.least).sum())
        else:
            count = len(scores) if self.keep is None else round(self.keep * len(scores))
        kept = np.zeros(len(scores), dtype=bool)
        kept[order[:count]] = True
        facts: dict[str, Any] = {}
        judged = np.full(len(scores), np.nan, dtype=np.float32)
        if self.rejudge is not None:
            facts = self._judge_again(self.rejudge, shards, scores, order, count, kept, judged)
        split_by_shard(shards, to, kept=kept, judged=judged)
        bound = float(scores[kept].min()) if kept.any() else None
        return {"lowest score kept": bound, "kept": int(kept.sum()), **facts}

    def _judge_again(
        self, judge: Rejudge, shards: Sequence[Path], scores: np.ndarray, order: np.ndarray, count: int,
        kept: np.ndarray, judged: np.ndarray,
    ) -> dict[str, Any]:  # fmt: skip
        """Ask about the band, and write to `kept` and `judged` what follows; all of [documents]."""
        half = max(1, round(judge.band * len(scores) / 2))
        band = order[max(0, count - half) : count + half]
        if not len(band):
            return {}
        # In the order of the corpus, so that texts are read once through.
        band = np.sort(band)
        assert self._place is not None
        found = judge.scores(_texts(shards, band), self._folder, self._place / ANSWERS, self._answers)
        judged[band] = [np.nan if one is None else one for one in found.scores]
        low, high = judge.scale
        shares = (judged[band] - low) / (high - low)
        # Where the judge said nothing, the classifier's word stands.
        shares = np.where(np.isnan(shares), scores[band], shares)
        before = kept[band].copy()
        if self.least is not None:
            kept[band] = np.where(np.isnan(judged[band]), before, shares >= self.least)
        else:
            best = np.lexsort((-scores[band], -shares))[: int(before.sum())]
            kept[band] = np.isin(np.arange(len(band)), best)
        return {
            **found.facts,
            "kept by the judge alone": int((kept[band] & ~before).sum()),
            "left out by the judge alone": int((~kept[band] & before).sum()),
            "lowest score judged": float(scores[band].min()),
            "highest score judged": float(scores[band].max()),
        }

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        kept, judged = decision.of(batch, "kept"), decision.of(batch, "judged")
        reasons: list[str | None] = []
        for one, score, said in zip(kept, batch.numbers("quality"), judged, strict=True):
            why = f"low quality: score {score:.3f}"
            if not np.isnan(said):
                why = f"judged low: {said:g} by the judge, score {score:.3f}"
            reasons.append(None if one else why)
        if self.rejudge is None:
            return Outcome(reasons)
        column = arrow.array(judged, arrow.float32(), mask=np.isnan(judged))
        return Outcome(reasons, columns={"judged": column})


def _texts(shards: Sequence[Path], places: np.ndarray) -> list[str]:
    """The texts at these places of the corpus, given in order; one shard is held at a time."""
    found: list[str] = []
    start = 0
    for shard, size in zip(shards, sizes(shards), strict=True):
        mine = places[(places >= start) & (places < start + size)] - start
        if len(mine):
            kept = parquet.read_table(shard.with_name(f"{shard.name}.kept.parquet"), columns=["text"])
            found += kept.column("text").take(arrow.array(mine)).to_pylist()
        start += size
    return found
