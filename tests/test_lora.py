"""Adapters against PEFT: forward, merge, folders both ways; several on one model; nothing else moves."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from small import VOCABULARY, assert_identical, small_model, weights_of

from trivium.kit.errors import TriviumError
from trivium.model.adapters import load_adapter, save_adapter
from trivium.model.attention import Documents
from trivium.model.folder import load_model, save_model
from trivium.model.lora import (
    AdapterSettings,
    adapted_layers,
    add_adapter,
    bake,
    merge,
    merged,
    selected,
    unmerge,
)
from trivium.model.transformer import Transformer

TOKENS = torch.arange(1, 13)
GPT2 = {
    "family": "gpt2", "norm": "layer", "norm_epsilon": 1e-5, "activation": "gelu_tanh", "gated": False,
    "query_key_norm": "none", "query_key_value_bias": True, "attention_output_bias": True, "inner_bias": True,
    "tied": True, "positions": "learned",
}  # fmt: skip


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, Documents([5, 7])))


def theirs(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=part[None]).logits[0] for part in TOKENS.split([5, 7])])


def shaken(model: Transformer, seed: int = 5) -> None:
    """Give every trainable weight another value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def saved_base(folder: Path, **changes: object) -> Path:
    save_model(small_model(**changes), folder / "base")
    return folder / "base"


@pytest.mark.parametrize("family", [{}, GPT2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_peft_opens_what_we_save(tmp_path: Path, kind: str, family: dict) -> None:
    base = saved_base(tmp_path, **family)
    model = load_model(base)
    before = logits(model)
    add_adapter(model, AdapterSettings(kind=kind, rank=4, ranks={"mlp.*": 6}, alphas={"down": 9.0}))
    assert torch.allclose(logits(model), before, atol=1e-5)
    shaken(model)
    ours = logits(model)
    assert (ours - before).abs().max() > 1e-2
    save_adapter(model, tmp_path / "adapter", base=str(base))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    opened = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    assert torch.allclose(theirs(opened.eval()), ours, atol=1e-5)
    assert torch.allclose(theirs(opened.merge_and_unload()), ours, atol=1e-5)
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    assert torch.allclose(logits(again), ours, atol=1e-5)
    save_model_merged(model, tmp_path / "merged")
    whole = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(theirs(whole), ours, atol=1e-5)


def save_model_merged(model: Transformer, folder: Path) -> None:
    with merged(model):
        save_model(model, folder)


@pytest.mark.parametrize("family", [{}, GPT2], ids=["qwen3", "gpt2"])
@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"]
)
def test_we_open_what_peft_saves(tmp_path: Path, options: dict, family: dict) -> None:
    base = saved_base(tmp_path, **family)
    targets = ["c_attn", "c_fc"] if family else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM",
        rank_pattern={"c_fc": 2, "down_proj": 2}, alpha_pattern={"v_proj": 5}, **options,
    )  # fmt: skip
    torch.manual_seed(3)
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config).eval()
    model.save_pretrained(str(tmp_path / "adapter"))
    ours = load_model(base)
    before = logits(ours)
    load_adapter(ours, tmp_path / "adapter")
    assert (logits(ours) - before).abs().max() > 1e-2
    assert torch.allclose(logits(ours), theirs(model), atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_every_layers_factor_is_pefts(kind: str, tmp_path: Path) -> None:
    """Alpha over the rank of the layer itself, where patterns give layers other ranks and alphas."""
    model = small_model()
    settings = AdapterSettings(
        kind=kind, rank=4, alpha=10.0, ranks={"mlp.*": 6, "down": 2}, alphas={"value": 5.0, "up": 9.0}
    )
    ours = {name: layer.shapes["default"].scale for name, layer in add_adapter(model, settings).items()}
    config = peft.LoraConfig(
        r=4, lora_alpha=10, target_modules="all-linear", use_rslora=kind == "rslora",
        rank_pattern={"down_proj": 2, "gate_proj": 6, "up_proj": 6},
        alpha_pattern={"v_proj": 5, "up_proj": 9},
    )  # fmt: skip
    base = transformers.AutoModelForCausalLM.from_pretrained(saved_base(tmp_path))
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj",
             "gate": "gate_proj", "up": "up_proj", "down": "down_proj"}  # fmt: skip
    theirs = {
        name: module.scaling["default"]
        for name, module in peft.get_peft_model(base, config).named_modules()
        if hasattr(module, "lora_A")
    }
    assert len(ours) == len(theirs) == 14
    for name, scale in ours.items():
        part, layer = name.rsplit(".", 1)[1], name.split(".")[1]
        (same,) = [
            one for key, one in theirs.items() if f"layers.{layer}." in key and key.endswith(names[part])
        ]
        assert scale == pytest.approx(same), name


