"""Which row of which source comes when: one plan, of which every batch is a pure function."""

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np

from trivium.data.order import round_keys, shuffled
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint

BLOCK = 1024
# Shares are sums of fractions; a row that is due by less than this is not due yet.
_TOLERANCE = 1e-7


@dataclass(frozen=True)
class PlannedSource:
    """A source as the plan sees it: how many rows it has and how its weight moves over the stage.

    `weights` are (place in the stage from 0 to 1, weight) pairs, joined by straight lines; two at one place
    are a step. `start` counts the rows that an earlier stage has used up. `ranking` lists the rows in the
    order (a curriculum) in which those of a pass that are drawn come.
    """

    name: str
    rows: int
    weights: tuple[tuple[float, float], ...] = ((0.0, 1.0),)
    start: int = 0
    max_repeats: float | None = None
    ranking: np.ndarray | None = field(default=None, compare=False)
    fingerprint: str = ""


def weights_over(
    weight: float | Sequence[float | Sequence[float]],
) -> tuple[tuple[float, float], ...]:
    """A weight as recipes write it: a number, [first, …, last] evenly spaced, or [[place, weight], …]."""
    if isinstance(weight, (int, float)):
        return ((0.0, float(weight)),)
    knots: list[tuple[float, float]] = []
    for index, entry in enumerate(weight):
        if isinstance(entry, (int, float)):
            knots.append((index / max(1, len(weight) - 1), float(entry)))
        elif len(entry) == 2:
            knots.append((float(entry[0]), float(entry[1])))
        else:
            raise TriviumError(f"The weight {list(weight)} must list pairs of a place and a weight.")
    if not knots or any(later[0] < earlier[0] for earlier, later in pairwise(knots)):
        raise TriviumError(f"The weight {list(weight)} must name at least one place, and places in order.")
    if knots[0][0] < 0 or knots[-1][0] > 1:
        raise TriviumError(f"The weight {list(weight)} names a place outside the stage, which is 0 to 1.")
    return tuple(knots)


