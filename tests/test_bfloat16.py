"""L15: the forward pass uses the weights the optimiser wrote last, in every precision, compiled or not.

Autocast is the same mechanism on a CPU and on a GPU, and its faults are: held open over several steps, it
goes on with the weights it has rounded first. So these tests, which need no GPU, speak for one.
"""

from __future__ import annotations

import copy
import functools
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICES
from objectives import CASES, COMPILED, FAMILIES, Case, OneBatch
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of

import trivium.learn.objectives
from trivium.data.rows import collate
from trivium.kit.metrics import read_metrics
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates, orthogonalised
from trivium.learn.precision import one_pass, product_dtype, resolve_precision
from trivium.learn.trainer import Hooks, Trainer
from trivium.learn.validation import measure
from trivium.model.layers import RMSNorm

STEPS = {True: 30, False: 8}
"""For one of each way of computing, and for losses that differ only in what follows."""
BOUND = 0.1
"""How far bfloat16 may be from float32 at any step, as a share of what float32 moves in all."""


def trainer_of(case: Case, folder: Path, precision: str, steps: int, **settings: Any) -> Trainer:
    trainer = small_trainer(
        folder, model=case.model, objective=case.objective, batches=OneBatch(case.rows, steps),
        precision=precision, optimiser=case.optimiser,
        learning_rate={"from": 1.0, "decay": "constant"}, **settings,
    )  # fmt: skip
    trainer.rates = trainer.optimiser.rates = LearningRates(
        case.rate, case.rate, case.rate / 2, case.rate / 2
    )
    return trainer


def curve(name: str, folder: Path, precision: str, device: str = "cpu", **settings: Any) -> torch.Tensor:
    """What is minimised, before every step and after the last."""
    trainer = trainer_of(CASES[name](device), folder, precision, STEPS[name in FAMILIES], **settings)
    objective, model = trainer.objective, trainer.model
    seen: list[float] = []
    learn = objective.loss

    def noted(*arguments: Any) -> Any:
        result = learn(*arguments)
        seen.append(float(result.sum.detach()) / objective.weight(trainer.batches.batch))
        return result

    objective.loss = noted
    trainer.run()
    torch.manual_seed(0)
    with torch.no_grad(), one_pass(precision, model.device):
        objective.loss(model, collate(trainer.batches.batch, model.device))
    return torch.tensor(seen)


def assert_follows(rounded: torch.Tensor, exact: torch.Tensor) -> None:
    moved = exact.max() - exact.min()
    assert moved > 0.02 * exact[0].abs(), "a curve that does not move shows nothing"
    assert (rounded - exact).abs().max() < BOUND * moved


