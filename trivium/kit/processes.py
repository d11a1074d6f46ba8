"""The processes of one run: torchrun's environment is the contract, and its absence means a world of one."""

import atexit
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Summable = TypeVar("Summable", "Tensor", float)


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and which on its own machine."""

    rank: int
    size: int
    local_rank: int

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and speaks for all."""
        return self.rank == 0


def world() -> World:
    """This process's place, as torchrun says it."""
    environment = os.environ
    return World(
        rank=int(environment.get("RANK", 0)),
        size=int(environment.get("WORLD_SIZE", 1)),
        local_rank=int(environment.get("LOCAL_RANK", 0)),
    )


def start() -> World:
    """Meet the other processes; nothing happens in a world of one."""
    here = world()
    if here.size > 1:
        import torch
        import torch.distributed as distributed

        if not distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(here.local_rank)
            # Both, because what the trainer sums lies on the GPU and what the pipeline tells lies in memory.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            # Long, because all wait while the first one tokenises; torchrun ends them if one dies.
            distributed.init_process_group(backend, timeout=timedelta(days=2))
            # Gloo's threads may hold a tensor to the end. Freed while the interpreter is taken down, it
            # aborts a process that has done all its work (pytorch#179291), so the group goes first.
            atexit.register(stop)
    return here


def stop() -> None:
    """Leave the other processes in good order."""
    if world().size > 1:
        import torch.distributed as distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def all_reduce_sum(value: Summable) -> Summable:
    """The sum over all processes: a tensor is summed in place, a float comes back as a float."""
    if world().size == 1:
        return value
    import torch
    import torch.distributed as distributed

    if isinstance(value, torch.Tensor):
        distributed.all_reduce(value)
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(tensor)
    return tensor.item()


def largest_of_all(value: float) -> float:
    """The largest of what the processes say."""
    if world().size == 1:
        return value
    import torch
    import torch.distributed as distributed

    tensor = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return tensor.item()


def broadcast(value: Any) -> Any:
    """What the first process says, in every process."""
    if world().size == 1:
        return value
    import torch.distributed as distributed

    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def everyone(value: Any) -> list[Any]:
    """What each process says, in the order of their ranks, in every process."""
    here = world()
    if here.size == 1:
        return [value]
    import torch.distributed as distributed

    said: list[Any] = [None] * here.size
    distributed.all_gather_object(said, value)
    return said


def barrier() -> None:
    """Wait for all processes."""
    if world().size > 1:
        import torch.distributed as distributed

        distributed.barrier()