@dataclass(frozen=True)
class MixturePlan:
    """The order of all rows of a stage: row n of the plan is a row of a source, for every n below `total`."""

    sources: tuple[PlannedSource, ...]
    total: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if not self.sources:
            raise TriviumError("A mixture needs at least one source.")
        for source in self.sources:
            if source.rows == 0 and any(weight > 0 for _, weight in source.weights):
                raise TriviumError(f"{source.name} has no rows to train on; give it data or leave it out.")
            if any(weight < 0 for _, weight in source.weights):
                raise TriviumError(f"{source.name} has a weight below zero.")
        self._check_repeats()

    @classmethod
    def of_examples(
        cls,
        sources: Sequence[PlannedSource],
        *,
        batch: int,
        seed: int,
        steps: int | None = None,
        epochs: float | None = None,
    ) -> Self:
        """The order over examples that are counted, not measured: as many steps, or so often all of them."""
        if steps is None:
            available = sum(source.rows for source in sources)
            steps = max(1, round((1.0 if epochs is None else epochs) * available / batch))
        return cls(sources=tuple(sources), total=steps * batch, batch=batch, seed=seed)

    @property
    def steps(self) -> int:
        """How many whole batches the plan has."""
        return self.total // self.batch

    @cached_property
    def hash(self) -> str:
        """Changes when any row's place could; the batch size is only a stride through the same order."""
        return fingerprint(
            [
                [self.total, self.seed],
                [
                    [source.name, source.rows, source.weights, source.start, source.fingerprint]
                    + ([] if source.ranking is None else ["ranked draws", source.ranking.tolist()])
                    for source in self.sources
                ],
            ]
        )

    @cached_property
    def _shares(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stretches of the plan on which every share is a straight line: borders, shares at each side."""
        places = sorted({0.0, 1.0} | {place for source in self.sources for place, _ in source.weights})
        left = np.array(
            [[weight_at(source.weights, a, after=True) for source in self.sources] for a in places[:-1]]
        )
        right = np.array(
            [[weight_at(source.weights, b, after=False) for source in self.sources] for b in places[1:]]
        )
        for weights, where in ((left, places[:-1]), (right, places[1:])):
            for place, total in zip(where, weights.sum(axis=1), strict=True):
                if total <= 0:
                    raise TriviumError(f"At {place:.0%} of the stage every source has weight 0; raise one.")
        left = left / left.sum(axis=1, keepdims=True)
        right = right / right.sum(axis=1, keepdims=True)
        return np.array(places) * self.total, left, right

    def ideal(self, rows: np.ndarray) -> np.ndarray:
        """How many of the first n rows each source should have given: exact, one line per n."""
        borders, left, right = self._shares
        widths = np.diff(borders)
        done = np.zeros((len(borders), len(self.sources)))
        done[1:] = np.cumsum((left + right) / 2 * widths[:, None], axis=0)
        rows = np.asarray(rows, dtype=np.float64)
        stretch = np.clip(np.searchsorted(borders, rows, side="right") - 1, 0, len(widths) - 1)
        into = (rows - borders[stretch])[:, None]
        width = np.maximum(widths[stretch], 1e-300)[:, None]
        slope = (right[stretch] - left[stretch]) / width
        return done[stretch] + left[stretch] * into + slope * into * into / 2

    def _check_repeats(self) -> None:
        drawn = self.ideal(np.array([self.total]))[0]
        for source, rows in zip(self.sources, drawn, strict=True):
            passes = (source.start + rows) / max(1, source.rows)
            if source.max_repeats is not None and passes > source.max_repeats + 1e-9:
                raise TriviumError(
                    f"{source.name} has {source.rows:,} rows and the stage would draw {rows:,.0f} of them"
                    + (f" after the {source.start:,} already seen" if source.start else "")
                    + f": {passes:.1f} passes, over `max_repeats` {source.max_repeats:g}; "
                    "give it more data, a smaller weight, or a higher `max_repeats`."
                )

    @cached_property
    def _blocks(self) -> "_Blocks":
        return _Blocks(self)

    def choices(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """For rows `first` up to `first + count`: which source, and which of that source's draws it is."""
        assert 0 <= first <= first + count <= self.total, "the plan has no such rows"
        sources: list[np.ndarray] = []
        draws: list[np.ndarray] = []
        for number in range(first // BLOCK, -(-(first + count) // BLOCK)):
            block_sources, block_draws = self._blocks.block(number)
            begin = number * BLOCK
            inside = slice(max(0, first - begin), first + count - begin)
            sources.append(block_sources[inside])
            draws.append(block_draws[inside])
        if not sources:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(sources), np.concatenate(draws)

    def take(self, first: int, count: int) -> list[tuple[int, int]]:
        """Rows `first` up to `first + count` of the plan as (source, row of that source)."""
        sources, draws = self.choices(first, count)
        rows = np.empty(count, dtype=np.int64)
        for index, source in enumerate(self.sources):
            here = np.flatnonzero(sources == index)
            if len(here):
                rows[here] = self._rows_of(index, draws[here] + source.start)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))

    def _rows_of(self, index: int, draws: np.ndarray) -> np.ndarray:
        """Every pass over a source takes each of its rows once, in an order of its own."""
        source = self.sources[index]
        passes, inside = np.divmod(draws, source.rows)
        rows = np.empty_like(inside)
        for number in np.unique(passes).tolist():
            here = passes == number
            if source.ranking is None:
                keys = round_keys(self.seed, source.name, number)
                rows[here] = shuffled(inside[here], source.rows, keys)
            else:
                first, ranked = self._curriculum(index, number)
                rows[here] = ranked[inside[here] - first]
        return rows

    def _curriculum(self, index: int, number: int) -> tuple[int, np.ndarray]:
        """Where in a pass the plan begins, and what it draws of the pass, drawn at random and then ranked.

        A plan that draws a tenth of a source thus goes from its easiest rows to its hardest all the same.
        """
        if (index, number) not in self._curricula:
            source = self.sources[index]
            assert source.ranking is not None
            last = source.start + self._drawn_in_all[index] - number * source.rows
            first = max(0, source.start - number * source.rows)
            keys = round_keys(self.seed, source.name, number)
            drawn = shuffled(np.arange(first, min(source.rows, last)), source.rows, keys)
            places = np.empty(source.rows, dtype=np.int64)
            places[source.ranking] = np.arange(source.rows)
            self._curricula[index, number] = first, drawn[np.argsort(places[drawn])]
        return self._curricula[index, number]

    @cached_property
    def _curricula(self) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
        return {}

    @cached_property
    def _drawn_in_all(self) -> list[int]:
        return self.drawn(self.total)

    def rows(self, step: int) -> list[tuple[int, int]]:
        """The global batch of a step; rank r of w trains rows [r::w] of it."""
        return self.take(step * self.batch, self.batch)

    def drawn(self, rows: int) -> list[int]:
        """How many of the plan's first rows came from each source."""
        return self._blocks.counts(rows).tolist()

    def consumed(self, step: int) -> dict[str, int]:
        """Where a later stage should `start` in each source to go on after this step."""
        counts = self.drawn(step * self.batch)
        return {source.name: source.start + count for source, count in zip(self.sources, counts, strict=True)}


