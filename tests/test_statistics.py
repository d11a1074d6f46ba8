"""Intervals must cover what they promise, and two equal models must be called equal."""

import math
import tracemalloc

import numpy as np
import pytest

from trivium.evals.statistics import (
    bootstrap,
    bootstrap_of,
    holm,
    mcnemar,
    normal_quantile,
    paired_difference,
    pass_at_k,
    proportion,
    wilson,
)


def covered(make_interval, truth: float, repeats: int) -> float:
    """The share of simulated experiments whose interval holds the truth."""
    hits = 0
    for repeat in range(repeats):
        interval = make_interval(np.random.default_rng(1000 + repeat))
        hits += interval.low <= truth <= interval.high
    return hits / repeats


@pytest.mark.parametrize(("share", "n"), [(0.5, 200), (0.1, 150), (0.85, 400)])
def test_wilson_covers_what_it_promises(share: float, n: int) -> None:
    coverage = covered(lambda random: wilson(random.binomial(n, share), n), share, 4000)
    assert 0.93 <= coverage <= 0.97


@pytest.mark.parametrize("scale", ["normal", "skewed"])
def test_the_bootstrap_of_a_mean_covers_what_it_promises(scale: str) -> None:
    def draw(random: np.random.Generator):
        values = random.normal(1.0, 2.0, 80) if scale == "normal" else random.exponential(1.0, 150)
        return bootstrap(values, resamples=400, seed=int(random.integers(1 << 30)))

    assert 0.93 <= covered(draw, 1.0, 1200) <= 0.97


def test_items_that_share_an_entity_need_the_clustered_interval() -> None:
    """Forty entities with five items each: the plain interval is far too narrow, the clustered one is not."""

    def draw(random: np.random.Generator, clustered: bool):
        effects = np.repeat(random.normal(0.0, 1.0, 60), 5)
        values = effects + random.normal(0.0, 0.3, 300)
        clusters = np.repeat(np.arange(60), 5) if clustered else None
        return bootstrap(values, clusters=clusters, resamples=300, seed=int(random.integers(1 << 30)))

    assert 0.93 <= covered(lambda random: draw(random, True), 0.0, 800) <= 0.97
    assert covered(lambda random: draw(random, False), 0.0, 200) < 0.8


@pytest.mark.parametrize("mean", [0.05, 0.5, 0.9])
def test_a_proportion_of_shared_entities_covers_what_it_promises(mean: float) -> None:
    """Entities that are known well or badly, two or three items on each."""

    def draw(random: np.random.Generator):
        skill = random.beta(2 * mean, 2 * (1 - mean), 80)
        clusters = np.repeat(np.arange(80), random.integers(2, 4, 80))
        return proportion((random.random(len(clusters)) < skill[clusters]).astype(float), clusters.tolist())

    assert 0.93 <= covered(draw, mean, 1500) <= 0.97


def test_a_proportion_without_shared_entities_is_wilsons() -> None:
    assert proportion([1.0, 0.0, 0.0]) == wilson(1, 3)
    lone = proportion([1.0, 0.0, 0.0], ["a", "b", "c"])
    assert (lone.value, lone.n) == (pytest.approx(1 / 3), 3)


def test_a_mean_weighted_by_size_covers_what_it_promises() -> None:
    """Bits per byte: long documents count more, and how long they are is itself drawn."""

    def draw(random: np.random.Generator):
        sizes = random.uniform(20.0, 200.0, 120)
        values = 2.0 + random.normal(0.0, 0.5, 120) * np.sqrt(100.0 / sizes)
        return bootstrap(values, weights=sizes, resamples=400, seed=int(random.integers(1 << 30)))

    assert 0.93 <= covered(draw, 2.0, 1200) <= 0.97


def test_a_model_against_itself_is_no_difference() -> None:
    """Two hundred comparisons of two models with the same skill on the same items."""
    calls = 0
    for repeat in range(200):
        random = np.random.default_rng(repeat)
        skill = random.uniform(0.2, 0.9, 150)
        first, second = random.random((2, 150)) < skill
        calls += not paired_difference(first.astype(float), second.astype(float), seed=repeat).significant
    assert calls / 200 >= 0.93


def test_a_real_gain_is_seen_in_score_and_interval() -> None:
    random = np.random.default_rng(3)
    first = (random.random(400) < 0.4).astype(float)
    second = np.maximum(first, (random.random(400) < 0.3).astype(float))
    difference = paired_difference(first, second)
    assert difference.significant
    assert difference.interval.low > 0
    assert difference.interval.value == pytest.approx((second - first).mean())


