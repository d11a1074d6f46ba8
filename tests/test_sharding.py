"""Weights, gradients and moments divided among processes: the numbers are those of one process."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Scored, SmallBatches, small_model, small_trainer, weights_of
from test_parallel import losses, meet, together

from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.learn import sharding
from trivium.learn.objectives import next_token
from trivium.learn.settings import Parallel, Training
from trivium.learn.sharding import Replicas, layout_of
from trivium.model import float8
from trivium.model.config import ExpertsConfig

pytestmark = pytest.mark.slow
# Three rows for two processes, one row a pass: one of them has a pass less than the other.
STEPS, ROWS = 5, 3


def train(
    rank: int,
    size: int,
    port: int,
    folder: str,
    shard: Any,
    cut: int | None,
    changes: dict[str, Any],
    model: dict[str, Any] | None = None,
    objective: Any = None,
) -> None:
    """What each process does; with `cut` all of them stop after so many steps."""
    meet(rank, size, port)
    settings = {"micro_batch": 1, "checkpoint": {"every_steps": 2}, "parallel": {"shard": shard}, **changes}
    trainer = small_trainer(
        Path(folder),
        model=small_model(**(model or {})),
        batches=SmallBatches(STEPS, ROWS),
        objective=objective and objective(),
        **settings,
    )
    if cut is not None:
        trainer.stop_signal = 15
        trainer._agreed = lambda wish: trainer.step >= cut and wish  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
        processes.stop()
        return
    trainer.run()
    moments = trainer.moments()
    if model is None:
        local = getattr(
            trainer.named["layers.0.mlp.up.weight"], "to_local", lambda: trainer.model.layers[0].mlp.up.weight
        )()
        write_json(Path(folder) / f"held-{rank}.json", {"rows": local.shape[0]})
    if rank == 0:
        own = {} if trainer.objective.extra is None else weights_of(trainer.objective.extra)
        save_tensors(Path(folder) / "end.safetensors", {**weights_of(trainer.model), **own})
        save_tensors(Path(folder) / "moments.safetensors", moments)
    processes.stop()


def assert_the_same(one: Path, other: Path) -> None:
    """Loss, gradient norm, tokens, updated weights and moments, within rounding."""
    for mine, theirs in zip(losses(one), losses(other), strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5, abs=1e-6)
    for file in ("end.safetensors", "moments.safetensors"):
        expected, found = load_tensors(one / file), load_tensors(other / file)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=f"{file} {name}")


@pytest.mark.parametrize(
    ("size", "shard", "changes"),
    [
        (2, "all", {"optimiser": "muon"}),
        (2, "all", {"optimiser": "muon", "ema": 0.5, "recompute": "full"}),
        # Two groups of two: divided inside of a group, summed over both.
        (4, 2, {"optimiser": "muon", "weight_decay": 0.1}),
    ],
    ids=str,
)
def test_sharded_it_learns_what_one_process_learns(
    tmp_path: Path, size: int, shard: Any, changes: dict[str, Any]
) -> None:
    together(train, 1, str(tmp_path / "one"), 1, None, changes)
    together(train, size, str(tmp_path / "many"), shard, None, changes)
    assert_the_same(tmp_path / "one", tmp_path / "many")
    whole = small_model().layers[0].mlp.up.weight.shape[0]
    held = [read_json(tmp_path / "many" / f"held-{rank}.json")["rows"] for rank in range(size)]
    assert held == [whole // 2] * size
    assert read_json(tmp_path / "one" / "held-0.json")["rows"] == whole


def train_compiled(*arguments: Any) -> None:
    """With graph capture and differentiation as `compile: on` has them; the kernels are torch's own."""
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    train(*arguments)
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"], "something was compiled"
    assert frames["ok"] == frames["total"]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_it_learns_the_same(tmp_path: Path, recompute: Any) -> None:
    together(train, 1, str(tmp_path / "one"), 1, None, {"ema": 0.5})
    changes = {"ema": 0.5, "compile": "on", "recompute": recompute}
    together(train_compiled, 2, str(tmp_path / "many"), "all", None, changes)
    assert_the_same(tmp_path / "one", tmp_path / "many")


def counted_float8(*arguments: Any) -> None:
    """A training whose products in float8 are counted."""
    found, compute = [], float8.product

    def product(*arguments: Any, **options: Any) -> torch.Tensor:
        found.append(arguments)
        return compute(*arguments, **options)

    float8.product = product
    train(*arguments)
    # Two passes of fourteen matrices; forward, again for the backward pass, and two gradients.
    assert len(found) == STEPS * 2 * 4 * 14, len(found)


def test_float8_learns_the_same_where_weights_are_divided(tmp_path: Path) -> None:
    """Up to numbers that are rounded the other way, as sums are added in another order."""
    changes = {"precision": "float8", "recompute": "full"}
    together(train, 1, str(tmp_path / "one"), 1, None, changes)
    together(counted_float8, 2, str(tmp_path / "many"), "all", None, changes)
    one, many = losses(tmp_path / "one"), losses(tmp_path / "many")
    assert many[0] == pytest.approx(one[0], rel=1e-5)
    for (mine, *_), (theirs, *_) in zip(one, many, strict=True):
        assert theirs == pytest.approx(mine, rel=0.02)