def weight_at(knots: Sequence[tuple[float, float]], place: float, *, after: bool) -> float:
    """The weight at a place, seen from behind it or from before it (they differ where it steps)."""
    if after:
        earlier = [knot for knot in knots if knot[0] <= place]
        later = [knot for knot in knots if knot[0] > place]
    else:
        earlier = [knot for knot in knots if knot[0] < place]
        later = [knot for knot in knots if knot[0] >= place]
    if not earlier:
        return later[0][1]
    if not later:
        return earlier[-1][1]
    (a, low), (b, high) = earlier[-1], later[0]
    return low + (high - low) * (place - a) / (b - a)


class _Blocks:
    """Deals the rows of a plan to its sources, a block at a time, by earliest deadline.

    A source's m-th row may come once its ideal count passes m - 1 and must have come when it reaches m.
    Serving the row whose deadline is first keeps every source within one row of its ideal at every moment:
    fractional counts always allow such a timetable, and on jobs of one row each earliest-deadline-first finds
    one if there is one.
    """

    def __init__(self, plan: MixturePlan) -> None:
        self._plan = plan
        self._starts = [np.zeros(len(plan.sources), dtype=np.int64)]
        self._recent: dict[int, np.ndarray] = {}

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The sources of a block's rows, and which of its source's draws each row is."""
        dealt = self._dealt(number)
        draws = np.empty_like(dealt)
        for source, start in enumerate(self._starts[number]):
            here = np.flatnonzero(dealt == source)
            draws[here] = start + np.arange(len(here))
        return dealt, draws

    def counts(self, rows: int) -> np.ndarray:
        """How many of the first rows each source gave."""
        number, inside = divmod(rows, BLOCK)
        if inside == 0:
            if number:
                self._dealt(number - 1)
            return self._starts[number]
        dealt = self._dealt(number)[:inside]
        return self._starts[number] + np.bincount(dealt, minlength=len(self._plan.sources))

    def _dealt(self, number: int) -> np.ndarray:
        while len(self._starts) <= number:
            self._deal(len(self._starts) - 1)
        if number not in self._recent:
            self._deal(number)
        return self._recent[number]

    def _deal(self, number: int) -> None:
        plan = self._plan
        begin = number * BLOCK
        size = min(BLOCK, plan.total - begin)
        counts = self._starts[number]
        jobs = self._jobs(begin, size, counts)
        dealt = np.fromiter(_by_deadline(jobs, size), dtype=np.int64, count=size)
        if len(self._starts) == number + 1:
            self._starts.append(counts + np.bincount(dealt, minlength=len(plan.sources)))
        while len(self._recent) >= 8:
            self._recent.pop(next(iter(self._recent)))
        self._recent[number] = dealt

    def _jobs(self, begin: int, size: int, counts: np.ndarray) -> list[tuple[int, int, int]]:
        """The rows that may come in this block as (first place, deadline, source), places counted from it."""
        ideal = np.maximum.accumulate(self._plan.ideal(np.arange(begin + 1, begin + size + 1)), axis=0)
        later = self._later_deadlines(begin, size, np.ceil(ideal[-1] - _TOLERANCE))
        jobs: list[tuple[int, int, int]] = []
        for source, count in enumerate(counts.tolist()):
            line = ideal[:, source]
            numbers = np.arange(count, np.ceil(line[-1] - _TOLERANCE))
            releases = np.searchsorted(line, numbers + _TOLERANCE, side="right")
            deadlines = np.searchsorted(line, numbers + 1 - _TOLERANCE, side="left")
            deadlines[deadlines == size] = later[source]
            jobs += zip(releases.tolist(), deadlines.tolist(), [source] * len(numbers), strict=True)
        return jobs

    def _later_deadlines(self, begin: int, size: int, goals: np.ndarray) -> np.ndarray:
        """Where each source's ideal count reaches its goal, for goals that lie behind this block."""
        low = np.full(len(goals), size, dtype=np.int64)
        high = np.full(len(goals), self._plan.total - begin, dtype=np.int64)
        each = np.arange(len(goals))
        while (low < high).any():
            middle = (low + high) // 2
            reached = self._plan.ideal(begin + middle + 1)[each, each] >= goals - _TOLERANCE
            low, high = np.where(reached, low, np.minimum(middle + 1, high)), np.where(reached, middle, high)
        return low


def _by_deadline(jobs: list[tuple[int, int, int]], size: int) -> Iterator[int]:
    """Serve one row at each place, always the one that is due first among those that may come."""
    coming = sorted(jobs, reverse=True)
    ready: list[tuple[int, int]] = []
    for place in range(size):
        while coming and coming[-1][0] <= place:
            heapq.heappush(ready, coming.pop()[1:])
        assert ready, "ideal counts sum to the rows dealt, so some source is always behind its own"
        yield heapq.heappop(ready)[1]
