"""Growing keeps the function where it promises to, moves the optimiser's state rightly, and adds capacity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.deepen import blocks_for
from trivium.model.growth import GrowthSettings, become, grow, grown_model, largest_difference, probe
from trivium.model.initialise import new_model
from trivium.model.masks import set_mask, unmasked
from trivium.model.rank import has_risen, ranks
from trivium.model.transformer import Transformer

LAYER_NORM = {
    "norm": "layer", "norm_epsilon": 1e-5, "activation": "gelu_tanh", "gated": False,
    "query_key_value_bias": True,
    "attention_output_bias": True, "inner_bias": True, "positions": "learned",
}  # fmt: skip
GEMMA = {
    "norm_plus_one": True, "norm_after": True, "activation": "gelu_tanh", "query_key_norm": "head",
    "embedding_scale": 8.0, "attention_scale": 0.25, "windows": (16, None, 16),
    "local_rope": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"query_key_norm": "head"},
    "gpt2": LAYER_NORM,
    "gemma3_text": GEMMA,
    "olmo2": {"query_key_norm": "full", "norm_before": False, "norm_after": True},
}
WISHES: dict[str, dict[str, Any]] = {
    "identity": {"layers": 5},
    "identity at the end": {"layers": 4, "place": "end"},
    "twice as wide": {"width": 128},
    "padded": {"width": 96, "inner_width": 160},
    "two copies and a rest": {"width": 160, "width_method": "tile"},
    "inner": {"inner_width": 200},
    "wider and deeper": {"width": 128, "layers": 6},
}


def model_of(family: str, *, tied: bool = False, shared: bool = True, seed: int = 0) -> Transformer:
    """A small model whose every weight is off its start, norms and silent outputs included."""
    config = ModelConfig(
        family=family, vocabulary=50, width=64, layers=3, heads=4, inner_width=96, context=64, tied=tied,
        key_value_heads=2 if shared and family != "gpt2" else 4, **FAMILIES[family],
    )  # fmt: skip
    model = new_model(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.quick_cases(35)
@pytest.mark.parametrize("shared", [True, False], ids=["grouped", "all heads"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wish", WISHES)
def test_growing_keeps_the_logits(family: str, wish: str, tied: bool, shared: bool) -> None:
    model = model_of(family, tied=tied, shared=shared)
    larger, _ = grown_model(model, GrowthSettings(**WISHES[wish]), seed=3)
    parameters = [sum(one.numel() for one in part.parameters()) for part in (model, larger)]
    assert parameters[1] > parameters[0]
    assert largest_difference(model, larger, probe(50, 64)) < 1e-4


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_experts_that_agree_keep_the_logits(family: str) -> None:
    model = model_of(family)
    larger, found = grown_model(model, GrowthSettings(experts={"count": 4, "per_token": 2}), seed=1)
    assert found.config.experts is not None
    assert largest_difference(model, larger, probe(50, 64)) < 1e-4
    moments = found.moments({f"first.{name}": one for name, one in model.state_dict().items()})
    assert {name.removeprefix("first.") for name in moments} <= larger.state_dict().keys()
    noisy, _ = grown_model(model, GrowthSettings(experts={"count": 4, "noise": 0.3}), seed=1)
    assert largest_difference(model, noisy, probe(50, 64)) > 1e-3


@pytest.mark.parametrize("method", ["stack", "interpolate", "overlap", "random"])
def test_other_ways_of_deepening_change_the_function(method: Any) -> None:
    model = model_of("llama")
    wish = GrowthSettings(layers=4, method=method)
    larger, _ = grown_model(model, wish, seed=0)
    assert not wish.keeps_function
    assert larger.config.layers == 4
    assert largest_difference(model, larger, probe(50, 64)) > 1e-2


def test_which_layers_become_which() -> None:
    def sources(*wish: Any) -> list[int]:
        return [block.source for block in blocks_for(*wish)]

    assert sources(4, 6, "identity") == [0, 1, 1, 2, 3, 3]
    assert sources(4, 6, "identity", "end") == [0, 1, 2, 3, 3, 3]
    assert sources(4, 6, "identity", "between") == [0, 1, 1, 1, 2, 3]
    assert sources(3, 6, "stack") == [0, 1, 2, 0, 1, 2]
    assert sources(4, 6, "overlap") == [0, 1, 2, 1, 2, 3]
    halves = blocks_for(3, 5, "interpolate")
    assert [block.source + block.following for block in halves] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert [block.kept for block in halves] == [True, False, True, False, True]
    with pytest.raises(TriviumError, match="such as 8"):
        blocks_for(4, 7, "overlap")


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """The gradient of the next-token loss in every weight."""
    loss = torch.nn.functional.cross_entropy(
        model.logits(model(tokens[:-1], Documents([len(tokens) - 1]))), tokens[1:]
    )
    loss.backward()
    return {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.quick_cases(8)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wish", ["twice as wide", "padded", "two copies and a rest", "inner", "identity"])
def test_moments_scale_as_the_gradients_do(family: str, wish: str) -> None:
    """What the first moment would hold of the larger model's own gradient, and its square for the second."""
    model = model_of(family)
    tokens = torch.tensor(probe(50, 64)[-1])
    settings = GrowthSettings(**WISHES[wish], noise=0.0)
    larger, found = grown_model(model, settings, seed=0)
    old, new = gradients(model, tokens), gradients(larger, tokens)
    state = {f"first.{name}": one for name, one in old.items()}
    state |= {f"second.{name}": one**2 for name, one in old.items()}
    moved = found.moments(state)
    if family == "gpt2" and wish in ("padded", "two copies and a rest"):
        assert moved == {}
        return
    assert len(moved) > 20
    compared = 0
    for name, moment in moved.items():
        kind, _, weight = name.partition(".")
        truth = new[weight] if kind == "first" else new[weight] ** 2
        # Where a unit is new the state begins at zero, whatever its gradient will be.
        same = moment != 0
        compared += int(same.sum())
        torch.testing.assert_close(moment[same], truth[same], rtol=2e-3, atol=1e-7)
    assert compared > 10_000


