"""The sources of a mixture as training takes them, and how their weights move over a stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from trivium.data.mixture import weight_at, weights_over
from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError

EASED = 16
"""Straight pieces that stand for one half wave of a cosine ramp."""
Lengths = tuple[int, int | None]
Knots = tuple[tuple[float, float], ...]
"""Places in the stage from 0 to 1, each with the weight there."""


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture: its shards and how it takes part.

    `origin` tells the same source in another stage, and `seen` how many passes such stages made over it.
    """

    name: str
    shards: Shards
    weights: Knots | None = None
    origin: str = ""
    seen: float = 0.0
    max_repeats: float | None = None
    easy_first: str | None = None
    within: Lengths = (0, None)
    """The fewest and the most tokens of the documents that take part."""

    @property
    def tokens(self) -> int:
        """How many tokens the documents that take part have."""
        return int(chosen(self.shards.lengths, self.within).sum())


def chosen(lengths: np.ndarray, within: Lengths) -> np.ndarray:
    """The lengths, with 0 for documents that are shorter or longer than asked for."""
    fewest, most = within
    fits = lengths >= fewest if most is None else (lengths >= fewest) & (lengths <= most)
    return np.where(fits, lengths, 0)


def weighted(given: Sequence[Ingredient]) -> list[Ingredient]:
    """Sources without weights count by their tokens."""
    return [
        one if one.weights is not None else replace(one, weights=weights_over(float(one.tokens)))
        for one in given
    ]


def eased(knots: Knots) -> Knots:
    """The same places and weights, joined by half waves of a cosine."""
    found = [knots[0]]
    for (a, low), (b, high) in pairwise(knots):
        for piece in range(1, EASED + 1):
            way = piece / EASED
            level = low + (high - low) * (1 - math.cos(math.pi * way)) / 2
            if b > a or piece == EASED:
                found.append((a + (b - a) * way, level))
    return tuple(found)


def part_of(knots: Knots, first: float, last: float) -> Knots:
    """What a weight does between two places of the stage, as a stage of its own."""
    inside = [((place - first) / (last - first), weight) for place, weight in knots if first < place < last]
    begin, end = weight_at(knots, first, after=True), weight_at(knots, last, after=False)
    return ((0.0, begin), *inside, (1.0, end))


def with_replay(new: list[Ingredient], old: list[Ingredient], share: float) -> list[Ingredient]:
    """Both lists as one mixture in which the old sources have `share` together at every moment."""
    return _scaled(weighted(new), 1 - share) + _scaled(weighted(old), share)


def _scaled(given: list[Ingredient], share: float) -> list[Ingredient]:
    """The same proportions at the places that have a weight, with a constant sum."""
    curves = [one.weights or ((0.0, 1.0),) for one in given]
    places = sorted({0.0, 1.0} | {place for curve in curves for place, _ in curve})
    # A mixture whose sum moves is not straight after division: short pieces follow it closely.
    fine = sorted(set(places) | {a + (b - a) * k / EASED for a, b in pairwise(places) for k in range(EASED)})
    knots: list[list[tuple[float, float]]] = [[] for _ in given]
    for place in fine:
        for after in (False, True):
            now = [weight_at(curve, place, after=after) for curve in curves]
            if sum(now) <= 0:
                names = ", ".join(f"`{one.name}`" for one in given)
                raise TriviumError(
                    f"At {place:.0%} of the stage {names} have weight 0 together, or no documents: raise a "
                    "weight, or name a source that is not empty."
                )
            for found, weight in zip(knots, now, strict=True):
                found.append((place, share * weight / sum(now)))
    return [replace(one, weights=tuple(found)) for one, found in zip(given, knots, strict=True)]
