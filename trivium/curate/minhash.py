"""MinHash and locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, ch. 3).

The share of equal values in two signatures estimates the Jaccard similarity of two sets of shingles. A
signature of `bands * rows` values is cut into bands; two documents whose similarity is s agree in at least
one whole band with probability 1 - (1 - s^rows)^bands, and only those pairs are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trivium.curate.characters import Words, mixed
from trivium.curate.engines import Workers
from trivium.curate.keys import Rows, joined

_PAIRS = 1 << 16


@lru_cache(2)
def _functions(count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` hash functions (x ^ a) * b on 32 bits, b odd; the same on every machine."""
    numbers = mixed(np.arange(1, 2 * count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    numbers = (numbers >> np.uint64(32)).astype(np.uint32)
    return numbers[:count], numbers[count:] | np.uint32(1)


def signatures(words: Words, shingle: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Signatures [documents, count] of uint32, and whether a document has a word at all [documents]."""
    hashes, places = words.grams(shingle)
    documents = words.documents[places]
    sizes = np.diff(words.first)
    short = np.flatnonzero((sizes > 0) & (sizes < shingle))
    if len(short):
        # A text of fewer words than a shingle has is one shingle.
        whole = [mixed(np.bitwise_xor.reduce(mixed(_in_order(words, int(one))))[None]) for one in short]
        hashes = np.concatenate([hashes, *whole])
        documents = np.concatenate([documents, short])
        order = np.argsort(documents, kind="stable")
        hashes, documents = hashes[order], documents[order]
    found = np.zeros((words.count, count), dtype=np.uint32)
    if len(hashes):
        having, starts = np.unique(documents, return_index=True)
        shingles = (hashes >> np.uint64(32)).astype(np.uint32)
        flips, factors = _functions(count)
        values = np.empty_like(shingles)
        for place in range(count):
            np.bitwise_xor(shingles, flips[place], out=values)
            np.multiply(values, factors[place], out=values)
            found[having, place] = np.minimum.reduceat(values, starts)
    return found, sizes > 0


def _in_order(words: Words, document: int) -> np.ndarray:
    hashes = words.hashes[words.first[document] : words.first[document + 1]]
    return hashes + np.arange(len(hashes), dtype=np.uint64)


def band_keys(signature: np.ndarray, bands: int, rows: int) -> np.ndarray:
    """One hash for every band of every signature, [bands, documents] of uint64."""
    keys = np.empty((bands, len(signature)), dtype=np.uint64)
    for band in range(bands):
        found = np.full(len(signature), band + 1, dtype=np.uint64)
        for row in range(rows):
            found = mixed(found ^ signature[:, band * rows + row]) + np.uint64(row)
        keys[band] = found
    return keys


def probability(similarity: float, bands: int, rows: int) -> float:
    """How likely two documents of this similarity agree in a band."""
    return float(1 - (1 - similarity**rows) ** bands)


class Clusters:
    """Disjoint sets of documents; only those that have a like are held."""

    def __init__(self) -> None:
        self._parent: dict[int, int] = {}

    def root(self, one: int) -> int:
        """The smallest document of its set."""
        path = []
        while (above := self._parent.get(one, one)) != one:
            path.append(one)
            one = above
        for each in path:
            self._parent[each] = one
        return one

    def join(self, one: int, other: int) -> None:
        """Make one set of the two."""
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low
        self._parent.setdefault(low, low)

    def members(self) -> tuple[np.ndarray, np.ndarray]:
        """Every document that has a like, in order, and the root of each."""
        found = sorted(self._parent)
        return np.array(found, dtype=np.int64), np.array([self.root(one) for one in found], dtype=np.int64)


def find_clusters(
    shards: Sequence[Path], bands: int, threshold: float, workers: Workers
) -> tuple[Clusters, int]:
    """Documents that agree in a band and, by their whole signatures, are at least as similar as `threshold`.

    Returns the clusters, and how many pairs agree in a band, counted in every band.
    """
    clusters, candidates = Clusters(), 0
    has_words = joined(shards, "has_words")
    for columns in workers.columns_at_once(bands):
        pairs = workers.grouped(shards, "bands", _candidates, columns).astype(np.int64)
        pairs = pairs[has_words[pairs[:, 0]]]
        candidates += len(pairs)
        pairs = np.unique(pairs, axis=0)
        for similar in workers.results(_similar, _apart(pairs, clusters, shards, threshold)):
            for one, other in similar:
                clusters.join(one, other)
    return clusters, candidates


def _apart(
    pairs: np.ndarray, clusters: Clusters, shards: Sequence[Path], threshold: float
) -> Iterator[tuple[Any, ...]]:
    """The pairs that are not in one cluster yet, some at a time."""
    for start in range(0, len(pairs), _PAIRS):
        some = pairs[start : start + _PAIRS]
        some = some[[clusters.root(one) != clusters.root(other) for one, other in some.tolist()]]
        if len(some):
            yield shards, some, threshold


def _similar(shards: Sequence[Path], pairs: np.ndarray, threshold: float) -> list[list[int]]:
    """The pairs whose signatures agree in a share of at least `threshold`."""
    rows = Rows(shards, "signature")
    equal = (rows[pairs[:, 0]] == rows[pairs[:, 1]]).mean(axis=1)
    return pairs[equal >= threshold].tolist()


def _candidates(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Pairs of documents with the same key: each with the next of its run, and with the run's first."""
    order = np.argsort(keys[:, 0], kind="stable")
    ordered = keys[order, 0]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    starts = np.ones(len(ordered), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = np.maximum.accumulate(np.where(starts, np.arange(len(ordered)), 0))
    neighbours = np.stack([order[same], order[same + 1]], axis=1)
    leads = np.stack([order[first[same + 1]], order[same + 1]], axis=1)
    return places[np.concatenate([neighbours, leads[leads[:, 0] != neighbours[:, 0]]])]