@pytest.mark.quick_cases(5)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_training_in_bfloat16_follows_float32(tmp_path: Path, name: str, device: str) -> None:
    assert_follows(
        curve(name, tmp_path / "rounded", "bfloat16", device), curve(name, tmp_path / "exact", "float32")
    )


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_training_in_bfloat16_follows_float32(
    tmp_path: Path, name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph capture and differentiation as `compile: on` has them; the kernels are torch's own."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    rounded = curve(name, tmp_path / "rounded", "bfloat16", device, compile="on")
    assert_follows(rounded, curve(name, tmp_path / "exact", "float32"))


class Rechecked:
    """An objective that computes every loss a second time, with copies of all weights that are brand new."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.name, self.checks = inner, inner.name, 0

    @property
    def extra(self) -> Any:
        return self.inner.extra

    def weight(self, rows: Any) -> float:
        return self.inner.weight(rows)

    def loss(self, model: Any, batch: Any) -> Any:
        assert torch.is_autocast_enabled(model.device.type)
        torch.manual_seed(self.checks)
        other_model, other = copy.deepcopy((model, self.inner))
        result = self.inner.loss(model, batch)
        torch.manual_seed(self.checks)
        again = other.loss(other_model, batch).sum
        if model.device.type == "cpu":
            assert torch.equal(result.sum, again)
        else:
            # Sums may be in another order each time; first weights would be much further away.
            torch.testing.assert_close(result.sum, again, atol=1e-4, rtol=1e-4)
        self.checks += 1
        return result


@pytest.mark.quick_cases(6)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_a_pass_uses_the_weights_the_optimiser_wrote_last(tmp_path: Path, name: str, device: str) -> None:
    case = CASES[name](device)
    case = case._replace(objective=Rechecked(case.objective))
    trainer_of(case, tmp_path, "bfloat16", steps=3).run()
    assert case.objective.checks == 3


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_stream_between_layers_has_16_bits_and_gradients_have_32(recompute: Any) -> None:
    model = small_model()
    model.recompute = recompute
    seen: list[torch.dtype] = []
    for layer in model.layers:
        layer.register_forward_hook(
            lambda module, inputs, output: seen.extend([inputs[0].dtype, output.dtype])
        )
    with one_pass("bfloat16", model.device):
        NextToken().loss(model, collate(SmallBatches().rows(0))).sum.backward()
    assert set(seen) == {torch.bfloat16}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_norm_of_16_bits_is_rounded_once() -> None:
    norm = RMSNorm(64, 1e-6)
    with torch.no_grad():
        norm.weight.normal_()
    rows = torch.randn(50, 64).bfloat16()
    wide = rows.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert (norm(rows) == exact.bfloat16()).double().mean() > 0.99


class Watched(SmallBatches):
    """A feed that computes with the model, as rollouts do."""

    model: Any = None

    def rows(self, step: int) -> Any:
        assert not torch.is_autocast_enabled("cpu"), "a batch source says itself in what it computes"
        rows = super().rows(step)
        if self.model is not None:
            with one_pass("bfloat16", self.model.device), torch.no_grad():
                now, fresh = (
                    NextToken().loss(model, collate(rows)).sum
                    for model in (self.model, copy.deepcopy(self.model))
                )
            assert torch.equal(now, fresh)
        return rows


def test_between_passes_nothing_is_rounded_and_nothing_is_out_of_date(tmp_path: Path) -> None:
    """Validation, averages of the weights, samples and rollouts see the weights as they are now."""
    model, seen = small_model(), {"validate": 0, "sample": 0, "keep": 0}
    held_out = [
        row.__class__(**{**vars(row), "columns": {"bytes": row.weights * 3}})
        for row in SmallBatches().rows(77)
    ]

    def validate() -> dict[str, Any]:
        assert not torch.is_autocast_enabled("cpu")
        now = measure(model, held_out, precision="bfloat16")
        assert now == measure(copy.deepcopy(model), held_out, precision="bfloat16")
        assert now != measure(model, held_out), "validation rounds as training does"
        seen["validate"] += 1
        return {"": now}

    def noted(name: str) -> Any:
        def note(*_: Any) -> None:
            assert not torch.is_autocast_enabled("cpu")
            seen[name] += 1

        return note

    batches = Watched(steps=6)
    batches.model = model
    trainer = small_trainer(
        tmp_path, model=model, batches=batches, objective=Rechecked(NextToken()), precision="bfloat16",
        ema=0.9, hooks=Hooks(validate, noted("sample"), noted("keep")), validation={"times": 6},
        micro_batch=30, samples={"prompts": ["x"], "times": 3}, checkpoint={"at": ["4", "2"]},
    )  # fmt: skip
    step = trainer.optimiser.step

    def outside(factor: float) -> None:
        assert not torch.is_autocast_enabled("cpu"), "the optimiser computes in what it says, not in autocast"
        step(factor)

    trainer.optimiser.step = outside
    trainer.run()
    assert seen == {"validate": 6, "sample": 3, "keep": 2}
    assert trainer.objective.checks > 6, "several passes per step"


def test_every_objective_of_the_package_is_among_the_cases() -> None:
    """A new objective, or guard, is held by the law as soon as it exists."""
    kinds = set()
    for module in pkgutil.iter_modules(trivium.learn.objectives.__path__):
        found = vars(importlib.import_module(f"trivium.learn.objectives.{module.name}"))
        kinds |= {
            one
            for one in found.values()
            if isinstance(one, type) and callable(getattr(one, "loss", None)) and one.__name__ != "Algorithm"
        }
    protocols = {one for one in kinds if getattr(one, "_is_protocol", False)}
    held: set[type] = set()
    for make in CASES.values():
        objective = make("cpu").objective
        held |= {type(objective), *(type(guard) for guard in getattr(objective, "guards", ()))}
    assert kinds - protocols == held


def test_what_auto_means() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == "float32"
    assert resolve_precision("bfloat16", "cpu") == "bfloat16"
    assert product_dtype("bfloat16", "cpu") == torch.bfloat16
    assert product_dtype("auto", "cpu") == torch.float32


def test_muon_in_bfloat16_moves_as_in_float32() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 48, 32)
    exact, rounded = orthogonalised(stack), orthogonalised(stack, torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999


def test_a_resumed_run_in_bfloat16_ends_bit_identical(tmp_path: Path) -> None:
    straight = small_trainer(tmp_path / "straight", precision="bfloat16")
    straight.run()
    cut = small_trainer(tmp_path / "cut", precision="bfloat16")
    for _ in range(3):
        cut._after_step(cut._one_step(), 0)
    cut._save(wait=True)
    again = small_trainer(tmp_path / "cut", model=small_model(seed=9), precision="bfloat16")
    again.run()
    assert_identical(weights_of(straight.model), weights_of(again.model))
    kept = [
        [(row["loss"], row["grad_norm"]) for row in read_metrics(folder / "metrics.jsonl")]
        for folder in (tmp_path / "straight", tmp_path / "cut")
    ]
    assert kept[0] == kept[1]
