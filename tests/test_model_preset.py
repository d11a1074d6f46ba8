"""The preset, the arithmetic it implies, and new weights."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.flops import flops_per_token, parameter_count, visible_keys
from trivium.model.initialise import new_model
from trivium.model.preset import preset

SHAPES = {
    "plain": ModelConfig(97, 64, 3, 4, 160, 64, query_key_norm="head"),
    "shared-heads": ModelConfig(61, 48, 2, 6, 96, 64, key_value_heads=2, head_width=16, tied=True),
    "experts": ModelConfig(50, 32, 2, 4, 48, 64, experts=ExpertsConfig(6, 2, 40, layers=(True, False))),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_flops_agree_with_torch(name, training):
    config, length = SHAPES[name], 48
    model = new_model(config)
    tokens = torch.randint(0, config.vocabulary, (2 * length,))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        logits = model.logits(model(tokens, Documents([length, length])))
        if training:
            logits.sum().backward()
    expected = counter.get_total_flops() / len(tokens)
    assert flops_per_token(config, length, training, causal=False) == pytest.approx(expected, rel=0.01)


def test_causal_attention_counts_what_a_token_sees():
    for length, window in [(7, None), (7, 3), (5, 9), (1, 1)]:
        seen = [min(place + 1, window or length) for place in range(length)]
        assert visible_keys(length, window, True) == pytest.approx(sum(seen) / length)


def test_one_dial_sets_everything_and_everything_can_be_overridden():
    small, large = preset(4, 4096, 256), preset(12, 4096, 256)
    assert (small.config.layers, small.config.width, small.config.heads) == (4, 256, 4)
    assert large.values["parameters"] > small.values["parameters"] == parameter_count(small.config)
    assert large.values["batch_tokens"] > small.values["batch_tokens"]
    assert large.values["token_budget"] > small.values["token_budget"]
    assert set(small.learning_rates) == {"matrices", "embeddings", "head", "scalars"}
    for name, value in small.values.items():
        if name in ("parameters", "tied"):
            continue
        changed = value // 2 if name == "key_value_heads" else value * 2
        other = preset(4, **({"vocabulary": 4096, "context": 256} | {name: changed}))
        assert other.values[name] == changed
    assert preset(4, 4096, tied=True).config.tied
    assert preset(4, 4096, width=None).config.width == 256


@pytest.mark.parametrize(
    ("depth", "head_width", "heads", "shared"),
    [(1, 32, 2, 2), (2, 64, 2, 2), (23, 64, 23, 23), (24, 128, 12, 12), (32, 128, 16, 4), (40, 128, 20, 5),
     (34, 128, 17, 17)],
)  # fmt: skip
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_what_follows_from_a_depth_is_its_formula(
    depth: int, head_width: int, heads: int, shared: int, family: str
) -> None:
    """64 wide per layer; keys shared by four from 16 heads on; 20 tokens per parameter; rates by width."""
    found, width = preset(depth, 4096, 256, family=family), 64 * depth
    config, inner = found.config, (4 if family == "gpt2" else 3) * width
    assert (config.layers, config.width, config.inner_width) == (depth, width, inner)
    assert (config.head_width, config.heads, config.key_value_heads) == (head_width, heads, shared)
    matrices = depth * (
        2 * width * heads * head_width + 2 * width * shared * head_width
        + (2 if family == "gpt2" else 3) * width * inner
    ) + 4096 * width  # fmt: skip
    assert found.token_budget == 20 * matrices
    exponent = round(math.log2(2 * math.sqrt(20 * matrices)))
    assert found.batch_tokens == 2 ** min(max(exponent, 11), 22)
    narrow = math.sqrt(768 / width)
    embeddings = 0.02 if family == "gpt2" else 0.05
    rates = {"matrices": 0.03, "embeddings": embeddings * narrow, "head": 0.004 * narrow, "scalars": 0.01}
    assert found.learning_rates == pytest.approx(rates, abs=1e-6)


def test_a_batch_holds_at_least_one_context():
    assert preset(1, 256, 8192).batch_tokens == 8192


def test_a_value_the_dial_does_not_set_is_named():
    with pytest.raises(TriviumError, match="inner_width"):
        preset(4, 4096, innerwidth=3)


def test_new_models_start_at_even_odds_and_depend_on_the_seed_alone():
    chosen = preset(3, 300, 64)
    before = torch.get_rng_state()
    model = new_model(chosen.config, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    tokens = torch.randint(0, 300, (64,))
    logits = model.logits(model(tokens, Documents([64])))
    rows = model.embedding(tokens)
    torch.testing.assert_close(model(tokens, Documents([64])), model.norm(rows), msg="layers start silent")
    loss = torch.nn.functional.cross_entropy(logits, torch.randint(0, 300, (64,)))
    assert loss.item() == pytest.approx(math.log(300), abs=0.02)
    same, other = new_model(chosen.config, seed=3), new_model(chosen.config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True))
    assert not torch.equal(model.embedding.weight, other.embedding.weight)


def test_every_weight_of_a_new_model_learns():
    model = new_model(ModelConfig(50, 32, 2, 4, 48, 64, query_key_norm="head"))
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = torch.randint(0, 50, (40,))
    for _ in range(2):
        optimiser.zero_grad()
        model.logits(model(tokens, Documents([40]))).log_softmax(-1)[:, 7].mean().neg().backward()
        optimiser.step()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_whole(name):
    assert all(parameter.isfinite().all() for parameter in new_model(SHAPES[name]).parameters())
