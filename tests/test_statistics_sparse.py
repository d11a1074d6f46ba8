"""Where few items differ: intervals that keep their word, tests without a floor, models that are equal."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from trivium.evals.results import Record, estimate
from trivium.evals.statistics import (
    Difference,
    bootstrap,
    holm,
    mcnemar,
    paired_difference,
    permutation,
    proportion,
    tango,
)


@pytest.mark.parametrize(
    ("gained", "lost", "n", "low", "high"),
    [(28, 25, 618, -0.0148, 0.0247), (48, 41, 549, -0.0157, 0.0414)],
)
def test_tangos_interval_is_that_of_r(gained: int, lost: int, n: int, low: float, high: float) -> None:
    """Values of `scoreci.mp` of the R package PropCIs 0.3-0 at 90 %."""
    found = tango(gained, lost, n, confidence=0.9)
    assert (found.low, found.high) == (pytest.approx(low, abs=5.1e-5), pytest.approx(high, abs=5.1e-5))


@pytest.mark.parametrize(("gained", "lost", "n"), [(7, 2, 60), (0, 3, 40), (1, 0, 100), (30, 5, 50)])
def test_tangos_ends_are_where_the_score_test_begins_to_refuse(gained: int, lost: int, n: int) -> None:
    """The likeliest share of losses is searched on a grid, not solved for."""
    found = tango(gained, lost, n)
    for end in (found.low, found.high):
        losses = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]
        chances = gained * np.log(losses + end) + lost * np.log(losses)
        chances += (n - gained - lost) * np.log(1 - 2 * losses - end)
        best = losses[np.argmax(chances)]
        variance = (2 * best + end - end * end) / n
        assert abs(found.value - end) / math.sqrt(variance) == pytest.approx(1.959964, abs=1e-3)


def tables(n: int, gain: float, loss: float) -> Iterator[tuple[int, int, float]]:
    """Every number of gains and losses that is not absurd, and its chance."""
    most = round(n * (gain + loss) + 6 * math.sqrt(n * (gain + loss)) + 8)
    for gained in range(most):
        for lost in range(most - gained):
            rest = n - gained - lost
            if rest < 0:
                continue
            ways = math.lgamma(n + 1) - sum(math.lgamma(one + 1) for one in (gained, lost, rest))
            log = ways + gained * math.log(gain) + lost * math.log(loss) + rest * math.log(1 - gain - loss)
            yield gained, lost, math.exp(log)


def pairs(gained: int, lost: int, n: int) -> Difference:
    scores = np.zeros((2, n))
    scores[1, :gained] = scores[0, gained : gained + lost] = 1
    return paired_difference(scores[0], scores[1])


@pytest.mark.parametrize(
    ("part", "n", "most"),
    [(0.01, 100, 1.0), (0.02, 100, 1.0), (0.05, 100, 0.97), (0.1, 60, 0.97), (0.3, 60, 0.97)],
)
def test_intervals_of_sparse_pairs_cover_what_they_promise(part: float, n: int, most: float) -> None:
    """Exactly, over all tables: where one or two items differ no interval can do with less than all of it."""
    coverage = 0.0
    for gained, lost, chance in tables(n, 0.8 * part, 0.2 * part):
        found = pairs(gained, lost, n).interval
        assert found.low < found.high
        coverage += chance * (found.low <= 0.6 * part <= found.high)
    assert 0.93 <= coverage <= most


def test_of_equal_models_interval_and_verdict_say_the_same() -> None:
    outside = shown = 0.0
    for gained, lost, chance in tables(100, 0.04, 0.04):
        found = pairs(gained, lost, 100)
        outside += chance * found.interval.excludes(0.0)
        shown += chance * found.significant
        if mcnemar(lost, gained) < 0.05:
            assert found.interval.excludes(0.0), "a difference is not shown where its interval holds zero"
    assert shown <= outside <= 0.06


def drawn(draw: Callable[[np.random.Generator], bool], repeats: int) -> float:
    return float(np.mean([draw(np.random.default_rng(5000 + repeat)) for repeat in range(repeats)]))


@pytest.mark.parametrize(
    ("mean", "n", "most"),
    [(0.01, 100, 0.99), (0.03, 100, 0.97), (0.97, 100, 0.97), (0.1, 60, 0.97), (0.5, 60, 0.97)],
)
def test_graded_shares_cover_what_they_promise_and_stay_shares(mean: float, n: int, most: float) -> None:
    """Four tries a question, of which most questions are always or never answered."""

    def holds(random: np.random.Generator) -> bool:
        values = random.binomial(4, random.beta(3 * mean, 3 * (1 - mean), n)) / 4
        found = proportion(values)
        assert 0 <= found.low <= found.value <= found.high <= 1
        return found.low <= mean <= found.high

    assert 0.93 <= drawn(holds, 3000) <= most


def test_a_score_whose_items_weigh_differently_is_their_weighted_mean() -> None:
    """Also where the score is a share and most weights are one."""
    weights = [1.0, 1.0, 3.0, 1.0, 7.0, 1.0, 2.0, 1.0]
    values = [0.0, 1.0, 0.5, 1.0, 0.25, 0.0, 1.0, 0.5]
    records = [
        Record(str(at), "", "", (), {"x": value}, {"x": weight})
        for at, (value, weight) in enumerate(zip(values, weights))
    ]
    found = estimate(records, "x")
    assert found.value == pytest.approx(float(np.average(values, weights=weights)))
    assert found.low < found.value < found.high


def test_a_graded_score_of_records_stays_a_share() -> None:
    values = [0.25, *[0.0] * 99]
    found = estimate(
        [Record(str(at), "", "", (), {"pass@1": one}) for at, one in enumerate(values)], "pass@1"
    )
    assert 0 <= found.low < 0.0025 < found.high < 0.05


@pytest.mark.parametrize(
    ("part", "least", "most"), [(0.05, 0.93, 0.99), (0.1, 0.93, 0.97), (0.3, 0.93, 0.97)]
)
def test_clustered_pairs_cover_what_they_promise(part: float, least: float, most: float) -> None:
    """Forty entities of three questions; an entity is gained or lost more or less as a whole."""
    clusters = np.repeat(np.arange(40), 3)

    def holds(random: np.random.Generator) -> bool:
        moved = random.random(120) < random.beta(2 * part, 2 * (1 - part), 40)[clusters]
        change = np.where((random.random(40) < 0.8)[clusters], 1.0, -1.0) * moved
        found = paired_difference(change < 0, change > 0, clusters=clusters.tolist()).interval
        return found.low <= 0.6 * part <= found.high

    assert least <= drawn(holds, 600) <= most


def independent(random: np.random.Generator) -> Difference:
    skill = random.uniform(0.2, 0.9, 150)
    first, second = random.random((2, 150)) < skill
    return paired_difference(first, second)


def sparse(random: np.random.Generator) -> Difference:
    first = random.random(100) < 0.5
    return paired_difference(first, first ^ (random.random(100) < 0.06))


def of_entities(random: np.random.Generator) -> Difference:
    clusters = np.repeat(np.arange(40), 3)
    skill = random.uniform(0.1, 0.9, (2, 40))[:, clusters]
    first, second = random.random((2, 120)) < skill
    return paired_difference(first, second, clusters=clusters.tolist())


def graded(random: np.random.Generator) -> Difference:
    skill = random.beta(0.6, 1.4, 80)
    return paired_difference(*(random.binomial(4, skill, (2, 80)) / 4))


def weighed(random: np.random.Generator) -> Difference:
    sizes = random.uniform(20.0, 200.0, 60)
    return paired_difference(*(2 + random.normal(0, 1, (2, 60)) / np.sqrt(sizes)), weights=sizes)


def lengths(random: np.random.Generator) -> Difference:
    """Most answers run to the limit of 48 tokens."""
    stops = np.where(random.random((2, 100)) < 0.05, random.integers(3, 48, (2, 100)), 48)
    return paired_difference(*stops)


@pytest.mark.parametrize("equal", [independent, sparse, of_entities, graded, weighed, lengths])
def test_equal_models_are_no_difference_on_every_path(
    equal: Callable[[np.random.Generator], Difference],
) -> None:
    found = [equal(np.random.default_rng(5000 + repeat)) for repeat in range(200)]
    assert np.mean([not one.significant for one in found]) >= 0.93
    assert np.mean([not one.interval.excludes(0.0) for one in found]) >= 0.91


def test_a_model_beside_itself_gets_an_interval_that_is_no_point() -> None:
    right = np.arange(50) % 3 == 0
    alike = paired_difference(right, right).interval
    assert alike.low == pytest.approx(-3.8415 / 53.8415, abs=1e-4)
    assert alike.high == pytest.approx(3.8415 / 53.8415, abs=1e-4)
    tokens = np.arange(50) % 7
    found = paired_difference(tokens, tokens).interval
    assert found.low < 0 < found.high
    # All answers of one length say nothing about how far lengths may lie apart.
    assert bootstrap([12.0] * 50).high == math.inf
    lone = bootstrap([3.0, 4.0, 8.0], clusters=["town"] * 3)
    assert (lone.low, lone.value, lone.high, lone.n) == (-math.inf, 5.0, math.inf, 3)
    alone = paired_difference([0.0] * 6, [1.0] * 6, clusters=["town"] * 6).interval
    assert (alone.low, alone.value, alone.high) == (-1.0, 1.0, 1.0)
    assert proportion([1.0] * 6, ["town"] * 6).low == 0.0, "one entity alone bounds nothing"


def exact_flips(sums: np.ndarray) -> float:
    """The sign-flip test of whole numbers, by adding one after the other to the distribution of their sum."""
    chances = np.ones(1)
    for one in np.abs(sums[sums != 0]):
        step = np.zeros(2 * one + 1)
        step[[0, -1]] = 0.5
        chances = np.convolve(chances, step)
    values = np.arange(len(chances)) - np.abs(sums).sum()
    return float(chances[np.abs(values) >= abs(sums.sum())].sum())


def test_the_sign_flip_test_is_exact_for_few_and_has_no_floor_for_many() -> None:
    few = np.array([1, 2, 1, 3, -1, 0, 2])
    assert permutation(few.astype(float)) == pytest.approx(exact_flips(few))
    random = np.random.default_rng(0)
    for shift in (0.2, 0.5, 1.0, 1.5, 3.0):
        sums = np.round(random.normal(shift, 1.5, 60)).astype(int)
        truth, found = exact_flips(sums), permutation(sums.astype(float))
        noise = 4 * math.sqrt(truth / 2000)
        assert truth - noise <= found <= truth + noise + 0.0005
    many = [permutation(random.normal(1.5, 1.0, 60)), *random.uniform(0, 1, 400)]
    assert holm(many)[0] < 0.01
