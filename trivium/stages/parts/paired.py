"""Models beside each other on the same held-out documents, with intervals for what they differ by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trivium.data.rows import PackedSequence
from trivium.evals.statistics import Difference, holm, paired_difference
from trivium.learn.validation import by_document
from trivium.model.transformer import Transformer

Spent = dict[str, dict[str, tuple[float, float]]]
"""For every source and document the bits a model spent and the bytes they stand for."""


def spent(model: Transformer, validation: Mapping[str, Sequence[PackedSequence]]) -> Spent:
    """What a model spends on every held-out document of every source."""
    return {source: by_document(model, rows) for source, rows in validation.items()}


def bits_per_byte(found: Spent) -> dict[str, float]:
    """Every source's bits per byte."""
    return {
        source: sum(bits for bits, _ in documents.values()) / sum(size for _, size in documents.values())
        for source, documents in found.items()
    }


def measured_documents(rows: Sequence[PackedSequence]) -> set[str]:
    """The documents of which something is predicted; others only stand beside them."""
    found: set[str] = set()
    for row in rows:
        sizes = np.split(row.columns["bytes"], np.cumsum(row.lengths)[:-1])
        found.update(name for name, size in zip(row.ids, sizes, strict=True) if size.sum() > 0)
    return found


def halves(found: Spent) -> tuple[Spent, Spent]:
    """Every other document, to choose by; and the rest, to report what was chosen."""
    return (
        {source: dict(list(documents.items())[0::2]) for source, documents in found.items()},
        {source: dict(list(documents.items())[1::2]) for source, documents in found.items()},
    )


def change(before: Spent, after: Spent) -> Difference:
    """After minus before in bits per byte, the mean over sources, paired by document."""
    first: list[float] = []
    second: list[float] = []
    weights: list[float] = []
    for source, documents in before.items():
        whole = sum(size for _, size in documents.values())
        for name, (bits, size) in documents.items():
            first.append(bits / size)
            second.append(after[source][name][0] / size)
            weights.append(size / whole)
    return paired_difference(first, second, weights=weights)


def changes(pairs: Mapping[str, tuple[Spent, Spent]]) -> dict[str, dict[str, Any]]:
    """Several such differences as a summary keeps them, p-values corrected for their number (Holm)."""
    found = {name: change(*pair) for name, pair in pairs.items()}
    corrected = holm([one.p_value for one in found.values()])
    return {
        name: {
            "value": one.interval.value,
            "low": one.interval.low if math.isfinite(one.interval.low) else None,
            "high": one.interval.high if math.isfinite(one.interval.high) else None,
            "documents": one.interval.n,
            "corrected p": p_value,
            "shown": Difference(one.interval, p_value).significant,
        }
        for (name, one), p_value in zip(found.items(), corrected, strict=True)
    }


def gained(before: Spent, after: Spent, tokens: int) -> Spent:
    """The bits that so many tokens of training saved, for a million of them."""
    return {
        source: {
            name: ((bits - after[source][name][0]) * 1e6 / tokens, size)
            for name, (bits, size) in documents.items()
        }
        for source, documents in before.items()
    }


def in_words(one: Mapping[str, Any]) -> str:
    """A difference with its interval, as a message has it."""
    if one["low"] is None:
        return f"{one['value']:+.4f} (too few documents for an interval)"
    verdict = "" if one["shown"] else "; no difference shown"
    return f"{one['value']:+.4f} (95 % {one['low']:+.4f} to {one['high']:+.4f}{verdict})"
