"""Labels of steps beside the exact ones: how often they agree, and a shuffled control."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trivium.evals.results import as_json
from trivium.evals.statistics import wilson


def _compared(rows: Sequence[Mapping[str, Any]]) -> list[tuple[bool, bool]]:
    """For each step that has both, whether the label and the exact one call it right."""
    return [
        (float(label) >= 0.5, exact >= 0.5)
        for row in rows
        if row["exact"] is not None
        for label, exact in zip(row["labels"], row["exact"], strict=True)
        if label is not None
    ]


def confusion(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many steps are labelled so and are so: a wrong one called right by luck, a right one given up."""
    counts = Counter(_compared(rows))
    names = {True: "right", False: "wrong"}
    return {
        f"labelled {names[label]}, {names[exact]}": counts[label, exact]
        for label in (True, False)
        for exact in (True, False)
    }


def agreement_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The share of labels on the same side of one half as the exact ones."""
    pairs = _compared(rows)
    return as_json(wilson(float(sum(one == other for one, other in pairs)), len(pairs))) if pairs else None


def shuffle_labels(rows: Sequence[dict[str, Any]], seed: int) -> None:
    """All labels in a random order over all steps; a step without one stays without."""
    labels = [label for row in rows for label in row["labels"] if label is not None]
    order = iter(np.random.default_rng(seed).permutation(len(labels)).tolist())
    for row in rows:
        row["labels"] = [None if label is None else labels[next(order)] for label in row["labels"]]
