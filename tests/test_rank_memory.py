"""One of several processes has no memory for a pass: all go on alike, or all end with a sentence."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

# Here, so that processes that are forked need not import them anew.
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor.parallel
from ports import free_port
from small import SmallBatches, small_model, small_trainer
from test_parallel import losses, meet

from trivium.kit import processes
from trivium.kit.errors import TriviumError
from trivium.learn.objective import Loss
from trivium.learn.objectives.next_token import NextToken

pytestmark = pytest.mark.slow


class Tight(NextToken):
    """Has no memory for more than so many tokens of the second step's passes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.calls = most, 0

    def loss(self, model: Any, batch: Any) -> Loss:
        self.calls += 1
        if len(batch.tokens) > self.most and self.calls > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(model, batch)


def train(rank: int, size: int, port: int, folder: str, parallel: dict[str, Any]) -> None:
    """Train; the second process soon has little memory. What it came to stands in a file."""
    meet(rank, size, port)
    # With a whole copy a row fits, and the two of a step do not.
    most = 45 if parallel == {"shard": 1} else 0
    objective = Tight(most) if rank == size - 1 else NextToken()
    try:
        trainer = small_trainer(
            Path(folder), model=small_model(), batches=SmallBatches(4, 4), objective=objective,
            parallel=parallel, micro_batch=100_000,
        )  # fmt: skip
        trainer.run()
        said = f"ended with passes of {trainer.budget} tokens"
    except TriviumError as error:
        said = str(error)
    (Path(folder) / f"{rank}.txt").write_text(said)
    processes.stop()


def said_by(size: int, folder: Path, parallel: dict[str, Any]) -> list[str]:
    """What each process says in the end; none may take longer than a minute."""
    folder.mkdir(parents=True)
    port, context = free_port(), multiprocessing.get_context("fork")
    arguments = (size, port, str(folder), parallel)
    members = [context.Process(target=train, args=(rank, *arguments)) for rank in range(size)]
    for member in members:
        member.start()
    for member in members:
        member.join(60)
        assert not member.is_alive(), "it waits for ever"
    return [(folder / f"{rank}.txt").read_text() for rank in range(size)]


def test_with_whole_copies_it_takes_smaller_passes_and_learns_the_same(tmp_path: Path) -> None:
    said = said_by(2, tmp_path / "two", {"shard": 1})
    assert said[0] == "ended with passes of 100000 tokens"
    assert said[1] != said[0]
    assert said[1].startswith("ended with passes of")
    small_trainer(tmp_path / "one", model=small_model(), batches=SmallBatches(4, 4), micro_batch=100).run()
    for one, other in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("parallel", [{"shard": 2}, {"tensor": 2}, {"context": 2}, {"pipeline": 2}], ids=str)
def test_where_a_model_is_divided_all_end_with_a_sentence(tmp_path: Path, parallel: dict[str, Any]) -> None:
    said = said_by(2, tmp_path / "run", {"shard": 1, **parallel})
    assert "a pass does not fit into memory; lower `micro_batch`" in said[1]
    # The other one hears of it, or finds the first gone.
    assert "does not fit into memory" in said[0] or "lost another process" in said[0]
