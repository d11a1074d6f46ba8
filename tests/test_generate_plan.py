"""The plan computes what the modules compute, for every family it covers."""

import pytest
import torch

from trivium.generate.attention import DecodeContext, Piece, PrefillContext
from trivium.generate.exactness import BIT_EXACT, Exactness
from trivium.generate.forward import FusedForward, covers
from trivium.generate.kv_cache import Cache, Shape
from trivium.generate.packed import KERNELS, packs
from trivium.generate.sequence import Sequence
from trivium.kit.errors import TriviumError
from trivium.model import quantize
from trivium.model.attention import Documents
from trivium.model.config import ExpertsConfig, ModelConfig
from trivium.model.lora import AdapterSettings, adapted_layers, add_adapter, selected
from trivium.model.quantize import quantise
from trivium.model.transformer import Transformer

SIZE = {"vocabulary": 61, "width": 32, "layers": 3, "heads": 4, "inner_width": 48, "context": 128}
KINDS = {
    "plain": {"key_value_heads": 4},
    "grouped": {"key_value_heads": 2, "head_width": 16},
    "biased": {
        "key_value_heads": 2,
        "query_key_value_bias": True,
        "attention_output_bias": True,
        "inner_bias": True,
    },
    "head-norm": {"key_value_heads": 2, "query_key_norm": "head", "tied": True},
    "full-norm-after": {"query_key_norm": "full", "norm_before": False, "norm_after": True},
    "gpt2": {
        "norm": "layer",
        "positions": "learned",
        "gated": False,
        "activation": "gelu_tanh",
        "query_key_value_bias": True,
        "attention_output_bias": True,
        "inner_bias": True,
        "tied": True,
    },
    "gemma": {
        "norm_plus_one": True,
        "norm_after": True,
        "activation": "gelu_tanh",
        "attention_soft_cap": 3.0,
        "final_soft_cap": 4.0,
        "embedding_scale": 32**0.5,
        "windows": (7, None, 7),
        "local_rope": {"rope_type": "default", "rope_theta": 100.0},
        "attention_scale": 0.2,
        "key_value_heads": 2,
    },
    "window": {"windows": (5, 5, None)},
    "no-rope-layer": {"rotates": (True, False, True)},
    "linear": {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}},
    "yarn": {
        "rope": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
        }
    },
    "dynamic": {"context": 16, "rope": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
}


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**SIZE, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def read_and_step(model, forward, texts):
    """The hidden states of the texts, all but the last token read at once and the last in a step."""
    exactness = getattr(getattr(forward, "__self__", None), "exactness", Exactness())
    config = model.config
    cache = Cache(Shape.of(config, model.dtype, model.device), rows=8, budget=2**24)
    rows = [Sequence(tokens=text, prefill_length=len(text) - 1, reserved=len(text)) for text in texts]
    grows = model.rotary is not None and model.rotary.grows
    for row in rows:
        assert cache.place(row, row.reserved)
    padded = [-(-row.prefill_length // 16) * 16 for row in rows]
    pieces = [Piece(row, 0, count) for row, count in zip(rows, padded, strict=True)]
    tokens = [
        t for row, count in zip(rows, padded, strict=True) for t in (row.tokens[:-1] + [0] * count)[:count]
    ]
    lengths = torch.tensor([row.reserved for row in rows])
    last_position = config.context - 1 if config.positions == "learned" else 2**62
    reserved = lengths.repeat_interleave(torch.tensor(padded)) if grows else 0
    context = PrefillContext(pieces, reserved, last_position, together=exactness.prompts)
    hidden = forward(torch.tensor(tokens), context).clone()
    starts = torch.tensor([0, *padded]).cumsum(0)
    read = [hidden[start : start + row.prefill_length] for start, row in zip(starts, rows, strict=False)]
    for row in rows:
        row.length = row.prefill_length
        row.pool.move_to_decode(row)
    windows = {config.window(layer) for layer in range(config.layers)}
    step = DecodeContext(
        list(cache.pools.values()), windows, lengths if grows else 0, lone=False, together=exactness.steps
    )
    order = [row for pool in cache.pools.values() for row in pool.slots]
    last = forward(torch.tensor([row.tokens[-1] for row in order]), step).clone()
    found = {id(row): line for row, line in zip(order, last, strict=True)}
    return [torch.cat([part, found[id(row)][None]]) for part, row in zip(read, rows, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_plan_and_cache_agree_with_the_whole_text_at_once(kind, count):
    model = model_of(**KINDS[kind])
    assert covers(model)
    texts = [torch.randint(61, (length,)).tolist() for length in (21, 40, 2)[:count]]
    if kind == "full-norm-after" and count == 3:
        texts.append(torch.randint(61, (120,)).tolist())
    plan = FusedForward(model)
    planned = read_and_step(model, plan.forward, texts)
    through_modules = read_and_step(model, model, texts)
    for text, fast, slow in zip(texts, planned, through_modules, strict=True):
        expected = model(torch.tensor(text), Documents([len(text)]))
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(slow, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(fast, expected, atol=2e-5, rtol=0)
        torch.testing.assert_close(plan.logits(fast), model.logits(expected), atol=1e-4, rtol=0)
    if count == 1:
        (alone,) = read_and_step(model, FusedForward(model, alone=True).forward, texts)
        torch.testing.assert_close(alone, expected, atol=2e-5, rtol=0)


def test_what_a_plan_does_not_cover_is_said():
    assert not covers(model_of(experts=ExpertsConfig(count=4, per_token=2, inner_width=16)))
    replaced = model_of()
    replaced.layers[0].mlp.up = torch.nn.Sequential(replaced.layers[0].mlp.up)
    assert not covers(replaced)


HAS_KERNELS = torch.backends.cpu.get_cpu_capability() in KERNELS
"""Elsewhere such models run through their modules."""


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_matrices_that_no_kernel_packs_are_multiplied_out(scheme, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    model = model_of(inner_width=64)
    text = torch.randint(61, (30,)).tolist()
    before = model(torch.tensor(text), Documents([30]))
    quantise(model, scheme)
    assert covers(model)
    expected = model(torch.tensor(text), Documents([30]))
    (found,) = read_and_step(model, FusedForward(model).forward, [text])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert (found - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["plain", "grouped", "biased", "gpt2", "gemma"])
def test_packed_matrices_are_the_quantised_ones(kind, scheme):
    """A product has the rows' rounding to bfloat16 and nothing else; each row is the same among others."""
    model = model_of(**KINDS[kind] | {"inner_width": 64})
    quantise(model, scheme)
    assert packs(model) is HAS_KERNELS
    if not HAS_KERNELS:
        return
    layer = FusedForward(model).layers[1]
    attention, inner = model.layers[1].attention, model.layers[1].mlp
    rows = torch.randn(9, 32)
    for packed, linear in ((layer.output, attention.output), (layer.exit, inner.down)):
        mine = torch.randn(9, linear.in_features)
        expected = mine.bfloat16().float() @ linear.weight.dequantize().t()
        found = packed.product(mine)
        torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.01)
        assert torch.equal(torch.cat([packed.product(row[None]) for row in mine]), found)
        if scheme == "int8":
            # Held once, by the model and by the engine.
            assert packed.values.data_ptr() == linear.weight.qdata.data_ptr()
    up = layer.entry.product(rows)[:, -64:].float()
    expected = rows.bfloat16().float() @ inner.up.weight.dequantize().t()
    expected = expected if inner.up.bias is None else expected + inner.up.bias
    torch.testing.assert_close(up, expected, atol=0.02, rtol=0.01)


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["plain", "grouped", "biased", "gpt2", "gemma", "head-norm"])
def test_a_packed_model_computes_what_its_modules_do(kind, scheme):
    model = model_of(**KINDS[kind] | {"inner_width": 64})
    quantise(model, scheme)
    text = torch.randint(61, (30,)).tolist()
    expected = model(torch.tensor(text), Documents([30]))
    forward = FusedForward(model)
    (found,) = read_and_step(model, forward.forward, [text])
    assert (found - expected).pow(2).mean().sqrt() < 0.03 * expected.std()
    scores, exact = forward.logits(found), model.logits(found)
    assert (scores - exact).pow(2).mean().sqrt() < 0.02 * exact.std()


@pytest.mark.quick_cases(12)
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpt2"])
@pytest.mark.parametrize("count", [1, 3])
def test_weights_in_16_bits_meet_rows_in_float32(kind, dtype, count):
    """What is computed is what float32 computes with the same weights."""
    model = model_of(**KINDS[kind]).to(dtype)
    if model.config.norm != "rms" or not HAS_KERNELS:
        assert not covers(model)
        return
    exact = model_of(**KINDS[kind])
    exact.load_state_dict(model.state_dict())
    texts = [torch.randint(61, (length,)).tolist() for length in (21, 40, 2)[:count]]
    forward = FusedForward(model, alone=count == 1)
    for text, found in zip(texts, read_and_step(exact, forward.forward, texts), strict=True):
        expected = exact(torch.tensor(text), Documents([len(text)]))
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)
        torch.testing.assert_close(forward.logits(found), exact.logits(expected), atol=1e-3, rtol=0)
    rows = torch.randn(40, model.config.width)
    for product in (
        forward.layers[1].projection.product,
        forward.layers[1].entry.product,
        forward.head.product,
    ):
        together = product(rows)
        assert torch.equal(torch.cat([product(row[None]) for row in rows]), together)
        assert torch.equal(torch.cat([product(part) for part in rows.split(7)]), together)


def test_where_no_kernel_takes_16_bits_the_modules_do(monkeypatch):
    model = model_of().to(torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert covers(model)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert not covers(model)


def test_infinite_weights_in_16_bits_are_refused(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = model_of().to(torch.bfloat16)
    with torch.no_grad():
        model.layers[0].mlp.down.weight[0, 0] = torch.inf
    with pytest.raises(TriviumError, match="float16 cannot hold: open it in float32"):
        FusedForward(model)


def test_rounded_rows_stay_with_the_modules(monkeypatch):
    monkeypatch.setattr(quantize, "multiplies_exactly", lambda: True)
    model = model_of()
    quantise(model, "int8-dynamic")
    assert not covers(model)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_lone_adapter_is_part_of_its_matrices(kind):
    model = model_of()
    add_adapter(model, AdapterSettings(kind=kind, rank=4))
    for layer in adapted_layers(model).values():
        layer.up["default"].normal_()
    assert covers(model)
    plan, text = FusedForward(model), torch.randint(61, (30,)).tolist()
    expected = model(torch.tensor(text), Documents([30]))
    (found,) = read_and_step(model, plan.forward, [text])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    with selected(model, None):
        plan.refresh_if_changed()
        (base,) = read_and_step(model, plan.forward, [text])
        torch.testing.assert_close(base, model(torch.tensor(text), Documents([30])), atol=2e-5, rtol=0)
    assert (base - found).abs().max() > 1e-2
    add_adapter(model, AdapterSettings(), name="second")
    assert not covers(model)


@torch.no_grad()
def test_an_engine_of_one_row_computes_one_row():
    model, text = model_of(), torch.randint(61, (30,)).tolist()
    one = read_and_step(model, FusedForward(model, alone=True).forward, [text])[0]
    torch.testing.assert_close(
        one, read_and_step(model, FusedForward(model).forward, [text])[0], atol=2e-5, rtol=0
    )


@torch.no_grad()
def test_plan_takes_over_changed_weights():
    model = model_of()
    plan = FusedForward(model)
    text = [list(range(20))]
    before = read_and_step(model, plan.forward, text)[0]
    with torch.no_grad():
        model.layers[1].mlp.down.weight.mul_(1.5)
        plan.refresh_if_changed()
        after = read_and_step(model, plan.forward, text)[0]
        expected = model(torch.tensor(text[0]), Documents([20]))
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(after, expected, atol=2e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["grouped", "full-norm-after", "window", "head-norm", "gpt2"])
def test_a_rows_numbers_do_not_depend_on_its_neighbours(kind):
    model = model_of(**KINDS[kind])
    plan = FusedForward(model)
    texts = [torch.randint(61, (length,)).tolist() for length in (33, 5, 100, 64, 17, 90, 2, 50)]
    together = read_and_step(model, plan.forward, texts)
    scores = plan.logits(torch.stack([text[-1] for text in together]))
    for text, expected, its_scores in zip(texts, together, scores, strict=True):
        alone = read_and_step(model, plan.forward, [text])[0]
        difference = max((alone - expected).abs().max(), (plan.logits(alone[-1:]) - its_scores).abs().max())
        assert difference <= (0 if plan.exactness.promise == BIT_EXACT else 1e-5)
