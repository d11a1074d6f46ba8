"""Each process holds some of a mixture's experts: what is learned is what one process learns."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import objectives
import pytest
import torch
from judging import model_and_reference
from objectives import CASES, OneBatch
from small import SmallBatches, assert_identical, small_model, small_trainer
from test_parallel import losses, meet, run_until, together
from test_tensor_parallel import assert_the_same, keep_end
from torch.utils._python_dispatch import TorchDispatchMode

from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.learn.expert_parallel import HeldExperts
from trivium.learn.settings import Parallel
from trivium.learn.sharding import layout_of
from trivium.model.config import ExpertsConfig
from trivium.model.experts import Mixture

pytestmark = pytest.mark.slow
MIXTURE = {"experts": ExpertsConfig(4, 2, 16, balance=0.01)}
# Not all layers are mixtures, and a row of few tokens reaches some of the experts alone.
SPARSE = {"layers": 3, "experts": ExpertsConfig(16, 1, 48, balance=0.01, layers=(True, False, True))}


def mixture(learns: str = "") -> Mixture:
    """Four experts, two a token; the names of all that learns begin with `learns`."""
    found = small_model(experts=ExpertsConfig(4, 2, 16)).layers[0].mlp
    for name, one in found.named_parameters():
        one.requires_grad_(name.startswith(learns))
    return found


def rows_of(rank: int, unreached: bool) -> torch.Tensor:
    """Another number of rows for each process, the last one without any."""
    rows = torch.randn(7 * (3 - rank) if rank < 3 else 0, 32, generator=torch.Generator().manual_seed(rank))
    # Rows that are all alike pick the same two experts.
    return rows[:1].expand(len(rows), -1) if unreached else rows


def send_and_bring_back(rank: int, size: int, port: int, folder: str, learns: str, unreached: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    meet(rank, size, port)
    whole = mixture(learns)
    whole.experts = HeldExperts(whole.experts, init_device_mesh("cpu", (size,)))
    rows = rows_of(rank, unreached).requires_grad_(not learns)
    made = whole(rows)
    (made * torch.arange(32)).sum().backward()
    found = {"made": made.detach(), **({"rows": rows.grad} if not learns else {})}
    found |= {name: one.grad for name, one in whole.named_parameters() if one.grad is not None}
    with torch.no_grad():
        assert torch.equal(whole(rows), made)
    save_tensors(Path(folder) / f"{rank}.safetensors", found)
    processes.stop()


@pytest.mark.parametrize("learns", ["", "experts.3"])
@pytest.mark.parametrize("unreached", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_tokens_go_to_those_that_hold_their_experts(
    tmp_path: Path, size: int, unreached: bool, learns: str
) -> None:
    together(send_and_bring_back, size, str(tmp_path), learns, unreached)
    whole, each = mixture(learns), 4 // size
    found = [load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(size)]
    for rank in range(size):
        rows = rows_of(rank, unreached).requires_grad_(not learns)
        made = whole(rows)
        (made * torch.arange(32)).sum().backward()
        torch.testing.assert_close(found[rank].pop("made"), made)
        if not learns:
            torch.testing.assert_close(found[rank].pop("rows"), rows.grad)
    router = [theirs.pop("router.weight") for theirs in found if not learns]
    if not learns:
        torch.testing.assert_close(sum(router), whole.router.weight.grad, atol=1e-4, rtol=1e-5)
    for name, one in whole.named_parameters():
        if (not learns and name != "router.weight") or (one.grad is not None and learns):
            # Its holder has the gradient of all rows.
            holder = int(name.split(".")[1]) // each
            torch.testing.assert_close(found[holder].pop(name), one.grad, atol=1e-4, rtol=1e-5, msg=name)
    assert not any(found)


def leg(
    rank: int, size: int, port: int, folder: str, parallel: dict[str, Any], cut: int | None,
    changes: dict[str, Any], shape: dict[str, Any],
) -> None:  # fmt: skip
    """Train, to the end or until so many steps are done; the first process writes weights and moments."""
    meet(rank, size, port)
    model = small_model(**(shape or MIXTURE))
    for name, one in model.named_parameters():
        one.requires_grad_(name.startswith(tuple(changes.get("train_only", [""]))))
    trainer = small_trainer(
        Path(folder), model=model, batches=SmallBatches(7, 3), parallel=parallel,
        **{"micro_batch": 1, "checkpoint": {"every_steps": 100}, **changes},
    )  # fmt: skip
    if run_until(trainer, cut):
        parameters = trainer.layout.model.named_parameters()
        held = [one for name, one in parameters if ".experts." in name]
        own = sum(getattr(one, "to_local", lambda one=one: one)().numel() for one in held)
        write_json(Path(folder) / f"held-{rank}.json", {"experts": own})
        keep_end(trainer, Path(folder))
    processes.stop()


def held_of(folder: Path) -> list[int]:
    """How many numbers of experts each process held."""
    return [read_json(path)["experts"] for path in sorted(folder.glob("held-*.json"))]


@pytest.mark.parametrize(
    ("size", "parallel", "changes", "shape"),
    [
        # Three rows for two processes, one row a pass: one of them has a pass less than the other.
        (2, {"expert": 2}, {}, {}),
        (2, {"expert": 2}, {"optimiser": "adamw", "ema": 0.5, "recompute": "full"}, {}),
        (2, {"expert": 2}, {"recompute": "selective", "weight_decay": 0.1}, {}),
        (2, {"expert": 2, "shard": 2}, {"ema": 0.5}, {}),
        (4, {"expert": 4}, {}, SPARSE),
        (4, {"expert": 2}, {}, SPARSE),
        (4, {"expert": 2, "shard": 2}, {"recompute": "full"}, {}),
        (4, {"expert": 2, "shard": 4}, {"recompute": "selective"}, {}),
        # Two groups that hold all weights, in each of which two processes share an expert.
        (8, {"expert": 2, "shard": 4}, {}, {}),
        # One process trains nothing.
        (2, {"expert": 2}, {"train_only": ["layers.1.mlp.experts.0"], "ema": 0.5}, {}),
    ],
    ids=str,
)
def test_it_learns_what_one_process_learns(
    tmp_path: Path, size: int, parallel: dict[str, Any], changes: dict[str, Any], shape: dict[str, Any]
) -> None:
    together(leg, 1, str(tmp_path / "one"), {}, None, changes, shape)
    together(leg, size, str(tmp_path / "many"), {"shard": 1, **parallel}, None, changes, shape)
    assert_the_same(tmp_path / "one", tmp_path / "many")
    divisor = max(parallel["expert"], parallel.get("shard", 1))
    assert held_of(tmp_path / "many") == [held_of(tmp_path / "one")[0] // divisor] * size


class Sent(TorchDispatchMode):
    """Counts how often something is sent to the processes of a group."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += "all_to_all_single" in str(function)
        return function(*arguments, **(options or {}))


