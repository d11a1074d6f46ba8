"""Shrinking takes away what matters least: silent layers and units go first, and nothing changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_growth import FAMILIES, model_of

import trivium
from trivium.kit.errors import TriviumError
from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.growth import GrowthSettings, grown_model, largest_difference, probe
from trivium.model.initialise import build
from trivium.model.shrink import importance, kept_layers, narrowed, narrowed_config, without_layers
from trivium.model.transformer import Transformer

TEXTS = probe(50, 64)[1:]


def built(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Transformer:
    model = build(config)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_silent_layers_have_no_influence_and_go_first(family: str) -> None:
    small = model_of(family)
    large, _ = grown_model(small, GrowthSettings(layers=5), seed=0)
    scores = importance(large, TEXTS)
    assert scores.layers[[2, 4]].max() < 1e-6
    kept = kept_layers(large.config, 3, scores)
    again = built(*without_layers(large.config, large.state_dict(), kept))
    assert largest_difference(small, again, probe(50, 64)) == 0


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_silent_units_go_first(family: str, tied: bool) -> None:
    small = model_of(family, tied=tied)
    wide, _ = grown_model(small, GrowthSettings(width=96, inner_width=160, width_method="pad"), seed=0)
    after = narrowed_config(wide.config, width=64, key_value_heads=2, inner_width=96)
    scores = importance(wide, TEXTS)
    # New heads speak, though the output does not listen yet: those that were there are named by hand.
    heads = tuple(torch.tensor([1.0, 1.0, 0.0]) for _ in scores.heads)
    inner = tuple(torch.arange(160).lt(96).float() for _ in scores.inner)
    scores = type(scores)(scores.layers, inner, heads, scores.stream)
    again = built(*narrowed(wide.config, wide.state_dict(), scores, after))
    assert largest_difference(small, again, probe(50, 64)) < 1e-3


def test_the_scale_of_a_norm_makes_up_for_the_energy_that_goes() -> None:
    model = model_of("llama")
    scores = replace(importance(model, TEXTS), stream=torch.arange(64.0))
    after = narrowed_config(model.config, width=48)
    _, weights = narrowed(model.config, model.state_dict(), scores, after)
    kept = sum(range(16, 64)) / sum(range(64))
    for name in ("norm.weight", "layers.1.mlp_norm.weight"):
        wanted = model.get_parameter(name).detach()[16:] * (kept * 64 / 48) ** 0.5
        torch.testing.assert_close(weights[name], wanted)


def test_a_scale_that_is_no_root_of_the_width_stays() -> None:
    granite = model_of("llama").config.changed(family="granite", embedding_scale=12.0, attention_scale=0.25)
    assert narrowed_config(granite, width=48).embedding_scale == 12.0


def test_layers_without_experts_are_dropped_with_their_place_among_those_with() -> None:
    experts = ExpertsConfig(4, 2, 16, layers=(True, False, True))
    config = model_of("qwen3").config.changed(family="qwen3_moe", experts=experts)
    after, weights = without_layers(config, build(config).state_dict(), [1, 2])
    assert [after.is_mixture(layer) for layer in range(2)] == [False, True]
    built(after, weights)


def test_what_is_active_is_important() -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.get_parameter("layers.1.mlp.up.weight")[5:9] = 0
        model.get_parameter("layers.0.attention.value.weight")[:16] = 0
    scores = importance(model, TEXTS)
    assert sorted(scores.inner[1].topk(4, largest=False).indices.tolist()) == [5, 6, 7, 8]
    assert scores.heads[0].argmin() == 0
    assert float(scores.stream.sum()) == pytest.approx(1.0, rel=1e-4)


def test_even_layers_are_spread_with_both_ends() -> None:
    config = model_of("llama").config.changed(layers=10)
    assert kept_layers(config, 4) == [0, 3, 6, 9]
    assert kept_layers(config, 1) == [0]
    with pytest.raises(TriviumError, match="not 11"):
        kept_layers(config, 11)


def test_what_cannot_be_narrowed_is_refused() -> None:
    with pytest.raises(TriviumError, match="all heads together"):
        narrowed_config(model_of("olmo2").config, key_value_heads=1)
    with pytest.raises(TriviumError, match="`width` is 64"):
        narrowed_config(model_of("llama").config, width=80)


RECIPE = """\
name: shrunk
stages:
  words: {kind: tokenizer, data: ./texts.jsonl, vocabulary: 272}
  corpus: {kind: corpus, data: ./texts.jsonl, tokenizer: words, validation: 0.2}
  large: {kind: pretrain, data: corpus, context: 32, batch: 128, steps: 4,
          model: {depth: 4, width: 64, heads: 4, key_value_heads: 2, head_width: 16}}
  half: {kind: shrink, from: large, layers: 2}
  slim: {kind: shrink, from: large, layers: 3, layers_by: influence, width: 48, key_value_heads: 1,
         inner_width: 100, data: corpus, context: 32}
  on: {kind: midtrain, from: slim, data: corpus, batch: 128, steps: 2}
"""


def test_the_stage_writes_a_smaller_model_that_trains_on(tmp_path: Path) -> None:
    sums = [f"{one} and {other} make {one + other}." for one in range(12) for other in range(9)]
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sums))
    (tmp_path / "shrunk.yaml").write_text(RECIPE)
    run: Any = trivium.run(tmp_path / "shrunk.yaml", runs=tmp_path / "runs")
    models = {
        name: transformers.AutoModelForCausalLM.from_pretrained(run[name].folder / "model")
        for name in ("large", "half", "slim", "on")
    }
    assert run["half"].summary["kept_layers"] == [0, 3]
    stored = [dict(models[name].named_parameters()) for name in ("large", "half")]
    for part in ("self_attn.q_proj.weight", "mlp.down_proj.weight"):
        assert torch.equal(stored[1][f"model.layers.1.{part}"], stored[0][f"model.layers.3.{part}"])
    slim = models["slim"].config
    assert (slim.num_hidden_layers, slim.hidden_size, slim.num_key_value_heads) == (3, 48, 1)
    assert (slim.num_attention_heads, slim.intermediate_size) == (2, 100)
    assert run["slim"].summary["parameters"] == models["slim"].num_parameters()
    with pytest.raises(TriviumError, match="name some as `data`"):
        trivium.run(tmp_path / "shrunk.yaml", runs=tmp_path / "runs", set={"stages.slim.data": None})
