"""A look at every machine before work: products, memory and messages, one line each, a slow one named."""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from trivium.kit import machine, processes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SECONDS = 0.3
"""For each of the two measurements of a process; all processes measure at the same time."""
SLOW = 1.25
"""A machine that takes so many times the median is named."""
MESSAGE = {"cpu": 2**22, "cuda": 2**26}
"""Numbers of four bytes in a message that all processes add up."""
ROUNDS = 5


@dataclass(frozen=True)
class NodeSpeed:
    """What one machine reaches: its slowest process counts, since all wait for it."""

    node: str
    processes: int
    device: str
    matmul: float
    """FLOP/s of matrix products in the type that will be used."""
    memory: float
    """Bytes/s of a copy that no cache can hold."""
    messages: float | None
    """Bytes/s of an all-reduce among the processes of this machine; None where there is one."""
    slowest: int
    """The rank that reaches the fewest FLOP/s."""

    def __str__(self) -> str:
        inside = "" if self.messages is None else f", all-reduce inside {_giga(self.messages)}B/s"
        return (
            f"{self.node}: {self.processes} x {self.device}, matmul {_giga(self.matmul)}FLOP/s, "
            f"memory {_giga(self.memory)}B/s{inside}"
        )


@dataclass(frozen=True)
class NodeCheck:
    """What the machines of a run reach, and which of them is slow."""

    nodes: tuple[NodeSpeed, ...]
    messages: float | None
    """Bytes/s of an all-reduce among all processes; None in a world of one."""

    def lines(self) -> list[str]:
        """One line for each machine, one for all together, and one for each that is slow."""
        found = [str(node) for node in self.nodes]
        if self.messages is not None:
            count = sum(node.processes for node in self.nodes)
            found.append(f"all-reduce among all {count} processes: {_giga(self.messages)}B/s")
        return found + slow(self.nodes)


def _giga(value: float) -> str:
    """Billions, as figures of machines are written; a unit is to follow."""
    return f"{value / 1e9:.0f} G" if value >= 1e11 else f"{value / 1e9:.3g} G"


def slow(nodes: Sequence[NodeSpeed]) -> list[str]:
    """A sentence for each machine that is far below the median in something."""
    found = []
    for what, unit in (("matmul", "FLOP/s"), ("memory", "B/s"), ("messages", "B/s")):
        speeds = {node: speed for node in nodes if (speed := getattr(node, what)) is not None}
        if len(speeds) < 2:
            continue
        median = statistics.median_high(speeds.values())
        for node, speed in speeds.items():
            if speed * SLOW <= median:
                name = {"matmul": f"matmul (rank {node.slowest})", "messages": "all-reduce"}.get(what, what)
                found.append(
                    f"{node.node} is slow: {name} {_giga(speed)}{unit}, {median / speed:.1f} times slower "
                    f"than the median, {_giga(median)}{unit}; leave that machine out if it stays so."
                )
    return found


def check_nodes(seconds: float = SECONDS) -> NodeCheck | None:
    """Measure all processes of this run together; the result in the first one, None in the others."""
    here = processes.start()
    node = f"node {os.environ.get('GROUP_RANK', '0')} ({socket.gethostname()})"
    mine: dict[str, Any] = {"rank": here.rank, "node": node, "device": machine.describe().device_name}
    everyone = processes.everyone(mine)
    processes.barrier()
    mine |= {"matmul": machine.matmul_peak(seconds), "memory": machine.memory_bandwidth(seconds)}
    mine["messages"] = _all_reduce_of_nodes(everyone, here.rank)
    everyone = processes.everyone(mine)
    together = _all_reduce(None, here.size)
    if not here.leads:
        return None
    names = dict.fromkeys(one["node"] for one in everyone)
    return NodeCheck(tuple(_node(name, everyone) for name in names), together)


def _node(name: str, everyone: Sequence[Mapping[str, Any]]) -> NodeSpeed:
    members = [one for one in everyone if one["node"] == name]
    slowest = min(members, key=lambda one: one["matmul"])
    return NodeSpeed(
        name, len(members), slowest["device"], slowest["matmul"], min(one["memory"] for one in members),
        members[0]["messages"], slowest["rank"],
    )  # fmt: skip


def _all_reduce_of_nodes(everyone: Sequence[Mapping[str, Any]], rank: int) -> float | None:
    """Bytes/s among the processes of this one's machine; all processes make all groups."""
    if len(everyone) == 1:
        return None
    import torch.distributed as distributed

    found = None
    for name in dict.fromkeys(one["node"] for one in everyone):
        members = [one["rank"] for one in everyone if one["node"] == name]
        group = distributed.new_group(members)
        if rank in members:
            found = _all_reduce(group, len(members))
            distributed.destroy_process_group(group)
    return found


def _all_reduce(group: ProcessGroup | None, size: int) -> float | None:
    """Bytes/s that go through each process in an all-reduce, the best of a few."""
    if size == 1:
        return None
    import torch.distributed as distributed

    device = machine.device()
    message = torch.ones(MESSAGE[machine.device_class()], device=device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    best = float("inf")
    for _ in range(ROUNDS):
        distributed.barrier(group)
        start = time.perf_counter()
        distributed.all_reduce(message, group=group)
        wait()
        best = min(best, time.perf_counter() - start)
    # Every number is sent on size - 1 times while it is added up, and as often when the sum is told.
    return 2 * (size - 1) / size * message.numel() * message.element_size() / best