def test_mcnemar_counts_by_hand() -> None:
    """Eight against two discordant pairs: 2 * (P(0) + P(1) + P(2)/2) of a fair coin thrown ten times."""
    assert mcnemar(8, 2) == pytest.approx(2 * (1 + 10 + 45 / 2) / 1024)
    assert mcnemar(0, 0) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_pass_at_k_is_the_mean_over_all_choices() -> None:
    """Against every subset of three of the answers, counted one by one."""
    from itertools import combinations

    answers = [1, 0, 0, 1, 0, 0]
    subsets = list(combinations(answers, 3))
    assert pass_at_k(2, 6, 3) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_normal_quantile_against_known_points() -> None:
    assert normal_quantile(0.975) == pytest.approx(1.959963984540054, abs=1e-9)
    assert normal_quantile(0.0005) == pytest.approx(-3.2905267314919255, abs=1e-9)


def test_the_bootstrap_of_any_statistic_is_the_percentile_interval() -> None:
    """Of the spread of skewed values, whose interval reaches further to one side: resampled anew here."""
    items = np.random.default_rng(0).lognormal(size=(40, 1))
    interval = bootstrap_of(lambda rows: float(rows.std()), items)
    draws = np.random.default_rng(99).choice(items[:, 0], size=(20_000, len(items))).std(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    width = high - low
    assert interval.value == items.std()
    assert interval.n == 40
    assert interval.low == pytest.approx(low, abs=0.05 * width)
    assert interval.high == pytest.approx(high, abs=0.05 * width)
    # So lopsided that the mirrored interval would lie outside the margins above.
    assert (interval.value - low) - (high - interval.value) > 0.1 * width


def ratio_of(total: np.ndarray, count: np.ndarray) -> tuple[float, float]:
    """A ratio of cluster sums to cluster sizes and its standard error, one residual after the other."""
    groups, mean = len(total), total.sum() / count.sum()
    squares = sum((one - mean * size) ** 2 for one, size in zip(total, count, strict=True))
    return mean, math.sqrt(groups / (groups - 1) * squares) / count.sum()


@pytest.mark.parametrize("clustered", [False, True])
def test_the_tails_of_the_studentised_bootstrap_change_places(clustered: bool) -> None:
    """The upper quantile of t gives the lower end: of skewed values the upper end lies further away."""
    random = np.random.default_rng(4)
    sizes = random.integers(1, 4, 25) if clustered else np.ones(25, dtype=int)
    clusters = np.repeat(np.arange(25), sizes)
    values = np.repeat(random.lognormal(sigma=1.2, size=25), sizes)
    found = bootstrap(values, clusters=clusters.tolist() if clustered else None)
    total = np.bincount(clusters, weights=values)
    mean, spread = ratio_of(total, sizes)
    resampled = np.random.default_rng(99)
    t = []
    for _ in range(4000):
        drawn = resampled.integers(0, 25, 25)
        centre, error = ratio_of(total[drawn], sizes[drawn])
        t.append((centre - mean) / error)
    below, above = np.quantile(t, [0.025, 0.975])
    assert found.value == pytest.approx(mean)
    assert found.low == pytest.approx(mean - above * spread, abs=0.1 * spread)
    assert found.high == pytest.approx(mean - below * spread, rel=0.15)
    assert found.high - mean > 2 * (mean - found.low)


T_0975 = {2: 4.302653, 3: 3.182446, 5: 2.570582, 11: 2.200985}
"""Upper 2.5 % points of Student's t, from printed tables, by degrees of freedom."""


def test_too_few_items_to_resample_get_students_interval() -> None:
    values = np.array([0.0, 1.0, 5.0])
    half = T_0975[2] * values.std(ddof=1) / math.sqrt(3)
    for found in (bootstrap(values), bootstrap(values.repeat(4), clusters=[1] * 4 + [2] * 4 + [3] * 4)):
        assert (found.low, found.high) == (
            pytest.approx(2 - half, abs=1e-5),
            pytest.approx(2 + half, abs=1e-5),
        )


@pytest.mark.parametrize("groups", [3, 4, 6, 12])
def test_few_entities_widen_the_interval_by_their_factor_and_students_t(groups: int) -> None:
    """The variance of a ratio carries groups / (groups - 1), which matters most where groups are few."""
    random = np.random.default_rng(groups)
    sizes = random.integers(2, 6, groups)
    clusters = np.repeat(np.arange(groups), sizes)
    values = (random.random(len(clusters)) < random.uniform(0.1, 0.9, groups)[clusters]).astype(float)
    mean, error = ratio_of(np.bincount(clusters, weights=values), sizes)
    effective = min(len(values), mean * (1 - mean) / error**2)
    z = T_0975[groups - 1]
    centre = (mean + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z * math.sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2)) / (1 + z * z / effective)
    found = proportion(values, clusters.tolist())
    assert (found.value, found.n) == (pytest.approx(mean), len(values))
    assert (found.low, found.high) == (
        pytest.approx(centre - half, abs=1e-6),
        pytest.approx(centre + half, abs=1e-6),
    )


def test_one_group_says_nothing_of_the_spread():
    found = bootstrap([0.2, 0.4], clusters=["one", "one"])
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_the_bootstrap_of_many_groups_needs_little_memory() -> None:
    values = np.random.default_rng(0).random(5000)
    tracemalloc.start()
    bootstrap(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The draws of all groups at once would be 80 MB.
    assert peak < 8e6