@pytest.mark.parametrize("parallel", [{"shard": "all"}, {"tensor": 2}], ids=str)
def test_a_head_is_trained_beside_a_divided_model(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """Its running mean too; it is whole on every process, so that moments and saved states hold it once."""
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    together(train, 1, one, 1, None, {"ema": 0.5}, None, Scored)
    for cut in (3, None):
        together(train, 2, many, 1, cut, {"ema": 0.5, "parallel": parallel}, None, Scored)
    assert_the_same(tmp_path / "one", tmp_path / "many")
    assert "score.weight" in load_tensors(tmp_path / "many/end.safetensors")


def even_noise(model: Any, batch: Any, strength: float) -> torch.Tensor:
    """Of a pass alone, whichever process does it."""
    numbers = torch.arange(len(batch.tokens) * model.config.width, dtype=torch.float32)
    return strength * torch.sin(numbers).view(len(batch.tokens), -1)


def noisy() -> next_token.NextToken:
    """The objective of a process, whose noise is no longer drawn."""
    next_token.noise_for = even_noise
    return next_token.NextToken(noise=0.1)


@pytest.mark.parametrize(
    ("size", "parallel"), [(2, {"shard": 2}), (4, {"shard": 2, "pipeline": 2}), (2, {"context": 2})], ids=str
)
def test_noise_is_added_where_the_table_is_divided(
    tmp_path: Path, size: int, parallel: dict[str, Any]
) -> None:
    together(train, 1, str(tmp_path / "one"), 1, None, {}, {}, noisy)
    together(train, size, str(tmp_path / "many"), 1, None, {"parallel": parallel}, {}, noisy)
    assert_the_same(tmp_path / "one", tmp_path / "many")


def test_a_mixture_is_divided_whose_experts_not_every_process_needs(tmp_path: Path) -> None:
    """Of sixteen experts a process with a row of few tokens reaches some, and other ones than its peer."""
    model = {"experts": ExpertsConfig(16, 1, 48, balance=0.01)}
    for size, shard in ((1, 1), (2, "all")):
        together(train, size, str(tmp_path / f"{size}"), shard, None, {"optimiser": "muon"}, model)
    assert_the_same(tmp_path / "1", tmp_path / "2")


@pytest.mark.parametrize(
    ("first", "then"), [((2, "all"), (1, 1)), ((1, 1), (2, "all")), ((2, "all"), (2, 1))], ids=str
)
def test_it_goes_on_under_another_layout(
    tmp_path: Path, first: tuple[int, Any], then: tuple[int, Any]
) -> None:
    together(train, 1, str(tmp_path / "one"), 1, None, {})
    together(train, first[0], str(tmp_path / "many"), first[1], 3, {})
    assert len(losses(tmp_path / "many")) == 3
    together(train, then[0], str(tmp_path / "many"), then[1], None, {})
    assert_the_same(tmp_path / "one", tmp_path / "many")


def laid_out(wish: Parallel, *, has_extra: bool = False, reshapes: bool = False) -> tuple[Any, list[str]]:
    """The layout of a small model, and what is said of it."""
    said: list[str] = []
    found = layout_of(small_model(), wish, has_extra=has_extra, reshapes=reshapes, say=said.append)
    return found, said


@pytest.mark.parametrize("shard", ["all", "auto", 8])
def test_in_one_process_nothing_is_divided(shard: Any) -> None:
    layout, said = laid_out(Parallel(shard=shard), has_extra=True, reshapes=True)
    assert isinstance(layout, Replicas)
    assert said == []


def test_what_cannot_be_divided_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    with pytest.raises(TriviumError, match=r"a head of its own; leave `parallel.context` out"):
        laid_out(Parallel(shard=1, context=2), has_extra=True)
    with pytest.raises(TriviumError, match="`grow`"):
        laid_out(Parallel(shard="all"), reshapes=True)
    with pytest.raises(TriviumError, match="does not divide the 4 processes"):
        laid_out(Parallel(shard=3))


def decide(rank: int, size: int, port: int, folder: str, free: tuple[int, int]) -> None:
    """What `auto` makes of the memory that the first of two processes has."""
    meet(rank, size, port)
    sharding.machine.free_memory = lambda: free[rank]  # type: ignore[attr-defined]
    layout, said = laid_out(Parallel())
    write_json(Path(folder) / f"{rank}.json", {"divided": layout.divided, "said": said})
    processes.stop()


@pytest.mark.parametrize(("free", "divided"), [((10**5, 10**9), True), ((10**9, 10**5), False)])
def test_auto_divides_what_would_fill_the_memory(
    tmp_path: Path, free: tuple[int, int], divided: bool
) -> None:
    """All as the first process decides, whatever the others have."""
    together(decide, 2, str(tmp_path), free)
    for rank in range(2):
        found = read_json(tmp_path / f"{rank}.json")
        assert found["divided"] == divided
        assert ("more than half of the 100kB that are free" in "".join(found["said"])) == divided


def test_other_ways_to_divide_are_refused_by_name() -> None:
    assert Training(parallel="all").parallel.shard == "all"
    assert Training(parallel={"shard": 8, "tensor": 1}).parallel.shard == 8
    with pytest.raises(ValueError, match="sequence"):
        Training(parallel={"shard": 8, "sequence": 2})
    with pytest.raises(ValueError, match="exclude each other"):
        Training(parallel={"tensor": 2, "context": 2, "pipeline": 2})
    assert Parallel(shard=8, tensor=2, context=2).described() == "shard 8 x tensor 2 x context 2"
