"""Every way to stretch rotary positions, against figures from the papers and transformers' own functions."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trivium.kit.errors import TriviumError
from trivium.model.positions import (
    Rotary,
    attention_factor,
    checked_rope,
    inverse_frequencies,
    ntk_base,
    yarn_range,
)

HEAD = 128
FACTORS = [1.0 + i / 20 for i in range(HEAD // 2)]
ROPES = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 3.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn-factor": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096,
                    "attention_factor": 1.1, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
                    "mscale": 0.7, "mscale_all_dim": 1.0},
    # Where the ramp would end beyond the last dimension (a small base, a long context), it ends there.
    "yarn-long": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1 << 18,
                  "beta_fast": 4000},
    "longrope": {"short_factor": FACTORS, "long_factor": [2 * f for f in FACTORS],
                 "original_max_position_embeddings": 4096},
    # A factor of one, or less, changes no scores.
    "longrope-one": {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS, "factor": 1.0,
                     "original_max_position_embeddings": 4096},
    "yarn-one": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192},
}  # fmt: skip


@pytest.mark.parametrize("base", [100.0, 10000.0, 500000.0])
@pytest.mark.parametrize("length", [100, 4097, 100_000])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers(name, length, base):
    rope = {"rope_type": name, "rope_theta": base, **ROPES[name]}
    config = LlamaConfig(
        hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=32768, rope_parameters=dict(rope)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=length)
    checked = checked_rope(rope, 32768, HEAD, "test")
    found = inverse_frequencies(checked, HEAD, 32768, length)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert attention_factor(checked, 32768) == pytest.approx(factor, abs=1e-12)


def test_published_constants():
    assert ntk_base(10000.0, 4, 128) == pytest.approx(40889.94, abs=0.01)
    assert ntk_base(10000.0, 8, 128) == pytest.approx(82684.62, abs=0.01)
    for base, original, expected in [(1e4, 4096, (20, 46)), (1e4, 2048, (16, 41)), (5e5, 8192, (18, 35))]:
        assert yarn_range({"rope_theta": base, "original_max_position_embeddings": original}, 128) == expected
    # A toy of head width 16 trained on 128 tokens: the ramp's low end is clamped to the first pair.
    toy = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": 1e4}, 16, 1024, 1)
    untouched = (inverse_frequencies(toy, 16, 1024, 1) / plain - 1 / 8) / (1 - 1 / 8)
    expected = torch.tensor([1, 2 / 3, 1 / 3, 0, 0, 0, 0, 0])
    torch.testing.assert_close(untouched, expected, atol=1e-6, rtol=1e-5)
    yarn = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}
    assert attention_factor(yarn, 4096) ** 2 == pytest.approx(1.459, abs=1e-3)
    assert attention_factor(yarn | {"factor": 16.0}, 4096) == pytest.approx(1.277, abs=1e-3)
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    assert attention_factor(longrope, 131072) == pytest.approx(1.190, abs=1e-3)


def test_llama3_keeps_blends_and_divides():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **ROPES["llama3"]}
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": 5e5}, 128, 8192, 1)
    ratio = inverse_frequencies(rope, 128, 8192, 1) / plain
    kept, divided = (ratio > 0.9999).sum().item(), (ratio < 1 / 7.999).sum().item()
    assert (kept, 64 - kept - divided, divided) == (29, 6, 29)


def test_ntk_divides_the_slowest_pair_and_keeps_the_fastest():
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": 1e4}, 128, 4096, 1)
    changed = inverse_frequencies({"rope_type": "default", "rope_theta": ntk_base(1e4, 4, 128)}, 128, 4096, 1)
    assert (plain / changed)[0] == pytest.approx(1.0)
    assert (plain / changed)[-1] == pytest.approx(4.0, rel=1e-5)


def test_dynamic_starts_at_the_plain_base():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    plain = inverse_frequencies({"rope_type": "default", "rope_theta": 1e4}, 64, 100, 1)
    assert torch.equal(inverse_frequencies(rope, 64, 100, 100), plain)
    assert inverse_frequencies(rope, 64, 100, 101)[-1] < plain[-1]


def test_each_token_turns_by_its_own_documents_length():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    rotary = Rotary(rope, 16, 10)
    positions = torch.tensor([3, 7, 3, 7])
    cosine, sine = rotary(positions, torch.tensor([8, 8, 40, 40]), torch.float32)
    for rows, length in [(slice(0, 2), 8), (slice(2, 4), 40)]:
        alone = rotary(positions[rows], length, torch.float32)
        assert torch.equal(cosine[rows], alone[0])
        assert torch.equal(sine[rows], alone[1])
    assert not torch.equal(cosine[:2], cosine[2:])


def test_longrope_changes_lists_just_beyond_its_length():
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 1.0,
            "rope_theta": 1e4, "original_max_position_embeddings": 32}  # fmt: skip
    rotary = Rotary(rope, 16, 64)
    position = torch.tensor([1])
    below, above = rotary.angles(position, 32), rotary.angles(position, 33)
    torch.testing.assert_close(below / above, torch.full((1, 8), 2.0))


def test_the_attention_factor_scales_cosine_and_sine():
    rotary = Rotary({"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0}, 16, 64)
    cosine, sine = rotary(torch.arange(5), 5, torch.float32)
    length = (cosine.square() + sine.square()).sqrt()
    torch.testing.assert_close(length, torch.full_like(length, 0.1 * math.log(8) + 1))


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"rope_type": "axial"}, "axial"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 7}, "long_factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_cannot_be_is_named(rope, named):
    with pytest.raises(TriviumError, match=f"here: .*{named}"):
        checked_rope(rope, 64, 16, "here")