def count_sent(rank: int, size: int, port: int, folder: str) -> None:
    meet(rank, size, port)
    found = {}
    for recompute in ("none", "selective", "full"):
        trainer = small_trainer(
            Path(folder),
            model=small_model(**MIXTURE),
            parallel={"expert": 2, "shard": 1},
            recompute=recompute,
        )
        with Sent() as sent:
            trainer._gradient(SmallBatches().rows(0))
        found[recompute] = sent.count
    write_json(Path(folder) / f"{rank}.json", found)
    processes.stop()


def test_what_was_sent_is_not_sent_again_where_it_is_kept(tmp_path: Path) -> None:
    """In each of two layers the counts, the rows and what became of them, and two gradients of rows."""
    together(count_sent, 2, str(tmp_path))
    for rank in range(2):
        assert read_json(tmp_path / f"{rank}.json") == {"none": 10, "selective": 10, "full": 16}


OBJECTIVES = [
    "next-token", "next-token-adapter", "near-predictions",
    "near-predictions-adapter-off", "preference-sigmoid", "preference-kto", "preference-orpo",
    "preference-adapter-off", "distillation-forward_kl", "distillation-mse_hidden", "policy-grpo",
    "policy-kl",
    "ppo", "ppo-critic", "reward", "process-reward", "draft-heads",
]  # fmt: skip


def each_objective(rank: int, size: int, port: int, folder: str, parallel: dict[str, Any]) -> None:
    """Train with one objective after the other, all on models with experts."""
    meet(rank, size, port)
    objectives.small_model = partial(small_model, **MIXTURE)  # type: ignore[attr-defined]
    objectives.model_and_reference = partial(model_and_reference, **MIXTURE)  # type: ignore[attr-defined]
    for name in OBJECTIVES:
        case, place = CASES[name]("cpu"), Path(folder) / name
        trainer = small_trainer(
            place, model=case.model, objective=case.objective, batches=OneBatch(case.rows, 2),
            parallel=parallel, micro_batch=1,
        )  # fmt: skip
        trainer.run()
        keep_end(trainer, place)
    processes.stop()


