"""How different rows are from one another: near-duplicates, clusters, coverage, distinct n-grams.

Near-duplicates by words are found with MinHash and bands, as in curation, but one row at a time: a row is
compared with those that it agrees with in a band. By meaning, rows are compared through unit vectors.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trivium.curate.characters import Characters
from trivium.curate.minhash import band_keys, probability, signatures
from trivium.synthesize.row import Row

HASHES, SHINGLE = 120, 3
LENGTHS = ((16, "under 16 words"), (64, "under 64"), (256, "under 256"), (math.inf, "256 and more"))


def bands_for(threshold: float) -> tuple[int, int]:
    """Bands and rows of a signature under which rows as alike as `threshold` are compared in 95 of 100
    cases."""
    fits = [
        (HASHES // rows, rows) for rows in (15, 12, 10, 8, 6, 5, 4, 3, 2, 1)
        if probability(threshold, HASHES // rows, rows) >= 0.95
    ]  # fmt: skip
    return fits[0] if fits else (HASHES, 1)


class Words:
    """The rows so far, by their words."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.bands, self.rows = bands_for(threshold)
        self.held: list[np.ndarray] = []
        self._buckets: list[dict[int, list[int]]] = [{} for _ in range(self.bands)]

    def read(self, texts: Sequence[str]) -> np.ndarray:
        """Signatures [texts, hashes]."""
        return signatures(Characters(list(texts)).folded_words(False), SHINGLE, HASHES)[0]

    def nearest(self, signature: np.ndarray) -> tuple[float, int | None]:
        """The likeness to the most alike row that shares a band, and which that is."""
        keys = band_keys(signature[None], self.bands, self.rows)[:, 0]
        places = {place for band, key in zip(self._buckets, keys.tolist()) for place in band.get(key, ())}
        best: tuple[float, int | None] = (0.0, None)
        for place in sorted(places):
            alike = float((self.held[place] == signature).mean())
            if alike > best[0]:
                best = alike, place
        return best

    def add(self, signature: np.ndarray) -> int:
        """Hold one more row; returns its place."""
        for band, key in zip(self._buckets, band_keys(signature[None], self.bands, self.rows)[:, 0].tolist()):
            band.setdefault(key, []).append(len(self.held))
        self.held.append(signature)
        return len(self.held) - 1


class Meanings:
    """The rows so far as unit vectors without their common direction, and the clusters that they form.

    Mean hidden states of one model all point about the same way; what tells texts apart is the rest, so the
    mean of the first rows is taken off (Mu and Viswanath, 2018, all-but-the-top, without the top).
    """

    def __init__(self, threshold: float, cluster: float) -> None:
        self.threshold, self.cluster = threshold, cluster
        self._mean: np.ndarray | None = None
        self._held: list[np.ndarray] = []
        self._centres: list[np.ndarray] = []

    def read(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors [N, width] centred and of length 1."""
        if self._mean is None:
            self._mean = vectors.mean(0) if len(vectors) >= 8 else np.zeros(vectors.shape[1])
        centred = vectors - self._mean
        return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-9)

    def nearest(self, vector: np.ndarray) -> float:
        """The cosine with the most alike row."""
        return float((np.stack(self._held) @ vector).max()) if self._held else 0.0

    def add(self, vector: np.ndarray) -> bool:
        """Hold one more row; true where it begins a new cluster."""
        self._held.append(vector)
        known = (np.stack(self._centres) @ vector).max() if self._centres else -1.0
        if known >= self.cluster:
            return False
        self._centres.append(vector)
        return True


def length_class(text: str) -> str:
    """A text's length in four classes."""
    words = len(text.split())
    return next(name for most, name in LENGTHS if words < most)


def cell_of(row: Row, columns: Sequence[str]) -> tuple[str, ...]:
    """Where in the coverage a row stands: its values of some columns; `truth.family` looks into one."""
    return tuple(str(_inside(row.fields, name)) for name in columns)


def _inside(fields: Any, name: str) -> Any:
    for part in name.split("."):
        fields = fields.get(part, "") if isinstance(fields, Mapping) else ""
    return fields


def distinct(texts: Sequence[str], size: int) -> float:
    """The share of runs of `size` words that are different (Li et al., 2016, distinct-n)."""
    hashes = [Characters([text]).folded_words(False).grams(size)[0] for text in texts]
    whole = np.concatenate(hashes) if hashes else np.empty(0)
    return len(np.unique(whole)) / max(len(whole), 1)


def self_similarity(texts: Sequence[str]) -> dict[str, float]:
    """The mean likeness of a text to its most alike other one, and of any two, by their words."""
    if len(texts) < 2:
        return {"nearest": 0.0, "mean": 0.0}
    found = signatures(Characters(list(texts)).folded_words(False), SHINGLE, HASHES)[0]
    nearest, total = [], 0.0
    for place in range(len(found)):
        alike = (found == found[place]).mean(axis=1)
        total += float(alike.sum() - 1)
        alike[place] = 0
        nearest.append(float(alike.max()))
    return {"nearest": float(np.mean(nearest)), "mean": total / (len(found) * (len(found) - 1))}


def coverage(rows: Sequence[Row], columns: Sequence[str], cells: int) -> dict[str, Any]:
    """How many of all cells have a row, how evenly (entropy over its highest), and the counts."""
    counts = Counter(cell_of(row, columns) for row in rows)
    total = sum(counts.values())
    shares = [count / total for count in counts.values()]
    entropy = -sum(share * math.log(share) for share in shares)
    wanted = max(cells, len(counts), 1)
    return {
        "columns": list(columns), "cells": wanted, "filled": len(counts), "share": len(counts) / wanted,
        "evenness": entropy / math.log(wanted) if wanted > 1 else 1.0,
        "counts": {" / ".join(cell): count for cell, count in counts.most_common(200)},
    }  # fmt: skip


MOST_COMPARED = 2000


def measured(rows: Sequence[Row], columns: Sequence[str], cells: int, texts: Sequence[str]) -> dict[str, Any]:
    """The numbers of the report, over at most 2,000 rows where all are compared with all."""
    some = list(texts[:MOST_COMPARED])
    return {
        "rows": len(rows),
        "distinct": {str(size): distinct(texts, size) for size in (1, 2, 4)},
        "self_similarity": self_similarity(some),
        "coverage": coverage(rows, columns, cells),
        "lengths": dict(Counter(length_class(text) for text in texts)),
    }
