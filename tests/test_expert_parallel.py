"""Each process holds some of a mixture's experts: what is learned is what one process learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small import SmallBatches, small_model, small_trainer
from test_parallel import meet, run_until, together
from test_tensor_parallel import assert_the_same, keep_end

from trivium.kit import processes
from trivium.kit.files import load_tensors, save_tensors, write_json
from trivium.learn.expert_parallel import HeldExperts
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
    changes: dict[str, Any], shape: dict[str, Any], objective: Any = None,
) -> None:  # fmt: skip
    """Train, to the end or until so many steps are done; the first process writes weights and moments."""
    meet(rank, size, port)
    trainer = small_trainer(
        Path(folder), model=small_model(**(shape or MIXTURE)), batches=SmallBatches(4, 3), parallel=parallel,
        objective=objective and objective(),
        **{"micro_batch": 1, "checkpoint": {"every_steps": 100}, **changes},
    )  # fmt: skip
    if run_until(trainer, cut):
        experts = [name for name in trainer.named if ".experts." in name]
        rows = [getattr(trainer.named[name], "to_local", lambda: None)() for name in experts]
        held = {"names": experts, "rows": sum(len(one) for one in rows if one is not None)}
        write_json(Path(folder) / f"held-{rank}.json", held)
        keep_end(trainer, Path(folder))
    processes.stop()


def compare(folder: Path, size: int, parallel: dict[str, Any], *arguments: Any) -> None:
    together(leg, 1, str(folder / "one"), {}, None, *arguments)
    together(leg, size, str(folder / "many"), parallel, None, *arguments)
    assert_the_same(folder / "one", folder / "many")


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
    ],
    ids=str,
)
def test_it_learns_what_one_process_learns(
    tmp_path: Path, size: int, parallel: dict[str, Any], changes: dict[str, Any], shape: dict[str, Any]
) -> None:
    compare(tmp_path, size, {"shard": 1, **parallel}, changes, shape)