def test_every_objective_learns_the_same(tmp_path: Path) -> None:
    together(each_objective, 2, str(tmp_path / "many"), {"expert": 2, "shard": 1})
    together(each_objective, 1, str(tmp_path / "one"), {})
    for name in OBJECTIVES:
        assert_the_same(tmp_path / "one" / name, tmp_path / "many" / name)


def test_a_stage_goes_on_under_any_layout(tmp_path: Path) -> None:
    """One process, two that divide experts, or all weights, four that do both, and back to one."""
    experts, both = {"expert": 2, "shard": 1}, {"expert": 2, "shard": 4}
    legs = [(1, {}, 1), (2, experts, 2), (2, {"shard": 2}, 3), (2, experts, 4), (4, both, 5), (1, {}, None)]
    arguments = ({"ema": 0.5}, {})
    together(leg, 1, str(tmp_path / "one"), {}, None, *arguments)
    for size, parallel, cut in legs:
        together(leg, size, str(tmp_path / "many"), parallel, cut, *arguments)
        assert len(losses(tmp_path / "many")) == (cut or 7)
    assert_the_same(tmp_path / "one", tmp_path / "many")


def saved(rank: int, size: int, port: int, folder: str, parallel: dict[str, Any], step: int) -> None:
    """Save a state that was read, under another layout, and write its numbers."""
    meet(rank, size, port)
    trainer = small_trainer(
        Path(folder), model=small_model(**MIXTURE), batches=SmallBatches(7, 3), parallel=parallel
    )
    trainer._resume()
    assert trainer.step == step
    trainer.checkpoints.clear() if rank == 0 else None
    processes.barrier()
    trainer._save(wait=True)
    state = trainer.checkpoints.latest()
    assert state is not None
    if rank == 0:
        save_tensors(Path(folder) / f"{size}-{parallel['shard']}.safetensors", dict(state.tensors))
    processes.stop()


def test_a_saved_state_has_the_same_bits_under_every_layout(tmp_path: Path) -> None:
    together(leg, 2, str(tmp_path), {"expert": 2, "shard": 1}, 2, {}, {})
    legs = [
        (2, {"expert": 2, "shard": 1}),
        (2, {"shard": 2}),
        (4, {"expert": 2, "shard": 4}),
        (1, {"shard": 1}),
    ]
    for size, parallel in legs:
        together(saved, size, str(tmp_path), parallel, 2)
    first, *others = (
        load_tensors(tmp_path / f"{size}-{parallel['shard']}.safetensors") for size, parallel in legs
    )
    for theirs in others:
        assert_identical(first, theirs)


@pytest.mark.parametrize(
    ("wish", "shape", "said"),
    [
        ({}, {"experts": None}, "this model has none"),
        ({}, {"experts": ExpertsConfig(3, 1, 16)}, "does not divide the model's 3 experts"),
        ({"expert": 3}, {"experts": ExpertsConfig(3, 1, 16)}, "which do not divide the 4 that there are"),
        ({"shard": 8}, {}, "does not divide the 4 processes"),
    ],
    ids=str,
)
def test_what_cannot_be_divided_is_said(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, Any], shape: dict[str, Any], said: str
) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    model, parallel = small_model(**{**MIXTURE, **shape}), Parallel(**{"shard": 1, "expert": 2, **wish})
    with pytest.raises(TriviumError, match=said):
        layout_of(model, parallel, has_extra=False, reshapes=False, say=print)


def test_a_pull_towards_the_parent_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(TriviumError, match=r"near_parent.weights`; leave `parallel.expert` out"):
        layout_of(
            small_model(**MIXTURE), Parallel(shard=1, expert=2), has_extra=False, reshapes=False, pulls=True,
            say=print,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"expert": 2, "tensor": 2}, "`tensor` and `expert` exclude each other"),
        ({"expert": 2, "context": 2}, "`context` and `expert` exclude each other"),
        ({"expert": 4, "shard": 2}, "`shard` is 2, neither 1 nor a multiple of `expert`, 4"),
    ],
)
def test_degrees_that_do_not_go_together_are_refused(wish: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Parallel(**wish)
    assert Parallel(expert=2, shard=4).described() == "shard 4 x expert 2"


def test_in_one_process_nothing_is_divided() -> None:
    layout = layout_of(small_model(), Parallel(expert=2), has_extra=False, reshapes=False, say=print)
    assert not layout.divided
