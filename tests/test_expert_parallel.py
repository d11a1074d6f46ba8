"""Each process holds some of a mixture's experts: what is learned is what one process learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small import small_model
from test_parallel import meet, together

from trivium.kit import processes
from trivium.kit.files import load_tensors, save_tensors
from trivium.learn.expert_parallel import HeldExperts
from trivium.model.config import ExpertsConfig
from trivium.model.experts import Mixture

pytestmark = pytest.mark.slow


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
