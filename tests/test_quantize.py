"""Few bits: what is written is what was computed; trained rounding beats rounding afterwards."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from small import SmallBatches, small_model, small_trainer

from trivium.data.rows import collate
from trivium.kit.errors import TriviumError
from trivium.learn.objectives.next_token import NextToken
from trivium.model import quantize
from trivium.model.attention import Documents
from trivium.model.config import ExpertsConfig
from trivium.model.folder import load_model, save_model
from trivium.model.lora import AdapterSettings, add_adapter, bake
from trivium.model.quantize import multiplies_exactly, prepare_for, quantise, quantised_as
from trivium.pipeline.plan import plan

pytest.importorskip("torchao")
pytest.importorskip("compressed_tensors")
TOKENS = torch.arange(1, 13)
SCHEMES = ["int8", "int4", *(["int8-dynamic"] if multiplies_exactly() else [])]


def model_of(seed: int = 0, **changes: object):
    return small_model(seed, **({"inner_width": 64} | changes))


def logits(model):
    with torch.no_grad():
        return model.logits(model(TOKENS, Documents([5, 7])))


def test_products_of_integers_are_right_or_refused(monkeypatch) -> None:
    rows, columns = torch.randint(-127, 128, (16, 64), dtype=torch.int8), torch.full((64, 16), 127)
    found = torch._int_mm(rows, columns.to(torch.int8))
    assert torch.equal(found, rows.int() @ columns.int()) == multiplies_exactly()
    # As where kernels cut sums at 16 bits.
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: (left.int() @ right.int()).clamp(max=32767))
    multiplies_exactly.cache_clear()
    monkeypatch.setattr(quantize, "device", lambda: "cpu")
    try:
        with pytest.raises(TriviumError, match="no VNNI"):
            quantise(model_of(), "int8-dynamic")
    finally:
        multiplies_exactly.cache_clear()


def test_a_plan_finds_the_model_beside_the_recipe(tmp_path: Path) -> None:
    save_model(model_of(), tmp_path / "stage" / "model")
    (tmp_path / "q.yaml").write_text(
        "stages: {q: {kind: quantize, from: ./stage, data: {'world:facts': {limit: 9, validation: 0.5}}}}"
    )
    assert "parameters" in plan(tmp_path / "q.yaml", tmp_path / "runs")[1][4]


@pytest.mark.slow
def test_what_torchao_says_of_absent_kernels_is_kept_from_people(tmp_path: Path) -> None:
    model = model_of()
    quantise(model, "int8")
    save_model(model, tmp_path)
    program = f"from trivium.model.folder import load_model; load_model({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_saved_and_loaded_again(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = model_of().to(dtype)
    before = logits(model)
    save_model(model, tmp_path / "float")
    quantise(model, scheme)
    assert quantised_as(model) == scheme
    after = logits(model)
    error = (after - before).norm() / before.norm()
    assert 1e-4 < error < (0.3 if scheme == "int4" else 0.05)
    save_model(model, tmp_path / "few")
    assert not list(tmp_path.rglob("*.bin"))
    again = load_model(tmp_path / "few")
    assert quantised_as(again) == scheme
    assert torch.equal(logits(again), after)
    values = sum(one.numel() for one in model.parameters() if hasattr(one, "tensor_data_names"))
    # Beside the values: a scale for 32 of them, and the names.
    rounded = (tmp_path / "few" / "model.safetensors").stat().st_size
    size = rounded - sum(one.nbytes for one in model.parameters() if not hasattr(one, "tensor_data_names"))
    assert size < values * (0.5 + 4 / 32 if scheme == "int4" else 1 + 4 / 32) + 8192


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_is_what_it_says(scheme: str) -> None:
    model = model_of()
    exact = model.layers[0].mlp.down.weight.detach().clone()
    quantise(model, scheme)
    rounded = model.layers[0].mlp.down.weight.dequantize()
    if scheme == "int4":
        groups = exact.view(32, -1, 32)
        scale = torch.maximum(groups.amax(-1, keepdim=True) / 7.5, -groups.amin(-1, keepdim=True) / 7.5)
        # torchao's symmetric scale covers the whole signed range
        error = (rounded.view_as(groups) - groups).abs()
        assert (error <= scale * 1.01).all()
    else:
        scale = exact.abs().amax(1, keepdim=True) / 127
        assert ((rounded - exact).abs() <= scale * 0.51).all()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TriviumError, match="48 inputs, no multiple of 32"):
        quantise(small_model(), "int4")
    model = model_of()
    quantise(model, "int8")
    with pytest.raises(TriviumError, match="quantised already"):
        quantise(model, "int4")
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TriviumError, match="gptq"):
        load_model(tmp_path)
    # What was written beside the weights until this layout came.
    config["quantization_config"] = {"quant_method": "trivium", "scheme": "int8", "group": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TriviumError, match="quantise its parent again"):
        load_model(tmp_path)


QWEN2 = {"family": "qwen2", "query_key_norm": "none", "query_key_value_bias": True, "tied": True}
EXPERTS = {"family": "qwen3_moe", "experts": ExpertsConfig(count=4, per_token=2, inner_width=32)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [{}, QWEN2, EXPERTS], ids=["qwen3", "qwen2", "experts"])
def test_transformers_computes_the_same_with_what_was_written(tmp_path: Path, scheme: str, shape) -> None:
    exact = model_of(**shape)
    model = model_of(**shape)
    quantise(model, scheme)
    save_model(model, tmp_path)
    if shape is EXPERTS and scheme == "int8-dynamic":
        with pytest.raises(RuntimeError, match="conversion"):
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        return
    for whole in (False, True):
        config = transformers.CompressedTensorsConfig(dequantize=whole)
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=config, output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            found = torch.cat([theirs(part[None]).logits[0] for part in TOKENS.split([5, 7])])
        ours = logits(model)
        if scheme == "int8-dynamic":
            # They round activations by a slightly different scale.
            assert (found - ours).norm() < 2 * (logits(exact) - ours).norm()
        else:
            assert torch.allclose(found, ours, atol=2e-5)
    held = theirs.model.layers[1].self_attn.k_proj.weight
    assert torch.equal(held, model.layers[1].attention.key.weight.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_refuses_a_rounded_gpt2(tmp_path: Path, scheme: str) -> None:
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    model = load_model(tmp_path / "float", dtype=torch.float32)
    quantise(model, scheme)
    save_model(model, tmp_path / "few")
    assert torch.equal(logits(load_model(tmp_path / "few")), logits(model))
    with pytest.raises(ValueError, match="opened by Trivium alone"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "few")


def test_an_adapter_learns_on_four_bits(tmp_path: Path) -> None:
    model = model_of()
    quantise(model, "int4")
    held = model.layers[0].attention.query.weight.qdata.clone()
    add_adapter(model, AdapterSettings(rank=4))
    names = {name for name, one in model.named_parameters() if one.requires_grad}
    assert names
    assert all(".down." in name or ".up." in name for name in names)
    trainer = small_trainer(tmp_path, model=model, steps=8, optimiser="adamw")
    trainer.run()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert torch.equal(model.layers[0].attention.query.weight.qdata, held)
    after = logits(model)
    bake(model)
    assert quantised_as(model) is None
    assert torch.allclose(logits(model), after, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_rounding_felt_in_training_is_the_rounding_done_after(scheme: str) -> None:
    model = model_of()
    prepare_for(model, scheme)
    felt = logits(model)
    plain = model_of()
    assert not torch.allclose(felt, logits(plain), atol=1e-3)
    quantise(plain, scheme)
    # In 8 bits the products are scaled, not the weights.
    assert torch.allclose(felt, logits(plain), rtol=0, atol=0 if scheme == "int4" else 1e-5)


def loss_of(model, steps: range) -> float:
    batches, objective = SmallBatches(steps=200), NextToken()
    total = weight = 0.0
    with torch.no_grad():
        for step in steps:
            rows = batches.rows(step)
            total += float(objective.loss(model, collate(rows, "cpu")).sum)
            weight += objective.weight(rows)
    return total / weight


@pytest.mark.slow
def test_rounding_costs_nothing_where_training_felt_it_and_something_where_not(tmp_path: Path) -> None:
    cost: dict[str, list[float]] = {"after": [], "during": []}
    for seed in range(3):
        for name, costs in cost.items():
            model = model_of(seed)
            if name == "during":
                prepare_for(model, "int4")
            folder = tmp_path / f"{name}-{seed}"
            small_trainer(folder, model=model, batches=SmallBatches(steps=60)).run()
            save_model(model, folder / "model")
            rounded = load_model(folder / "model")
            quantise(rounded, "int4")
            costs.append(loss_of(rounded, range(150, 155)) - loss_of(model, range(150, 155)))
    assert max(map(abs, cost["during"])) < 1e-5, cost
    # Five seeds lost 0.018 to 0.059 nats.
    assert sum(cost["after"]) / 3 > 0.01, cost


def test_a_torchao_of_another_time_than_torch_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("raise ImportError('cannot import ScalingType')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [one for one in sys.modules if one.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(TriviumError, match=r"torchao [\d.]+ does not work with torch .*ScalingType"):
        quantise(small_model(), "int8")