def trained(model: Transformer, steps: int) -> None:
    """Some steps of AdamW on random tokens, which want all the capacity there is."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        tokens = torch.randint(50, (256,), generator=generator)
        loss = torch.nn.functional.cross_entropy(
            model.logits(model(tokens, Documents([64] * 4))), tokens.roll(-1)
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("wish", "rises"),
    [
        (GrowthSettings(layers=5), True),
        (GrowthSettings(width=128), True),
        # The control: copies without noise have equal gradients, and stay copies.
        (GrowthSettings(width=128, noise=0), False),
    ],
)
def test_the_rank_of_new_weights_rises_unless_copies_stay_copies(wish: GrowthSettings, rises: bool) -> None:
    larger, grown = grown_model(model_of("llama"), wish, seed=0)
    before = ranks(larger.state_dict(), grown.new_layers)
    trained(larger, 50)
    after = ranks(larger.state_dict(), grown.new_layers)
    assert has_risen(before, after) is rises, (before, after)
    if wish.noise == 0:
        assert after["rank"] == pytest.approx(before["rank"], abs=0.01)
        assert after["rank"] < 0.7


@pytest.mark.slow
def test_new_blocks_learn_from_the_first_step_on() -> None:
    model = model_of("llama")
    larger, found = grown_model(model, GrowthSettings(layers=5), seed=0)
    assert found.new_layers == (2, 4)
    before = {name: one.detach().clone() for name, one in larger.named_parameters()}
    trained(larger, 1)
    first = {name for name, one in larger.named_parameters() if not torch.equal(one, before[name])}
    assert {"layers.2.attention.output.weight", "layers.4.mlp.down.weight"} <= first
    trained(larger, 50)
    for layer in found.new_layers:
        down = larger.get_parameter(f"layers.{layer}.mlp.down.weight")
        assert int(torch.linalg.matrix_rank(down.detach(), rtol=1e-3)) == min(down.shape)


def test_a_model_becomes_the_larger_one_in_place() -> None:
    model = model_of("qwen3")
    weights = {name: one.detach().clone() for name, one in model.state_dict().items()}
    found = grow(model.config, weights, GrowthSettings(layers=6, width=128), seed=0)
    before = model_of("qwen3")
    become(model, found.config, found.weights)
    assert (model.config.layers, model.config.width, len(model.layers)) == (6, 128, 6)
    assert largest_difference(before, model, probe(50, 64)) < 1e-4


def test_what_cannot_grow_is_refused() -> None:
    model = model_of("olmo2")
    with pytest.raises(TriviumError, match="all heads together"):
        grown_model(model, GrowthSettings(heads=6, key_value_heads=3), seed=0)
    with pytest.raises(TriviumError, match="3 layers already"):
        grown_model(model, GrowthSettings(layers=2), seed=0)
    with pytest.raises(TriviumError, match="No family writes a olmo2 model with experts"):
        grown_model(model, GrowthSettings(experts={"count": 2}), seed=0)
    with pytest.raises(ValueError, match="nothing grows"):
        GrowthSettings()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_masked_layer_is_the_same_model_without_a_mask_in_other_weights(family: str) -> None:
    model = model_of(family)
    set_mask(model, [1], 0.4)
    plain = new_model(model.config, seed=0)
    plain.load_state_dict({**model.state_dict(), **unmasked(model)})
    texts = probe(50, 64)
    assert largest_difference(model, plain, texts) < 1e-5
    set_mask(model, [1], 1.0)
    assert not unmasked(model)
    assert largest_difference(model, plain, texts) > 1e-3
