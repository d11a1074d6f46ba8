"""The plan: every batch a function of (seed, index), every source within one row of its share (L2)."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.mixture import BLOCK, MixturePlan, PlannedSource, weights_over
from trivium.data.settings import mixture_of
from trivium.kit.errors import TriviumError

knots = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5, 0.75, 1.0]), st.sampled_from([0, 1e-4, 0.1, 0.3, 1, 7])
    ),
    min_size=1,
    max_size=4,
).map(lambda some: tuple(sorted(some, key=lambda knot: knot[0])))


@st.composite
def plans(draw: st.DrawFn) -> MixturePlan:
    count = draw(st.integers(1, 9))
    sources = [
        PlannedSource(f"s{index}", draw(st.integers(1, 400)), draw(knots), start=draw(st.integers(0, 500)))
        for index in range(count)
    ]
    sources.append(PlannedSource("always", draw(st.integers(1, 400)), ((0.0, 0.05),)))
    return MixturePlan(
        tuple(sources), draw(st.integers(1, 3 * BLOCK)), draw(st.integers(1, 40)), draw(st.integers(0, 9))
    )


@settings(max_examples=80, deadline=None)
@given(plan=plans())
def test_every_source_is_within_one_row_of_its_share_at_every_moment(plan: MixturePlan) -> None:
    sources, draws = plan.choices(0, plan.total)
    given_so_far = np.cumsum(np.eye(len(plan.sources))[sources], axis=0)
    ideal = plan.ideal(np.arange(1, plan.total + 1))
    assert np.abs(given_so_far - ideal).max() < 1 + 1e-6
    for index in range(len(plan.sources)):
        assert (draws[sources == index] == np.arange((sources == index).sum())).all()


@settings(max_examples=40, deadline=None)
@given(plan=plans(), data=st.data())
def test_any_stretch_of_the_plan_can_be_asked_for_alone(plan: MixturePlan, data: st.DataObject) -> None:
    whole = plan.take(0, plan.total)
    first = data.draw(st.integers(0, plan.total))
    count = data.draw(st.integers(0, plan.total - first))
    fresh = MixturePlan(plan.sources, plan.total, plan.batch, plan.seed)
    assert fresh.take(first, count) == whole[first : first + count]
    drawn = Counter(source for source, _ in whole[:first])
    assert fresh.drawn(first) == [drawn[index] for index in range(len(plan.sources))]


@settings(max_examples=40, deadline=None)
@given(plan=plans())
def test_each_pass_takes_every_row_once_in_an_order_of_its_own(plan: MixturePlan) -> None:
    taken = plan.take(0, plan.total)
    for index, source in enumerate(plan.sources):
        rows = [row for which, row in taken if which == index]
        skip = -source.start % source.rows
        passes = [rows[at : at + source.rows] for at in range(skip, len(rows), source.rows)]
        whole = [one for one in passes if len(one) == source.rows]
        assert all(sorted(one) == list(range(source.rows)) for one in whole)
        if source.rows > 20:
            assert all(one != other for one, other in pairwise(whole))


def mixture(total: int = 4000, batch: int = 16, seed: int = 3) -> MixturePlan:
    return MixturePlan(
        (
            PlannedSource("web", 900, weights_over([0.8, 0.3])),
            PlannedSource("books", 400, weights_over([[0, 0.2], [0.5, 0.2], [1, 0.7]])),
            PlannedSource("code", 77, weights_over(0.05)),
        ),
        total,
        batch,
        seed,
    )


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_any_number_of_processes_trains_the_same_rows(world: int) -> None:
    plan = mixture()
    for step in (0, 7, 63, 64, 249):
        batch = mixture().rows(step)
        by_rank = [mixture().rows(step)[rank::world] for rank in range(world)]
        assert sorted(row for rows in by_rank for row in rows) == sorted(batch) == sorted(plan.rows(step))


def test_a_run_resumes_anywhere() -> None:
    plan = mixture()
    batches = [plan.rows(step) for step in range(plan.steps)]
    for step in range(0, plan.steps, 17):
        assert mixture().rows(step) == batches[step]


def test_another_batch_size_is_another_stride_through_the_same_order() -> None:
    small, large = mixture(batch=8), mixture(batch=32)
    assert small.hash == large.hash
    assert [row for step in range(4, 8) for row in small.rows(step)] == large.rows(1)


def test_weights_move_along_their_lines() -> None:
    plan = mixture(total=100_000, batch=1)
    sources, _ = plan.choices(0, plan.total)

    def share(source: int, at: float) -> float:
        near = sources[int(at * plan.total) - 500 :][:1000] if at else sources[:1000]
        return float((near == source).mean())

    assert share(0, 0) == pytest.approx(0.8 / 1.05, abs=0.01)
    # Shares are normalised at the knots and straight in between.
    middle = 0.55 / 0.8
    assert share(0, 0.5) == pytest.approx(middle, abs=0.01)
    assert share(0, 0.25) == pytest.approx((0.8 / 1.05 + middle) / 2, abs=0.01)
    assert share(2, 0.999) == pytest.approx(0.05 / 1.05, abs=0.01)


def test_a_step_in_the_weights_is_a_step() -> None:
    stepped = weights_over([[0, 1], [0.5, 1], [0.5, 0], [1, 0]])
    plan = MixturePlan((PlannedSource("a", 10, stepped), PlannedSource("b", 10, ((0.0, 1.0),))), 2000, 1, 0)
    sources, _ = plan.choices(0, 2000)
    assert abs((sources[:1000] == 0).sum() - 500) <= 1
    assert (sources[1001:] == 0).sum() == 0


def test_too_many_passes_are_refused_with_the_numbers() -> None:
    source = PlannedSource("books", 100, start=50, max_repeats=4)
    assert MixturePlan((source,), 350, 10, 0).steps == 35
    with pytest.raises(TriviumError, match=r"books has 100 rows .* draw 360 .* 50 already seen: 4\.1 passes"):
        MixturePlan((source,), 360, 10, 0)


def test_a_stage_goes_on_where_its_parent_stopped() -> None:
    whole = MixturePlan((PlannedSource("a", 100),), 150, 10, 5)
    first = MixturePlan((PlannedSource("a", 100),), 60, 10, 5)
    start = first.consumed(first.steps)["a"]
    second = MixturePlan((PlannedSource("a", 100, start=start),), 90, 10, 5)
    assert start == 60
    assert first.take(0, 60) + second.take(0, 90) == whole.take(0, 150)
    assert second.consumed(9)["a"] == 150


def test_a_curriculum_takes_rows_in_the_given_order() -> None:
    ranking = np.array([3, 1, 0, 2])
    plan = MixturePlan((PlannedSource("a", 4, ranking=ranking),), 8, 2, 0)
    assert [row for _, row in plan.take(0, 8)] == [3, 1, 0, 2, 3, 1, 0, 2]
    assert plan.hash != MixturePlan((PlannedSource("a", 4, ranking=ranking[::-1]),), 8, 2, 0).hash


def test_a_curriculum_gets_hard_at_a_fraction_of_a_pass() -> None:
    difficulty = np.random.default_rng(0).permutation(1000)
    source = PlannedSource("a", 1000, ranking=np.argsort(difficulty))
    plan = MixturePlan((source,), 100, 10, 0)
    met = [int(difficulty[row]) for _, row in plan.take(0, 100)]
    assert met == sorted(met)
    assert len(set(met)) == 100
    # A tenth drawn at random: quartiles near those of the whole (standard error about 43).
    assert np.abs(np.quantile(met, [0.25, 0.5, 0.75]) - [250, 500, 750]).max() < 130
    assert max(met) > 900
    assert met != [int(difficulty[row]) for _, row in MixturePlan((source,), 100, 10, 1).take(0, 100)]


def test_a_curriculum_that_goes_on_draws_the_rest_of_the_pass() -> None:
    ranking = np.random.default_rng(1).permutation(50)
    place = {row: at for at, row in enumerate(ranking.tolist())}
    first = [row for _, row in MixturePlan((PlannedSource("a", 50, ranking=ranking),), 30, 10, 4).take(0, 30)]
    rest = MixturePlan((PlannedSource("a", 50, ranking=ranking, start=30),), 60, 10, 4)
    taken = [row for _, row in rest.take(0, 60)]
    assert sorted(first + taken[:20]) == list(range(50))
    for part in (first, taken[:20], taken[20:]):
        assert [place[row] for row in part] == sorted(place[row] for row in part)
    assert len(set(taken[20:])) == 40
    assert [rest.take(at, 7) for at in (15, 41)] == [
        [(0, row) for row in taken[at : at + 7]] for at in (15, 41)
    ]


def test_the_hash_changes_with_everything_that_moves_a_row() -> None:
    base = PlannedSource("a", 10, ((0.0, 1.0),), fingerprint="x")
    other = PlannedSource("b", 10)
    plans = [
        MixturePlan((base, other), 100, 10, 0),
        MixturePlan((base, other), 100, 10, 1),
        MixturePlan((base, other), 110, 10, 0),
        MixturePlan((other, base), 100, 10, 0),
        MixturePlan((base,), 100, 10, 0),
        MixturePlan((PlannedSource("a", 11, fingerprint="x"), other), 100, 10, 0),
        MixturePlan((PlannedSource("a", 10, ((0.0, 2.0),), fingerprint="x"), other), 100, 10, 0),
        MixturePlan((PlannedSource("a", 10, start=1, fingerprint="x"), other), 100, 10, 0),
        MixturePlan((PlannedSource("a", 10, fingerprint="y"), other), 100, 10, 0),
    ]
    assert len({plan.hash for plan in plans}) == len(plans)
    assert MixturePlan((base, other), 100, 10, 0).hash == plans[0].hash


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "at least one source"),
        ((PlannedSource("a", 0),), "a has no rows"),
        ((PlannedSource("a", 5, ((0.0, -1.0),)),), "below zero"),
        (
            (PlannedSource("a", 5, ((0.0, 1.0), (1.0, 0.0))),),
            "At 100% of the stage every source has weight 0",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(sources: tuple, message: str) -> None:
    with pytest.raises(TriviumError, match=message):
        MixturePlan(sources, 10, 1, 0)


@pytest.mark.parametrize("weight", [[], [[0.5, 1], [0.2, 1]], [[0, 1], [2, 1]], [[0, 1, 2]]])
def test_weights_that_cannot_be_are_refused(weight: list) -> None:
    with pytest.raises(TriviumError, match="weight"):
        weights_over(weight)


def test_the_order_is_written_down_once() -> None:
    assert mixture().rows(5)[:6] == [(0, 237), (0, 714), (2, 75), (0, 738), (0, 297), (0, 854)]


def test_one_source_may_be_written_as_a_mapping_with_a_path() -> None:
    """As a corpus takes it; otherwise the keys are names of sources."""
    one = {"path": "world:sums?form=prompt", "limit": 50}
    assert mixture_of(one) == mixture_of([one])
    assert list(mixture_of(one)) == ["world:sums?form=prompt"]
