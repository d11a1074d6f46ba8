"""Longer contexts: each method puts positions where its paper puts them, and says what it changed."""

import math

import pytest
import torch

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.context_extension import METHODS, extend_context, interpolated_table, longrope_factors
from trivium.model.transformer import Transformer

LENGTH, LONGER = 64, 256


def small_model(**changes) -> Transformer:
    torch.manual_seed(0)
    settings = {"vocabulary": 50, "width": 32, "layers": 4, "heads": 2, "inner_width": 48, "context": LENGTH}
    model = Transformer(ModelConfig(**{**settings, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def angles(model: Transformer, positions: list[float], length: int = LONGER) -> torch.Tensor:
    return model.rotary.angles(torch.tensor(positions), length)


def test_interpolation_puts_every_position_where_the_formula_puts_it() -> None:
    model = small_model()
    before = angles(model, [0.0, 1.0, LENGTH - 1.0, LENGTH / 2])
    extend_context(model, LONGER, "interpolate")
    after = angles(model, [0.0, 4.0, 4 * (LENGTH - 1.0), 4 * LENGTH / 2])
    torch.testing.assert_close(after, before)


def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all() -> None:
    model = small_model()
    before = angles(model, [1.0])[0]
    extend_context(model, LONGER, "ntk")
    after = angles(model, [1.0])[0]
    assert float(after[0]) == pytest.approx(float(before[0]))
    assert float(after[-1]) == pytest.approx(float(before[-1]) / 4, rel=1e-5)


def test_the_ntk_base_is_the_published_one() -> None:
    """The base for a head of 128 and factors 4 and 8: 40,889.94 and 82,684.62."""
    for factor, base in [(4, 40889.94), (8, 82684.62)]:
        model = small_model(width=256, heads=2, head_width=128, context=64)
        extend_context(model, 64 * factor, "ntk")
        assert model.config.rope["rope_theta"] == pytest.approx(base, abs=0.01)


def test_yarn_blends_along_the_ramp_of_pair_indices() -> None:
    """Recomputed here from the definition: untouched below the ramp, divided by the factor above it."""
    model = small_model(width=128, heads=2, head_width=64, context=2048)
    plain = angles(model, [1.0])[0].double()
    extend_context(model, 4 * 2048, "yarn", beta_fast=32.0, beta_slow=1.0)
    stretched = angles(model, [1.0], 4 * 2048)[0].double()

    def pair(turns: float) -> float:
        return 64 * math.log(2048 / (2 * math.pi * turns)) / (2 * math.log(10000))

    low, high = math.floor(pair(32)), math.ceil(pair(1))
    for index in range(32):
        share = min(1.0, max(0.0, (index - low) / (high - low)))
        expected = plain[index] * ((1 - share) + share / 4)
        assert float(stretched[index]) == pytest.approx(float(expected), rel=1e-5)
    assert float(stretched[0]) == pytest.approx(float(plain[0])), "the fastest pair must stay as it was"
    assert float(stretched[-1]) == pytest.approx(float(plain[-1]) / 4, rel=1e-5)
    assert model.rotary.factor == pytest.approx(0.1 * math.log(4) + 1)


def test_dynamic_scaling_leaves_short_text_alone_and_matches_its_formula_beyond() -> None:
    model = small_model()
    short = angles(model, [3.0], LENGTH)
    extend_context(model, LONGER, "dynamic")
    torch.testing.assert_close(angles(model, [3.0], LENGTH), short)
    base = 10000 * (4 * LONGER / LENGTH - 3) ** (16 / 14)
    exponents = torch.arange(0, 16, 2).double() / 16
    torch.testing.assert_close(
        angles(model, [1.0], LONGER)[0].double(), 1 / base**exponents, rtol=1e-5, atol=0
    )


def test_a_learned_table_is_interpolated_between_its_ends() -> None:
    table = torch.randn(LENGTH, 8)
    longer = interpolated_table(table, LONGER)
    torch.testing.assert_close(longer[0], table[0])
    torch.testing.assert_close(longer[-1], table[-1])
    place = 100 * (LENGTH - 1) / (LONGER - 1)
    share = place - int(place)
    torch.testing.assert_close(longer[100], (1 - share) * table[int(place)] + share * table[int(place) + 1])


def test_an_extrapolated_table_keeps_the_trained_rows() -> None:
    model = small_model(positions="learned", family="gpt2")
    old = model.position_embedding.weight.detach().clone()
    extend_context(model, LONGER, "extrapolate")
    table = model.position_embedding.weight
    assert table.shape[0] == LONGER
    torch.testing.assert_close(table[:LENGTH], old)
    assert float(table[LENGTH:].detach().std()) == pytest.approx(float(old.std()), rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_reads_a_text_of_the_new_length(method: str) -> None:
    model = small_model(family="llama")
    options = {"base": 500000.0} if method == "base" else {"every": 4} if method == "nope" else {}
    before, after = extend_context(model, LONGER, method, **options)
    hidden = model(torch.arange(LONGER) % 50, Documents([LONGER]))
    assert torch.isfinite(hidden).all()
    assert method == "extrapolate" or before.rsplit(",", 1)[0] != after.rsplit(",", 1)[0]


@pytest.mark.parametrize("method", ["yarn", "longrope"])
def test_short_trained_lengths_leave_some_pairs_alone(method: str) -> None:
    """With the usual 32 turns no pair of a 64-token model would be left as it was."""
    factors = longrope_factors(32, 10000.0, LENGTH, 4.0)
    assert factors[0] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(4.0)
    assert factors == sorted(factors)
    model = small_model(width=64, heads=2)
    plain = angles(model, [1.0])[0]
    extend_context(model, LONGER, method)
    assert float(angles(model, [1.0])[0][0]) == pytest.approx(float(plain[0]), rel=1e-4)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(TriviumError, match="learned a table of positions"):
        extend_context(small_model(positions="learned"), LONGER, "yarn")
    with pytest.raises(TriviumError, match="no way to write layers without positions"):
        extend_context(small_model(), LONGER, "nope")
    with pytest.raises(TriviumError, match="needs the new base frequency"):
        extend_context(small_model(), LONGER, "base")
    with pytest.raises(TriviumError, match="there is no method 'alibi'"):
        extend_context(small_model(), LONGER, "alibi")


@pytest.mark.parametrize(("method", "options"), [("base", {"base": 5e5}), ("nope", {"every": 2})])
def test_training_on_shorter_texts_takes_no_reach_away(method: str, options: dict[str, float]) -> None:
    model = small_model(family="llama")
    reach = model.config.reach
    extend_context(model, reach // 2, method, **options)
    assert model.config.reach == reach


def test_a_ramp_of_yarn_that_runs_backwards_is_refused() -> None:
    with pytest.raises(TriviumError, match="`beta_slow` 40 has to lie below `beta_fast`"):
        extend_context(small_model(), LONGER, "yarn", beta_slow=40.0)
