"""Weights that some processes have and others have not: sent, measured and saved once."""

from pathlib import Path

import pytest
import torch
from test_parallel import meet, together
from torch import nn

from trivium.kit import processes
from trivium.kit.files import load_tensors, read_json, save_tensors, write_json
from trivium.learn import optimisers
from trivium.learn.holders import Holders
from trivium.learn.optimisers import LearningRates, Optimiser, orthogonalised
from trivium.learn.pieces import own_parts
from trivium.learn.sharding import gathered_by_first

WEIGHTS = {
    "common": torch.arange(6.0).view(2, 3), "first": torch.full((4,), 2.0), "last": torch.full((3,), 3.0),
}  # fmt: skip
HELD = [("common", "first"), ("common", "last"), ("common", "last")]
"""What each of three processes has."""


def hold(rank: int, size: int, port: int) -> None:
    """Every check that takes several processes; a failed one ends the process."""
    meet(rank, size, port)
    mine = {name: nn.Parameter(WEIGHTS[name].clone()) for name in HELD[rank]}
    holders = Holders(mine)
    assert holders.first == {"common": 0, "first": 0, "last": 1}
    assert holders.everywhere == {"common"}
    assert {name: one.tolist() for name, one in holders.whole(mine)} == {
        name: one.tolist() for name, one in WEIGHTS.items()
    }
    # A head of a stage's own, of which the model's holders know nothing, all have.
    mine["extra.score"] = nn.Parameter(torch.ones(5))
    for one in mine.values():
        one.grad = one.detach().clone()
    length = torch.cat([*(one.flatten() for one in WEIGHTS.values()), torch.ones(5)]).norm()
    assert float(holders.norm(mine)) == pytest.approx(float(length), rel=1e-6)
    moments = gathered_by_first({name: one.detach() for name, one in mine.items()})
    assert set(moments) == ({*WEIGHTS, "extra.score"} if rank == 0 else {"common", "extra.score"})
    # Each is written by one process.
    wanted = [{"common", "first", "extra.score"}, {"last"}, set()]
    assert set(own_parts({name: one.detach() for name, one in mine.items()})) == wanted[rank]
    processes.stop()


@pytest.mark.slow
def test_what_some_processes_have_is_sent_measured_and_saved_once() -> None:
    together(hold, 3)


def share(rank: int, size: int, port: int, folder: str) -> None:
    """Step with three matrices that all processes have; note how many of them this one made orthogonal."""
    meet(rank, size, port)
    made: list[int] = []

    def noted(stack: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        made.append(len(stack))
        return orthogonalised(stack, dtype)

    optimisers.orthogonalised = noted
    torch.manual_seed(0)
    named = {f"layers.{number}.mlp.up.weight": nn.Parameter(torch.randn(6, 4)) for number in range(3)}
    optimiser = Optimiser(named, LearningRates(0.1, 0.1, 0.1, 0.1), muon=True)
    for one in named.values():
        one.grad = torch.randn(6, 4)
    optimiser.step(1.0)
    save_tensors(Path(folder) / f"{rank}.safetensors", {name: one.detach() for name, one in named.items()})
    write_json(Path(folder) / f"{rank}.json", made)
    processes.stop()


@pytest.mark.slow
def test_processes_that_hold_all_weights_share_the_orthogonalising(tmp_path: Path) -> None:
    together(share, 1, str(tmp_path))
    expected = load_tensors(tmp_path / "0.safetensors")
    assert read_json(tmp_path / "0.json") == [3]
    together(share, 2, str(tmp_path))
    assert [read_json(tmp_path / f"{rank}.json") for rank in range(2)] == [[2], [1]]
    for rank in range(2):
        found = load_tensors(tmp_path / f"{rank}.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-6)