def test_what_an_adapter_begins_as_follows_from_its_seed() -> None:
    """Down uniform within 1/sqrt(inputs), as PEFT draws it; up zero; every layer and every seed its own."""
    drawn = []
    for seed in (0, 0, 1):
        layers = add_adapter(small_model(), AdapterSettings(rank=4), seed=seed)
        drawn.append({name: layer.down["default"].detach().clone() for name, layer in layers.items()})
        for name, layer in layers.items():
            assert not layer.up["default"].any()
            bound = layer.in_features**-0.5
            assert 0.8 * bound < float(drawn[-1][name].abs().max()) <= bound
    assert_identical(drawn[0], drawn[1])
    query, key = (drawn[0][f"layers.0.attention.{name}"] for name in ("query", "key"))
    assert not torch.equal(query, key)
    assert not any(torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_gradient_is_pefts(tmp_path: Path, kind: str) -> None:
    base = saved_base(tmp_path)
    model = load_model(base)
    add_adapter(model, AdapterSettings(kind=kind, rank=4))
    shaken(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    opened = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"), is_trainable=True)
    model.logits(model(TOKENS, Documents([12]))).square().mean().backward()
    opened(input_ids=TOKENS[None]).logits.square().mean().backward()
    named = dict(opened.named_parameters())
    ours = adapted_layers(model)["layers.1.attention.query"]
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    assert ours.down["default"].grad.abs().max() > 1e-6
    assert torch.allclose(ours.down["default"].grad, named[key].grad, atol=1e-6, rtol=1e-4)
    if kind == "dora":
        key = "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector.default.weight"
        assert torch.allclose(ours.magnitude["default"].grad, named[key].grad, atol=1e-6, rtol=1e-4)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if ".down." not in name
               and ".up." not in name and ".magnitude." not in name)  # fmt: skip


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa"])
def test_merging_leaves_no_trace(kind: str) -> None:
    model = small_model()
    base = logits(model)
    add_adapter(model, AdapterSettings(kind=kind, rank=4))
    shaken(model)
    before, weights = logits(model), weights_of(model)
    merge(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    unmerge(model)
    assert_identical(weights_of(model), weights)
    assert torch.equal(logits(model), before)
    with selected(model, None):
        assert torch.allclose(logits(model), base, atol=1e-5)
    bake(model)
    assert not adapted_layers(model)
    assert torch.allclose(logits(model), before, atol=1e-5)


def test_parts_trained_whole_travel_with_the_adapter(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = load_model(base)
    grown = torch.nn.Embedding(VOCABULARY + 3, 32)
    grown.weight.data[:VOCABULARY] = model.embedding.weight.data
    head = torch.nn.Linear(32, VOCABULARY + 3, bias=False)
    model.embedding, model.head = grown, head
    model.config = model.config.changed(vocabulary=VOCABULARY + 3)
    add_adapter(model, AdapterSettings(rank=2, train=["embedding", "head", "norms"]))
    assert model.embedding.weight.requires_grad
    assert model.norm.weight.requires_grad
    shaken(model)
    save_adapter(model, tmp_path / "adapter", base=str(base))
    again = load_model(base)
    load_adapter(again, tmp_path / "adapter")
    assert again.config.vocabulary == VOCABULARY + 3
    assert torch.equal(logits(again), logits(model))
    plain = transformers.AutoModelForCausalLM.from_pretrained(base)
    plain.resize_token_embeddings(VOCABULARY + 3)
    opened = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()
    assert torch.allclose(theirs(opened), logits(model), atol=1e-5)


def test_several_adapters_share_a_base(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    alone = {}
    for number, kind in enumerate(("lora", "dora", "pissa")):
        model = load_model(base)
        add_adapter(model, AdapterSettings(kind=kind, rank=3, targets=["query", "mlp.*"]), seed=number)
        shaken(model, seed=number)
        save_adapter(model, tmp_path / kind, base=str(base))
        alone[kind] = logits(model)
    model = load_model(base)
    alone["base"] = logits(model)
    for kind in ("lora", "dora", "pissa"):
        load_adapter(model, tmp_path / kind, name=kind)
    for kind in ("lora", "dora", "pissa"):
        with selected(model, kind):
            assert torch.allclose(logits(model), alone[kind], atol=1e-5)
    selection = adapted_layers(model)["layers.0.attention.query"].selection
    selection.parts = [("dora", torch.arange(5))]
    mixed = logits(model)
    assert torch.allclose(mixed[:5], alone["dora"][:5], atol=1e-5)
    assert torch.allclose(mixed[5:], alone["base"][5:], atol=1e-5)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = small_model()
    with pytest.raises(TriviumError, match="names no layer; there are down, gate"):
        add_adapter(model, AdapterSettings(targets=["q_proj"]))
    with pytest.raises(TriviumError, match="adapter_config"):
        load_adapter(model, tmp_path)
    add_adapter(model, AdapterSettings(rank=2))
    save_adapter(model, tmp_path, base="base")
    with pytest.raises(TriviumError, match="already has an adapter"):
        load_adapter(model, tmp_path)
    with pytest.raises(TriviumError, match="the model's layer is"):
        load_adapter(small_model(width=64), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "IA3"}))
    with pytest.raises(TriviumError, match="IA3"):
        load_adapter(small_model(), tmp_path)
