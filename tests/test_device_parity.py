"""Losses, gradients and logits on every device there is, against float32 on a CPU, within stated bounds.

On a machine without a GPU its kernel for documents of several lengths is a plain-torch stand-in with the
same signature, so that everything around it is what a GPU would run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from devices import DEVICES
from generating import prompt, tiny_model, tokenizer
from kernels import BY_VERSION
from objectives import CASES
from test_model_families import FAMILIES
from test_model_varlen import install, tiny

from trivium.data.rows import collate, row_of_documents
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.precision import one_pass
from trivium.model import attention, branches
from trivium.model.branches import Branches
from trivium.model.transformer import Transformer

LENGTHS = (17, 5, 30, 1, 11)
EXACT = 1e-4
"""Float32 on another device: the relative distance of logits and gradients."""
LOSS, LOGITS, GRADIENT = 0.01, 0.03, 0.1
"""bfloat16 products: relative distance of the loss, of logits, and of the whole gradient."""
ROUTED = 3.0
"""How much further off experts may be: rounding sends some tokens to others."""


class Found(NamedTuple):
    loss: float
    logits: torch.Tensor
    gradient: torch.Tensor


def lively(model: Transformer) -> Transformer:
    """A model whose every weight matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def computed(model: Transformer, precision: str) -> Found:
    """Packed documents of several lengths, some of their tokens learned."""
    random = np.random.default_rng(0)
    documents = [random.integers(3, 61, length) for length in LENGTHS]
    learned = [(random.random(length) < 0.9).astype(np.float32) for length in LENGTHS]
    batch = collate([row_of_documents(documents, learned=learned)], model.device)
    model.zero_grad()
    with one_pass(precision, model.device):
        loss = NextToken().loss(model, batch).sum / batch.weights.sum()
        with torch.no_grad():
            context = attention.Documents(batch.lengths, model.device)
            logits = model.logits(model(batch.tokens, context))
    loss.backward()
    return Found(float(loss.detach()), logits.cpu(), gradient_of(model))


def gradient_of(*modules: torch.nn.Module | None) -> torch.Tensor:
    parts = [
        one.grad.flatten().cpu()
        for module in modules
        if module is not None
        for one in module.parameters()
        if one.grad is not None
    ]
    return torch.cat(parts)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.fixture(params=["groups", "kernel"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how documents of several lengths are attended on a device."""

    def choose(device: str) -> None:
        if request.param == "groups":
            for module in (attention, branches):
                monkeypatch.setattr(module, "varlen_kernel", lambda device: None)
        elif device == "cpu":
            install(monkeypatch, BY_VERSION["2.12"])

    return choose


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_float32(name: str, device: str) -> None:
    exact = computed(lively(tiny(name)), "float32")
    found = computed(lively(tiny(name)).to(device), "float32")
    assert found.loss == pytest.approx(exact.loss, rel=EXACT)
    assert distance(found.logits, exact.logits) < EXACT
    assert distance(found.gradient, exact.gradient) < EXACT


@pytest.mark.quick_cases(13)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FAMILIES)
def test_families_in_bfloat16(name: str, device: str, way: Any) -> None:
    exact = computed(lively(tiny(name)), "float32")
    way(device)
    model = lively(tiny(name)).to(device)
    found = computed(model, "bfloat16")
    slack = ROUTED if model.config.experts is not None else 1.0
    assert found.logits.dtype == torch.float32
    assert found.loss == pytest.approx(exact.loss, rel=slack * LOSS)
    assert distance(found.logits, exact.logits) < slack * LOGITS
    assert distance(found.gradient, exact.gradient) < slack * GRADIENT


BRANCHED: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads": {"key_value_heads": 1},
    "window": {"windows": (5, None, 9)},
    "soft cap": {"attention_soft_cap": 5.0},
    "learned positions": {"positions": "learned"},
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("design", BRANCHED)
def test_prompts_shared_by_answers(design: str, precision: str, device: str, way: Any) -> None:
    """A prompt computed once, as RL has it: states of the answers, and the gradient through the prompt."""
    lengths, back = [9, 4, 11, 1, 17, 20, 2], [0, 1, 2, 3, 0, 1, 2]
    tokens = torch.tensor(prompt(sum(lengths)))
    results = []
    for place, rounding in (("cpu", "float32"), (device, precision)):
        if rounding == precision:
            way(place)
        model = tiny_model(scale=0.1, **BRANCHED[design]).to(place)
        with one_pass(rounding, model.device):
            hidden = model(tokens.to(place), Branches(lengths, back, place))
        (
            hidden.float() * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(place)
        ).sum().backward()
        results.append((hidden.detach().float().cpu(), gradient_of(model)))
    (exact, wanted), (found, gradient) = results
    assert distance(found, exact) < (LOGITS if precision == "bfloat16" else EXACT)
    assert distance(gradient, wanted) < (GRADIENT if precision == "bfloat16" else EXACT)


@pytest.mark.quick_cases(13)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_objectives(name: str, device: str) -> None:
    """The loss and the gradient of every objective, its own weights included."""
    found = {}
    for place, precision in (("cpu", "float32"), (device, "float32"), (device, "bfloat16")):
        case = CASES[name](place)
        torch.manual_seed(0)
        with one_pass(precision, case.model.device):
            loss = case.objective.loss(case.model, collate(case.rows, case.model.device)).sum
        loss.backward()
        found[place, precision] = float(loss.detach()), gradient_of(case.model, case.objective.extra)
    loss, gradient = found["cpu", "float32"]
    noisy = name == "next-token-smoothed" and device != "cpu"
    # A ratio of whole answers, or a clipped one near its edge, multiplies what rounding does to a sum.
    steep = ("policy-rloo", "policy-vespo", "ppo", "ppo-critic")
    slack = ROUTED if name == "next-token-experts" else 2.0 if name in steep else 1.0
    for precision, near in (("float32", EXACT), ("bfloat16", slack * GRADIENT)):
        other, theirs = found[device, precision]
        # Noise is drawn by the device's own generator.
        assert other == pytest.approx(loss, rel=0.1 if noisy else near, abs=near * float(gradient.norm()))
        assert distance(theirs, gradient) < (0.5 if noisy else near)


@pytest.mark.parametrize("device", DEVICES)
def test_the_engine_in_float32(device: str) -> None:
    """Greedy texts are the CPU's, and so is what they cost."""
    greedy = Sampling(temperature=0, max_new_tokens=20, logprobs=True)
    requests = [Request(prompt(length, seed=length), greedy) for length in (5, 40, 17)]
    told = []
    for place in ("cpu", device):
        engine = Engine(tiny_model().to(place), tokenizer(), dtype=torch.float32)
        told.append([(one.tokens, one.logprobs) for (one,) in engine.generate(requests)])
    for (tokens, logprobs), (others, theirs) in zip(*told, strict=True):
        assert tokens == others
        assert theirs == pytest.approx(logprobs, abs=1e-3)
