"""The learning rate is a pure function of the step, and each decay is the curve its name says."""

import math

import pytest

from trivium.kit.errors import TriviumError
from trivium.learn.schedules import factor, in_steps, warmup_steps
from trivium.learn.settings import LearningRate


def curve(steps: int, **settings) -> list[float]:
    return [factor(LearningRate(**settings), step, steps) for step in range(steps)]


def test_warmup_rises_in_even_steps_to_the_full_rate() -> None:
    values = curve(10, warmup=4, decay="constant")
    assert values == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1, 1])
    assert curve(10, warmup=0.4, decay="constant") == values, "below one it is a share of the stage"


@pytest.mark.parametrize(
    ("decay", "formula"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("sqrt", lambda x: math.sqrt(1 - x)),
        ("1-sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_decays_are_their_formulas(decay: str, formula) -> None:
    expected = [0.1 + 0.9 * formula(step / 20) for step in range(20)]
    assert curve(20, decay=decay, to=0.1) == pytest.approx(expected)


def test_a_decay_that_would_begin_in_the_warmup_begins_after_it() -> None:
    values = curve(10, warmup=6, decay="linear", decay_share=0.8)
    assert values == pytest.approx([*(step / 7 for step in range(1, 7)), 1, 0.75, 0.5, 0.25])


def test_a_warmup_in_tokens_is_counted_in_steps_of_the_batch() -> None:
    for written in ("tokens=1M", "1M tokens"):
        rate = in_steps(LearningRate(warmup=written), 16_384)
        assert warmup_steps(rate, 1000) == 61
    with pytest.raises(TriviumError, match="needs `batch`"):
        in_steps(LearningRate(warmup="tokens=1M"), None)
    with pytest.raises(TriviumError, match="a number such as"):
        in_steps(LearningRate(warmup="tokens=many"), 16_384)


def test_wsd_is_stable_and_then_decays_over_the_last_fifth() -> None:
    values = curve(100, warmup=10, decay="wsd")
    assert values[10:80] == [1.0] * 70
    assert values[80:] == pytest.approx([1 - step / 20 for step in range(20)])
    assert curve(100, decay="wsd", decay_share=0.5)[:51] == [1.0] * 51


def test_inverse_square_root_halves_when_the_steps_quadruple() -> None:
    values = curve(500, warmup=50, decay="inverse-sqrt")
    assert values[400] == pytest.approx(values[100] / 2)


@pytest.mark.parametrize("to", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_inverse_square_root_is_its_formula_and_never_below_the_floor(warmup: int, to: float) -> None:
    values = curve(300, warmup=warmup, decay="inverse-sqrt", to=to)
    first = max(warmup, 1)
    expected = [max(to, min(1.0, math.sqrt(first / max(step, 1)))) for step in range(warmup, 300)]
    assert values[warmup:] == pytest.approx(expected)
    assert min(values[warmup:]) == pytest.approx(max(to, math.sqrt(first / 299)))


def test_a_bare_number_and_the_word_parent_are_rates() -> None:
    assert LearningRate.model_validate(3e-3).start == 3e-3
    assert LearningRate.model_validate("parent").start == "parent"
    assert LearningRate.model_validate({"from": "parent", "decay": "linear", "to": 0}).to == 0
