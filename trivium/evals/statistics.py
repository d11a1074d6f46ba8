"""Intervals and paired comparisons: what may be claimed from the answers that were seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate, its confidence interval, and how many items it rests on."""

    value: float
    low: float
    high: float
    n: int

    def excludes(self, point: float) -> bool:
        """Whether the interval leaves this value out."""
        return point < self.low or point > self.high


@dataclass(frozen=True)
class Difference:
    """How much the second of two models differs from the first on the same items."""

    interval: Interval
    p_value: float

    @property
    def significant(self) -> bool:
        """Whether the p-value, after any correction it was given, is below one minus the confidence."""
        return self.p_value < 1 - CONFIDENCE


def normal_quantile(probability: float) -> float:
    """The value below which a standard normal variable falls with this probability, by Newton's method."""
    assert 0 < probability < 1
    value = 0.0
    for _ in range(60):
        density = math.exp(-value * value / 2) / math.sqrt(2 * math.pi)
        error = 0.5 * (1 + math.erf(value / math.sqrt(2))) - probability
        # A step of at most one keeps Newton's method from overshooting in the flat tails.
        value -= max(-1.0, min(1.0, error / density))
    return value


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Wilson's score interval for a proportion, which stays honest near 0 and 1."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0, 0)
    z = normal_quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _cluster_sums(
    values: np.ndarray, clusters: Sequence[object] | None, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The weighted sum and the weight of every cluster; without clusters each value is its own."""
    shares = np.ones_like(values) if weights is None else weights
    if clusters is None:
        return values * shares, shares
    _, index = np.unique(np.asarray([str(name) for name in clusters]), return_inverse=True)
    return np.bincount(index, weights=values * shares), np.bincount(index, weights=shares)


def proportion(successes: Sequence[float] | np.ndarray, clusters: Sequence[object] | None = None) -> Interval:
    """Wilson's interval; of items that share an entity only as many count as their likeness leaves."""
    array = np.asarray(successes, dtype=float)
    if clusters is None or len(array) == 0:
        return wilson(float(array.sum()), len(array))
    sums, counts = _cluster_sums(array, clusters)
    groups, share = len(sums), float(array.mean())
    # Where all agree likeness cannot be seen: each entity then counts as one item.
    effective = float(groups)
    if 0 < share < 1 and groups > 1:
        variance = ((sums - share * counts) ** 2).sum() * groups / (groups - 1) / len(array) ** 2
        effective = min(len(array), share * (1 - share) / variance) if variance > 0 else len(array)
    z = normal_quantile(0.5 + CONFIDENCE / 2)
    centre = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    spread = share * (1 - share) / effective + z * z / (4 * effective**2)
    half = z / (1 + z * z / effective) * math.sqrt(spread)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), len(array))


def bootstrap(
    values: Sequence[float] | np.ndarray,
    *,
    clusters: Sequence[object] | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """A studentised bootstrap interval for a weighted mean; items that share an entity are drawn together."""
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
    if spread == 0:
        return Interval(mean, mean, mean, len(array))
    generator = np.random.default_rng(seed)
    studentised = []
    # Blocks bound the memory: resamples x groups indices at once would not fit for large evaluations.
    block = max(1, 2_000_000 // groups)
    for start in range(0, resamples, block):
        drawn = generator.integers(0, groups, size=(min(block, resamples - start), groups))
        total, count = sums[drawn], counts[drawn]
        centre = total.sum(-1) / count.sum(-1)
        spreads = error(total, count, centre)
        studentised.append((centre - mean) / np.where(spreads > 0, spreads, np.inf))
    low, high = np.quantile(np.concatenate(studentised), [0.5 + confidence / 2, 0.5 - confidence / 2])
    return Interval(mean, mean - float(low) * spread, mean - float(high) * spread, len(array))


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
    observed = abs(differences.sum())
    if not np.any(differences):
        return 1.0
    generator = np.random.default_rng(seed)
    reached = 0
    block = max(1, 2_000_000 // len(differences))
    for start in range(0, resamples, block):
        signs = generator.choice([-1.0, 1.0], size=(min(block, resamples - start), len(differences)))
        reached += int((np.abs(signs @ differences) >= observed - 1e-12).sum())
    return (reached + 1) / (resamples + 1)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    *,
    clusters: Sequence[object] | None = None,
    weights: Sequence[float] | np.ndarray | None = None,
    seed: int = 0,
) -> Difference:
    """Second minus first on the same items: a bootstrap interval, and a test that fits the kind of score."""
    before, after = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    assert before.shape == after.shape, "paired scores need the same items in the same order"
    difference = after - before
    shares = np.ones_like(difference) if weights is None else np.asarray(weights, dtype=float)
    interval = bootstrap(difference, clusters=clusters, weights=shares, seed=seed)
    binary = np.isin(before, (0.0, 1.0)).all() and np.isin(after, (0.0, 1.0)).all() and (shares == 1).all()
    if clusters is None and binary:
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
