"""Sample: a random part, the best by a score, at most so much of a domain, or equal parts of groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
from pydantic import Field, model_validator

from trivium.curate.batch import Batch, Outcome
from trivium.curate.engines import Workers
from trivium.curate.keys import hash64, joined, split_by_shard
from trivium.curate.step import Decision, Keys, WholeStep
from trivium.kit.numbers import Count


class Sample(WholeStep):
    """Keep `documents` or a `share`: at random or the best `by` a column, within caps and groups."""

    name: ClassVar[str] = "sample"
    short: ClassVar[str] = "share"

    share: float | None = Field(default=None, gt=0, le=1)
    """How large a part of the documents is kept."""
    documents: Count | None = Field(default=None, ge=1)
    """How many documents are kept."""
    by: str | None = None
    """A numeric column: the documents with the highest values are kept, in place of random ones."""
    domain_cap: Count | None = Field(default=None, ge=1)
    """The most documents of one domain (`url`) or, where rows have none, of one source."""
    strata: str | None = None
    """A column (or a field of the rows) whose values share what is kept equally."""
    seed: int = 0

    @model_validator(mode="after")
    def _something(self) -> Sample:
        if self.share is None and self.documents is None and self.domain_cap is None:
            raise ValueError("say `share`, `documents` or `domain_cap`")
        if self.share is not None and self.documents is not None:
            raise ValueError("say `share` or `documents`, not both")
        return self

    def keys(self, batch: Batch) -> Keys:
        found = {"chance": _hashes([f"{self.seed} {one}" for one in batch.ids])}
        if self.by is not None:
            found["score"] = batch.numbers(self.by)
        if self.domain_cap is not None:
            found["domain"] = _hashes(_domains(batch))
        if self.strata is not None:
            found["stratum"] = _hashes(values_of(batch, self.strata))
        return found

    def decide(self, shards: Sequence[Path], to: Path, workers: Workers) -> dict[str, Any]:
        chance = joined(shards, "chance")
        order = np.argsort(chance, kind="stable")
        if self.by is not None:
            score = np.nan_to_num(joined(shards, "score"), nan=-np.inf)
            order = np.lexsort((chance, -score))
        # 0: kept, 1: more than a domain may have, 2: not among the sample.
        verdict = np.zeros(len(chance), dtype=np.uint8)
        if self.domain_cap is not None:
            place = _place_in_group(joined(shards, "domain"), order)
            verdict[place >= self.domain_cap] = 1
        left = order[verdict[order] == 0]
        wanted = len(left)
        if self.documents is not None:
            wanted = min(self.documents, wanted)
        elif self.share is not None:
            wanted = round(self.share * len(left))
        if self.strata is None:
            verdict[left[wanted:]] = 2
        else:
            verdict[left] = 2
            verdict[_equally(joined(shards, "stratum"), left, wanted)] = 0
        split_by_shard(shards, to, verdict=verdict)
        return {"kept": int((verdict == 0).sum())}

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        texts = {
            0: None,
            1: f"domain cap: its domain has {self.domain_cap} documents already",
            2: "not sampled: " + (f"others have more {self.by}" if self.by else "others were drawn"),
        }
        return Outcome([texts[int(one)] for one in decision.of(batch, "verdict")])


def _hashes(values: list[str]) -> np.ndarray:
    return np.array([hash64(value.encode()) for value in values], dtype=np.uint64)


def values_of(batch: Batch, name: str) -> list[str]:
    """A column of the batch, or a field of the rows, as text."""
    if name in batch.records.schema.names:
        return [str(one) for one in batch.records.column(name).to_pylist()]
    return [str(json.loads(fields).get(name)) for fields in batch.records.column("fields").to_pylist()]


def _domains(batch: Batch) -> list[str]:
    found = []
    for fields, source in zip(batch.records.column("fields").to_pylist(), batch.sources):
        url = json.loads(fields).get("url")
        host = urlsplit(url).hostname if isinstance(url, str) else None
        found.append(host or source)
    return found


def _place_in_group(groups: np.ndarray, order: np.ndarray) -> np.ndarray:
    """For every document how many of its group come before it in the order."""
    place = np.empty(len(groups), dtype=np.int64)
    within = np.argsort(groups[order], kind="stable")
    ordered = groups[order][within]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sizes = np.diff(np.append(starts, len(ordered)))
    place[order[within]] = np.arange(len(ordered)) - np.repeat(starts, sizes)
    return place


def _equally(groups: np.ndarray, left: np.ndarray, wanted: int) -> np.ndarray:
    """The first `wanted` documents in turn: the first of every group, then the second, and so on."""
    turn = _place_in_group(groups[left], np.arange(len(left)))
    return left[np.argsort(turn, kind="stable")[:wanted]]
