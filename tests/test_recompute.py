"""Activations that are computed again: the same gradients from less memory."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from devices import DEVICES
from objectives import CASES, FAMILIES
from small import small_model
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.data.rows import collate
from trivium.learn.precision import one_pass
from trivium.model.attention import Documents
from trivium.model.compiling import compiled

BEHIND = 1e-6
"""Relative distance of gradients: products run again may be summed in another order on a GPU."""


def gradients(name: str, how: str, precision: str, device: str) -> torch.Tensor:
    case = CASES[name](device)
    case.model.recompute = how
    torch.manual_seed(0)
    with one_pass(precision, case.model.device):
        loss = case.objective.loss(case.model, collate(case.rows, case.model.device)).sum
    loss.backward()
    modules = [case.model, *([case.objective.extra] if case.objective.extra is not None else [])]
    parts = [one.grad.flatten() for module in modules for one in module.parameters() if one.grad is not None]
    return torch.cat([loss.detach().reshape(1), *parts])


@pytest.mark.quick_cases(7)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("name", [*FAMILIES, "next-token-experts"])
def test_the_gradients_of_every_objective_stay(name: str, precision: str, device: str) -> None:
    kept = gradients(name, "none", precision, device)
    for how in ("selective", "full"):
        found = gradients(name, how, precision, device)
        if device == "cpu":
            assert torch.equal(found, kept), how
        else:
            assert (found - kept).norm() < BEHIND * kept.norm()


def kept_bytes(how: str, **design: Any) -> int:
    """What the forward pass of all layers holds for the backward pass, weights left out."""
    model = small_model(layers=4, **design)
    model.recompute = how
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in weights:
            held[place] = tensor.untyped_storage().nbytes()
        alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    tokens = torch.arange(60) % 61
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens, Documents([60])).sum()
    return sum(held.values())


def test_a_layer_keeps_no_more_than_what_enters_it() -> None:
    none, full = kept_bytes("none"), kept_bytes("full")
    assert full < none / 3


def test_nothing_changes_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    tokens = torch.arange(20)
    plain = model(tokens, Documents([20]))
    model.recompute = "full"
    monkeypatch.setattr("trivium.model.recompute.checkpoint", None)
    with torch.no_grad():
        assert torch.equal(model(tokens, Documents([20])), plain)


class Counting(TorchDispatchMode):
    """Counts what is really computed: a result that was kept does not come this far."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.counts[str(operation.overloadpacket).partition(".")[2]] += 1
        return operation(*arguments, **(options or {}))


def test_what_is_dear_is_run_once_under_selective() -> None:
    """Attention is not run again, and half of the products are; `full` runs everything again."""
    attention, products = [], []
    for how in ("none", "selective", "full"):
        model = small_model()
        model.recompute = how
        with Counting() as counting:
            model(torch.arange(20), Documents([20])).sum().backward()
        attention.append(counting.counts["_scaled_dot_product_flash_attention_for_cpu"])
        products.append(counting.counts["mm"])
    assert attention == [2, 2, 4]
    assert products[0] < products[1] < products[2]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["selective", "full"])
def test_a_compiled_pass_takes_it_too(how: str) -> None:
    found = []
    for recompute in ("none", how):
        torch._dynamo.reset()
        model = small_model()
        model.recompute = recompute
        forward = compiled(model, backend="aot_eager")
        forward(torch.arange(40), Documents([20, 20])).square().sum().backward()
        found.append(torch.cat([one.grad.flatten() for one in model.parameters() if one.grad is not None]))
    torch.testing.assert_close(*found)
