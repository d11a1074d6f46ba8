"""Products in float8: torchao's numbers, float32's curve, and refusals where they cannot be computed."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES
from objectives import CASES, COMPILED
from pydantic import ValidationError
from small import small_model, small_trainer
from test_bfloat16 import Rechecked, curve, trainer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.data.rows import collate
from trivium.kit.errors import TriviumError
from trivium.learn.precision import one_pass
from trivium.learn.settings import Training
from trivium.learn.utilisation import utilisation
from trivium.model import float8
from trivium.model.float8 import float8_products, project_in_float8
from trivium.stages.pretrain import Pretrain

BOUND = 0.3
"""How far float8 may be from float32 at any step, as a share of what float32 moves in all."""


class Products(TorchDispatchMode):
    """Counts products by the type of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition("::")[2].partition(".")[0]
        if name == "_scaled_mm":
            self.found[f"{args[0].dtype} {args[1].dtype}".replace("torch.float8_", "")] += 1
        elif name in ("mm", "addmm"):
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("count", [32, 37])
def test_a_projection_and_its_gradients_are_torchaos(count: int) -> None:
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(count)
    first, second = (nn.Linear(64, width, bias=False).bfloat16() for width in (48, 32))
    rows, slopes = torch.randn(count, 64).bfloat16(), [torch.randn(count, width) for width in (48, 32)]

    def computed(pass_: Any, *linears: nn.Linear) -> list[torch.Tensor]:
        read = rows.clone().requires_grad_()
        found = pass_(read)
        sum((one.float() * slope).sum() for one, slope in zip(found, slopes, strict=True)).backward()
        return [*found, read.grad, *(linear.weight.grad for linear in linears)]

    theirs = convert_to_float8_training(
        nn.ModuleList(copy.deepcopy((first, second))), config=Float8LinearConfig(pad_inner_dim=True)
    )
    expected = computed(lambda read: [one(read) for one in theirs], *theirs)
    with torch.autocast("cpu", torch.bfloat16), float8_products(True):
        found = computed(lambda read: project_in_float8(read, first, second), first, second)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other.to(one.dtype)), index


def test_biases_are_added_and_learn() -> None:
    linear = nn.Linear(32, 16)
    rows = torch.randn(16, 32)
    with torch.autocast("cpu", torch.bfloat16), float8_products(True):
        (found,) = project_in_float8(rows, linear)
    (found.float() * 2).sum().backward()
    torch.testing.assert_close(found.float(), linear(rows), atol=0.1, rtol=0.1)
    assert torch.equal(linear.bias.grad, torch.full((16,), 32.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["next-token", "next-token-experts", "preference-sigmoid", "ppo-critic"])
def test_training_follows_float32(tmp_path: Path, name: str, device: str) -> None:
    rounded = curve(name, tmp_path / "rounded", "float8", device)
    exact = curve(name, tmp_path / "exact", "float32")
    assert not torch.equal(rounded, curve(name, tmp_path / "half", "bfloat16", device))
    moved = exact.max() - exact.min()
    assert (rounded - exact).abs().max() < BOUND * moved


@pytest.mark.parametrize("device", DEVICES)
def test_a_pass_uses_the_weights_the_optimiser_wrote_last(tmp_path: Path, device: str) -> None:
    case = CASES["next-token"](device)
    case = case._replace(objective=Rechecked(case.objective))
    trainer_of(case, tmp_path, "float8", steps=3).run()
    assert case.objective.checks == 3


def test_all_products_of_the_layers_are_in_float8_and_no_others() -> None:
    case = CASES["next-token"]("cpu")
    counts = Products()
    with counts:
        with one_pass("float8", case.model.device):
            loss = case.objective.loss(case.model, collate(case.rows, case.model.device)).sum
        loss.backward()
    matrices = 7 * case.model.config.layers
    assert counts.found["e4m3fn e4m3fn"] == matrices
    # Towards the rows and towards the weight.
    assert counts.found["e5m2 e4m3fn"] == 2 * matrices
    outside = Products()
    with outside, one_pass("bfloat16", case.model.device):
        case.objective.loss(case.model, collate(case.rows, case.model.device))
    assert not any("e4m3" in name for name in outside.found)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_matrix_with_a_hook_is_left_to_it(hook: str) -> None:
    """As layers divided by tensor parallelism have them."""
    linear, other = nn.Linear(32, 16), nn.Linear(32, 16)
    getattr(linear, hook)(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16), float8_products(True):
        assert not float8.applies(linear)
        assert float8.applies(other)
    with torch.autocast("cpu", torch.bfloat16):
        assert not float8.applies(other)
    with float8_products(True):
        assert not float8.applies(other)


def test_sides_that_no_kernel_takes_stay_in_bfloat16(tmp_path: Path) -> None:
    model = small_model(inner_width=40)
    with Products() as counts:
        small_trainer(tmp_path, model=model, precision="float8").run()
    assert set(counts.found) >= {"mm", "e4m3fn e4m3fn", "e5m2 e4m3fn"}


def test_a_compiler_sees_one_graph() -> None:
    linear = nn.Linear(32, 16)
    rows = torch.randn(16, 32)
    fast = torch.compile(project_in_float8, backend="aot_eager", fullgraph=True)
    found = []
    for project in (project_in_float8, fast):
        linear.zero_grad()
        with torch.autocast("cpu", torch.bfloat16), float8_products(True):
            (result,) = project(rows, linear)
        result.float().square().sum().backward()
        found.append((result.detach(), linear.weight.grad.clone()))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_is_in_float8_too(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    found = curve(name, tmp_path / "compiled", "float8", compile="on")
    torch.testing.assert_close(found, curve(name, tmp_path / "plain", "float8"), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"adapter": {"rank": 2}}, "`precision: float8` and `adapter` exclude each other"),
        ({"qat": "int8"}, "`precision: float8` and `qat` exclude each other"),
        ({"parallel": {"tensor": 2}}, "`precision: float8` does not divide matrices"),
    ],
)
def test_what_has_other_products_is_refused(settings: Any, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Training(precision="float8", **settings)


def test_a_device_without_float8_says_so_before_the_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Pretrain.model_validate({"kind": "pretrain", "data": "corpus", "precision": "float8"})
    stage.check_machine()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda place: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: "an A100")
    assert float8.refusal("cuda") == "an A100 has no float8 (an L4, H100 or newer has)"

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for float8\nand a long list of others")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    with pytest.raises(TriviumError, match="cannot be used here: no kernel for float8; say bfloat16"):
        stage.check_machine()


def test_no_share_of_a_peak_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    place = torch.device("cuda")
    assert utilisation(place, None, 1e12, 1.0) == {"memory_bytes": 5}
    assert "mfu" in utilisation(place, torch.bfloat16, 1e12, 1.0)
