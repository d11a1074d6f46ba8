"""Intervals and paired comparisons: what may be claimed from the answers that were seen."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
BLOCK = 100_000
"""Draws at once: enough for numpy, few enough for a processor's cache."""


@dataclass(frozen=True)
class Interval:
    """An estimate, its confidence interval, and how many items it rests on."""

    value: float
    low: float
    high: float
    n: int

    def excludes(self, point: float) -> bool:
        return point < self.low or point > self.high


@dataclass(frozen=True)
class Difference:
    """How much the second of two models differs from the first on the same items."""

    interval: Interval
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the p-value, after any correction it was given, and the interval both speak for one."""
        return self.p_value < 1 - CONFIDENCE and self.interval.excludes(0.0)


normal_quantile = NormalDist().inv_cdf
"""The value below which a standard normal variable falls with a probability."""


def t_below(value: float, degrees: int) -> float:
    """The chance that Student's t lies below a value (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(value / math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = (cosine, 0.0) if degrees % 2 else (1.0, 0.0)
    for place in range(1 if degrees % 2 else 0, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (place + 1) / (place + 2)
    between = 2 / math.pi * (angle + sine * total) if degrees % 2 else sine * total
    return 0.5 + between / 2


@cache
def t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t falls with this probability above one half, by bisection."""
    low, high = 0.0, 1.0
    while t_below(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_below(middle, degrees) < probability else (low, middle)
    return high


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a proportion, which stays honest near 0 and 1."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    share = successes / n
    return Interval(share, *_wilson(share, n, normal_quantile(0.5 + confidence / 2)), n)


def _wilson(share: float, n: float, z: float) -> tuple[float, float]:
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not put an end of 0 or 1 on the wrong side of the share itself.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def tango(gained: float, lost: float, n: float, confidence: float = CONFIDENCE) -> Interval:
    """Tango's score interval (1998) for how much likelier one of two paired yes-or-no scores is."""
    low, high = _tango(gained, lost, n, normal_quantile(0.5 + confidence / 2))
    return Interval((gained - lost) / n, low, high, round(n))


def _tango(gained: float, lost: float, n: float, z: float) -> tuple[float, float]:
    """The ends of the differences which the score test does not refuse; the counts may be effective ones."""
    difference = (gained - lost) / n

    def refused(assumed: float) -> bool:
        # The likeliest share of losses, if the difference were the assumed one.
        linear = (2 * n - gained + lost) * assumed - gained - lost
        root = math.sqrt(max(0.0, linear * linear + 8 * n * lost * assumed * (1 - assumed)))
        variance = max(0.0, 2 * (root - linear) / (4 * n) + assumed * (1 - assumed)) / n
        return abs(difference - assumed) > z * math.sqrt(variance)

    def end(inside: float, outside: float) -> float:
        if not refused(outside):
            return outside
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if refused(middle) else (middle, outside)
        return inside

    return end(difference, -1.0), end(difference, 1.0)


def _cluster_sums(
    values: np.ndarray, clusters: Sequence[object] | None, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted sum and the weight of every cluster; without clusters each value is its own."""
    shares = np.ones_like(values) if weights is None else weights
    if clusters is None:
        return values * shares, shares
    _, index = np.unique(np.asarray([str(name) for name in clusters]), return_inverse=True)
    return np.bincount(index, weights=values * shares), np.bincount(index, weights=shares)


def _effective(
    values: np.ndarray, clusters: Sequence[object] | None, weights: np.ndarray | None, confidence: float
) -> tuple[float, float, float]:
    """The mean, how many independent yes-or-no items would tell as much of it, and the quantile to use."""
    if clusters is None and weights is None and np.isin(values, (-1.0, 0.0, 1.0)).all():
        return float(values.mean()), float(len(values)), normal_quantile(0.5 + confidence / 2)
    sums, counts = _cluster_sums(values, clusters, weights)
    groups, total = len(sums), float(counts.sum())
    mean = float(sums.sum()) / total
    fullest = float(_cluster_sums(np.abs(values), None, weights)[0].sum()) / total - mean * mean
    variance = float(((sums - mean * counts) ** 2).sum()) * groups / (groups - 1) / total**2
    # Where all agree likeness cannot be seen: each entity then counts as one item.
    effective = fullest / variance if variance > 1e-12 * fullest else float(groups)
    if np.isin(values, (-1.0, 0.0, 1.0)).all():
        effective = min(effective, float(len(values)))
    return mean, effective, t_quantile(0.5 + confidence / 2, groups - 1)


def _groups(values: np.ndarray, clusters: Sequence[object] | None) -> int:
    return len(values) if clusters is None else len(set(map(str, clusters)))


def proportion(
    shares: Sequence[float] | np.ndarray,
    clusters: Sequence[object] | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Wilson's interval for a mean of scores from 0 to 1, with as many items as their likeness leaves."""
    array = np.asarray(shares, dtype=float)
    if len(array) == 0:
        return wilson(0.0, 0)
    if clusters is not None and _groups(array, clusters) < 2:
        return Interval(float(array.mean()), 0.0, 1.0, len(array))
    if len(array) == 1:
        return wilson(float(array[0]), 1, confidence)
    mean, effective, z = _effective(array, clusters, None, confidence)
    return Interval(mean, *_wilson(mean, effective, z), len(array))


def score_difference(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence[object] | None = None,
    weights: np.ndarray | None = None,
    confidence: float = CONFIDENCE,
) -> Interval:
    """Tango's interval for the mean of differences from -1 to 1: a score of which few items move is safe."""
    array = np.asarray(differences, dtype=float)
    if _groups(array, clusters) < 2:
        return Interval(float(np.average(array, weights=weights)), -1.0, 1.0, len(array))
    mean, effective, z = _effective(array, clusters, weights, confidence)
    gained, lost = (_effective_part(part, weights) * effective for part in (array, -array))
    return Interval(mean, *_tango(gained, lost, effective, z), len(array))


def _effective_part(values: np.ndarray, weights: np.ndarray | None) -> float:
    return float(np.average(np.clip(values, 0.0, None), weights=weights))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
    reach: float | None = None,
) -> Interval:
    """A studentised bootstrap interval for a weighted mean; items that share an entity are drawn together.

    Where a resample may have no spread it cannot be studentised: a score interval over the range that was
    seen takes its place, or over `reach` to either side of zero, as far as scores may differ.
    """
    array = np.asarray(values, dtype=float)
    if len(array) == 0:
        return Interval(math.nan, -math.inf, math.inf, 0)
    sums, counts = _cluster_sums(array, clusters, None if weights is None else np.asarray(weights, float))
    groups = len(sums)
    mean = float(sums.sum() / counts.sum())
    if groups < 2:
        return Interval(mean, -math.inf, math.inf, len(array))

    def error(total: np.ndarray, count: np.ndarray, centre: np.ndarray) -> np.ndarray:
        """The standard error of a ratio of cluster sums to cluster sizes (delta method)."""
        residual = total - centre[..., None] * count
        variance = (residual**2).sum(-1) / (groups - 1) * groups
        return np.sqrt(variance) / count.sum(-1)

    spread = float(error(sums, counts, np.asarray(mean)))
    generator = np.random.default_rng(seed)
    studentised = []
    # Blocks bound the memory: resamples x groups indices at once would not fit for large evaluations.
    block = max(1, BLOCK // groups)
    for start in range(0, resamples, block):
        drawn = generator.integers(0, groups, size=(min(block, resamples - start), groups))
        total, count = sums[drawn], counts[drawn]
        centre = total.sum(-1) / count.sum(-1)
        spreads = error(total, count, centre)
        if (spreads <= 1e-9 * np.abs(array).max()).any():
            half = t_quantile(0.5 + confidence / 2, groups - 1) * spread
            return _within_reach(array, clusters, weights, reach, confidence, half)
        studentised.append((centre - mean) / spreads)
    low, high = np.quantile(np.concatenate(studentised), [0.5 + confidence / 2, 0.5 - confidence / 2])
    return Interval(mean, mean - float(low) * spread, mean - float(high) * spread, len(array))


def _within_reach(
    values: np.ndarray,
    clusters: Sequence[object] | None,
    weights: Sequence[float] | np.ndarray | None,
    reach: float | None,
    confidence: float,
    half: float,
) -> Interval:
    """The wider of Student's interval and the score interval over the range of the values."""
    shares = None if weights is None else np.asarray(weights, dtype=float)
    base, width = float(values.min()), float(np.ptp(values))
    if reach is not None:
        base, width = 0.0, reach
    mean = float(np.average(values, weights=shares))
    if width == 0:
        # Nothing that was seen says how far values may lie apart.
        return Interval(mean, -math.inf, math.inf, len(values))
    scaled = (values - base) / width
    if reach is None:
        low, high = _wilson(*_effective(scaled, clusters, shares, confidence))
    else:
        found = score_difference(scaled, clusters, shares, confidence)
        low, high = found.low, found.high
    return Interval(
        mean, min(base + width * low, mean - half), max(base + width * high, mean + half), len(values)
    )


def mcnemar(only_first: int, only_second: int) -> float:
    """McNemar's test on discordant pairs, with the mid-p of the exact binomial, so it keeps its level."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    k = min(only_first, only_second)
    log_half = n * math.log(0.5)

    def mass(count: int) -> float:
        return math.exp(math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1) + log_half)

    tail = sum(mass(count) for count in range(k + 1))
    return min(1.0, 2 * tail - mass(k))


def permutation(differences: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """The sign-flip test: how often chance alone makes a mean difference at least this large."""
    moved = differences[differences != 0]
    if not len(moved):
        return 1.0
    observed = abs(moved.sum()) - 1e-12 * np.abs(moved).sum()
    if 2 ** len(moved) <= resamples:
        signs = 1.0 - 2.0 * (np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1)
        return float((np.abs(signs @ moved) >= observed).mean())
    generator = np.random.default_rng(seed)
    reached = 0
    block = max(1, BLOCK // len(moved))
    for start in range(0, resamples, block):
        signs = generator.choice([-1.0, 1.0], size=(min(block, resamples - start), len(moved)))
        reached += int((np.abs(signs @ moved) >= observed).sum())
    # Draws alone never fall below one in their number, so of many comparisons none could be shown. No sum
    # of signed numbers has a tail above 3.18 times the normal one (Bentkus and Dzindzalieta, 2015).
    tail = 3.18 * math.erfc(observed / math.sqrt(2 * float((moved**2).sum())))
    return min((reached + 1) / (resamples + 1), tail)


def no_order(groups: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0) -> float:
    """How often the best and the worst of groups that are all alike lie as far apart (permutation test)."""
    values = np.concatenate([np.asarray(group, dtype=float) for group in groups])
    sizes = np.array([len(group) for group in groups])
    starts = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    generator = np.random.default_rng(seed)
    drawn = generator.permuted(np.tile(values, (resamples, 1)), axis=1)
    found = np.ptp(np.add.reduceat(np.vstack((values, drawn)), starts, axis=1) / sizes, axis=1)
    return float(((found[1:] >= found[0] - 1e-12).sum() + 1) / (resamples + 1))


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[object] | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> Difference:
    """Second minus first on the same items: an interval and a test that fit the kind of score."""
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    assert before.shape == after.shape, "paired scores need the same items in the same order"
    difference = after - before
    shares = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=float)
    scores = np.concatenate((before, after))
    if (shares == 1).all() and ((scores >= 0) & (scores <= 1)).all() and len(scores):
        interval = score_difference(difference, clusters)
    else:
        reach = float(np.ptp(scores)) if len(scores) else 0.0
        interval = bootstrap(difference, clusters=clusters, weights=shares, seed=seed, reach=reach)
    if clusters is None and np.isin(scores, (0.0, 1.0)).all() and (shares == 1).all():
        p_value = mcnemar(int((difference < 0).sum()), int((difference > 0).sum()))
    else:
        sums, _ = _cluster_sums(difference, clusters, shares)
        p_value = permutation(sums, seed=seed)
    return Difference(interval, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: p-values that stay small only if they survive every comparison that was made."""
    order = np.argsort(p_values)
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """The unbiased estimate of the chance that at least one of k answers is right (Chen et al., 2021)."""
    assert 1 <= k <= samples
    if samples - correct < k:
        return 1.0
    return 1.0 - math.prod((samples - correct - i) / (samples - i) for i in range(k))


def bootstrap_of(
    statistic: Callable[[np.ndarray], float], items: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """A percentile bootstrap interval for any statistic of whole items (rows)."""
    generator = np.random.default_rng(seed)
    draws = [statistic(items[generator.integers(0, len(items), len(items))]) for _ in range(resamples)]
    low, high = np.quantile(draws, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return Interval(float(statistic(items)), float(low), float(high), len(items))
