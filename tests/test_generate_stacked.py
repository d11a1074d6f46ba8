"""Projections that lie one under the other: the same numbers from fewer products, and no second weights."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from generating import assert_close_enough, prompt, tiny_model, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.generate import forward
from trivium.generate.engine import Engine
from trivium.generate.forward import ModuleForward
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.generate.stacked import StackedModel
from trivium.model.attention import Documents
from trivium.model.config import ExpertsConfig
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.transformer import Transformer

GREEDY = Sampling(temperature=0, max_new_tokens=16, stop_ids=(), logprobs=True)
DESIGNS: dict[str, tuple[dict[str, Any], int]] = {
    # And how many products a layer has: output, down, and one for each stack.
    "gated": ({}, 4),
    "gelu": ({"activation": "gelu_tanh"}, 4),
    "biases": ({"query_key_value_bias": True, "inner_bias": True}, 4),
    "plain inner network": ({"gated": False}, 4),
    "scaled stream": ({"residual_scale": 0.5}, 4),
}


class Products(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function.name().partition("::")[2].partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return sum(self.found[name] for name in ("mm", "addmm", "linear"))


def hidden(model: Transformer) -> torch.Tensor:
    tokens = torch.tensor(prompt(20))
    with torch.inference_mode():
        return model(tokens, Documents([len(tokens)]))


@pytest.mark.parametrize("name", DESIGNS)
def test_the_numbers_of_the_model_from_fewer_products(name: str) -> None:
    changes, products = DESIGNS[name]
    model = tiny_model(**changes)
    expected = hidden(model)
    fast = StackedModel(model).model
    with Products() as counts:
        found = hidden(fast)
    assert counts.count == products * len(model.layers)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    # The model's own weights are parts of the stacks.
    assert torch.equal(hidden(model), expected)
    attention = model.layers[0].attention
    storages = {one.weight.untyped_storage().data_ptr() for one in (attention.query, attention.value)}
    assert len(storages) == 1
    assert fast.layers[0].attention.query.weight.data_ptr() == attention.query.weight.data_ptr()


def test_stacks_are_for_gpus() -> None:
    assert forward.gains(torch.device("cuda"))
    assert not forward.gains(torch.device("cpu"))
    assert not Engine(tiny_model(residual_scale=0.5), tokenizer())._forward._stacked


def test_a_mixture_stacks_its_attention_alone() -> None:
    model = tiny_model(experts=ExpertsConfig(4, 2, 16))
    torch.testing.assert_close(hidden(StackedModel(model).model), hidden(model), atol=1e-5, rtol=1e-5)


def test_what_is_written_moved_or_added_is_followed() -> None:
    model = tiny_model()
    stacked = StackedModel(model)
    made = stacked.model
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    stacked.follow()
    assert stacked.model is made
    torch.testing.assert_close(hidden(made), hidden(model), atol=1e-5, rtol=1e-5)
    key = model.layers[1].attention.key
    key.weight.data = key.weight.data * 2
    stacked.follow()
    torch.testing.assert_close(hidden(stacked.model), hidden(model), atol=1e-5, rtol=1e-5)
    add_adapter(model, AdapterSettings(rank=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".up." in name:
                weight.normal_()
    stacked.follow()
    torch.testing.assert_close(hidden(stacked.model), hidden(model), atol=1e-5, rtol=1e-5)


def test_a_stacked_model_can_still_be_trained() -> None:
    model = tiny_model()
    with torch.inference_mode():
        stacked = StackedModel(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.tensor(prompt(20))
    model(tokens, Documents([len(tokens)])).square().sum().backward()
    before = hidden(model)
    optimiser.step()
    stacked.follow()
    assert not torch.equal(hidden(model), before)
    torch.testing.assert_close(hidden(stacked.model), hidden(model), atol=1e-5, rtol=1e-5)


def test_compiled_steps_generate_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graph capture as on a GPU; the kernels are torch's own."""
    model = tiny_model(residual_scale=0.5, layers=8)
    requests = [Request(prompt(length, seed=length), GREEDY) for length in (5, 40, 90)]
    expected = Engine(model, tokenizer(), max_rows=2).generate(requests)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(forward, "gains", lambda device: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    engine = Engine(model, tokenizer(), max_rows=2, static_steps=True, compiled=True)
    for one, other in zip(engine.generate(requests), expected, strict=True):
        assert_close_enough(one, other)
    made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    engine.generate(requests)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.9)
    engine.refresh()
    changed = engine.generate(requests)
    assert engine.scheduler.static is not None
    assert engine.scheduler.static.splits
    # Attention, and what is around it, for one row and for two, whatever the number of layers.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == made <= 12
    fresh = Engine(model, tokenizer(), max_rows=2).generate(requests)
    for one, other in zip(changed, fresh, strict=True):
        assert_close_enough(one, other)


@pytest.mark.parametrize("static", [False, True])
def test_an_engine_generates_the_same(static: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(residual_scale=0.5)
    requests = [Request(prompt(length, seed=length), GREEDY) for length in (5, 40, 90)]
    expected = Engine(model, tokenizer(), max_rows=2, static_steps=static).generate(requests)
    monkeypatch.setattr(forward, "gains", lambda device: True)
    engine = Engine(model, tokenizer(), max_rows=2, static_steps=static)
    assert isinstance(engine._forward, ModuleForward)
    with Products() as counts:
        found = engine.generate(requests)
    for one, other in zip(found, expected, strict=True):
        assert_close_enough(one, other)
    monkeypatch.setattr(forward, "gains", lambda device: False)
    with Products() as before:
        Engine(model, tokenizer(), max_rows=2, static_steps=static).generate(requests)
    assert counts.count < 0.7 * before.count
