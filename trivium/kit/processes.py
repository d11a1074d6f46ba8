"""The processes of one run: torchrun's environment is the contract, and its absence means a world of one."""

import atexit
import faulthandler
import itertools
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trivium.kit.errors import TriviumError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import Store

Summable = TypeVar("Summable", "Tensor", float)
LOGS = "TRIVIUM_LOGS"
"""The folder of a run's logs, in which dumps are written, too."""
HOST_PATIENCE = timedelta(days=2)
"""Long, because all wait while the first process tokenises; torchrun ends them if one dies."""
DEVICE, DEVICE_SECONDS = "TRIVIUM_NCCL_SECONDS", 900.0
"""Short, because GPUs talk only inside of a step, which all processes begin together."""
RECORDED = 2000
"""Collectives that the flight recorder keeps."""
_counters = itertools.count()


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
            # Of a process that SIGSEGV ends, the others only see that it is gone.
            faulthandler.enable()
            record_collectives()
            # Both, because what the trainer sums lies on the GPU and what the pipeline tells lies in memory.
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            distributed.init_process_group(
                backend,
                timeout=HOST_PATIENCE,
                store=_store_of_attempt(),
                rank=here.rank,
                world_size=here.size,
            )
            if torch.cuda.is_available():
                patience = timedelta(seconds=seconds_of(DEVICE, DEVICE_SECONDS))
                group = distributed.distributed_c10d._get_default_group()
                group._get_backend(torch.device("cuda"))._set_default_timeout(patience)
            # Gloo's threads may hold a tensor to the end. Freed while the interpreter is taken down, it
            # aborts a process that has done all its work (pytorch#179291), so the group goes first.
            atexit.register(stop)
    return here


def attempt() -> str:
    """How often torchrun has started the processes again, as part of a key."""
    return f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _store_of_attempt() -> "Store | None":
    """Torchrun's key-value store with keys of this attempt alone; without torchrun's, None.

    One store serves all attempts. Under the same keys a process would find where those of the attempt before
    listened, and be refused there.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import PrefixStore, TCPStore

    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return PrefixStore(attempt(), TCPStore(*place, is_master=False, timeout=timedelta(minutes=15)))


def record_collectives() -> None:
    """Have torch's flight recorder keep the last collectives, and NCCL dump them where one times out."""
    import torch

    here = flight_recorder() / "nccl-rank-"
    with suppress(OSError):
        here.parent.mkdir(parents=True, exist_ok=True)
    major, minor = (int(number) for number in torch.__version__.split(".")[:2])
    size, file = (
        ("TORCH_FR_BUFFER_SIZE", "TORCH_FR_DUMP_TEMP_FILE")
        if (major, minor) >= (2, 10)
        else ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    )
    wished = {size: str(RECORDED), file: str(here), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
    for name, value in wished.items():
        os.environ.setdefault(name, value)


def flight_recorder() -> Path:
    """The folder for what processes know of their last collectives."""
    logs = os.environ.get(LOGS) or Path(tempfile.gettempdir()) / "trivium-logs"
    return Path(logs) / "flight-recorder"


def seconds_of(variable: str, otherwise: float) -> float:
    """A number of seconds from the environment."""
    written = os.environ.get(variable, "")
    if not written:
        return otherwise
    try:
        found = float(written)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise TriviumError(f"{variable}={written} is no time; write seconds, such as {variable}=60.")
    return found


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


def shared_counter() -> Iterator[int]:
    """0, 1, 2 and so on, each number in one process only; all processes call this equally often."""
    name = f"counter-{next(_counters)}"
    if world().size == 1:
        return itertools.count()
    import torch.distributed as distributed

    store = distributed.distributed_c10d._get_default_store()
    return (store.add(name, 1) - 1 for _ in itertools.count())


def barrier() -> None:
    """Wait for all processes."""
    if world().size > 1:
        import torch.distributed as distributed

        distributed.barrier()
