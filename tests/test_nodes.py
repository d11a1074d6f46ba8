"""The look at every machine before work: one line each, and a slow one is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from ports import free_port

from trivium.pipeline.nodes import NodeCheck, NodeSpeed, slow


def node(name: str, matmul: float = 1e12, memory: float = 1e11, messages: float | None = 1e10) -> NodeSpeed:
    return NodeSpeed(name, 8, "H100", matmul, memory, messages, 13)


def test_a_slow_machine_is_named_with_what_is_slow_and_how_much():
    machines = [node("node 0 (a)"), node("node 1 (b)", matmul=4e11), node("node 2 (c)", messages=5e9)]
    assert slow(machines) == [
        "node 1 (b) is slow: matmul (rank 13) 400 GFLOP/s, 2.5 times slower than the median, 1000 GFLOP/s; "
        "leave that machine out if it stays so.",
        "node 2 (c) is slow: all-reduce 5 GB/s, 2.0 times slower than the median, 10 GB/s; "
        "leave that machine out if it stays so.",
    ]
    # Of two, the faster one is the measure; what is near the median is not named.
    assert len(slow([node("a", memory=5e10), node("b")])) == 1
    assert slow([node("a", memory=9e10), node("b"), node("c", messages=None)]) == []
    check = NodeCheck((node("node 0 (a)"), node("node 1 (b)")), 2e9)
    assert check.lines() == [
        "node 0 (a): 8 x H100, matmul 1000 GFLOP/s, memory 100 GB/s, all-reduce inside 10 GB/s",
        "node 1 (b): 8 x H100, matmul 1000 GFLOP/s, memory 100 GB/s, all-reduce inside 10 GB/s",
        "all-reduce among all 16 processes: 2 GB/s",
    ]


CHECK = """
import json
from dataclasses import asdict
from trivium.pipeline.nodes import check_nodes

check = check_nodes(seconds=0.05)
print(json.dumps(None if check is None else asdict(check)))
"""


@pytest.mark.slow
def test_two_machines_are_measured_together():
    """Of two processes each is said to be on a machine of its own, as torchrun says it."""
    port = str(free_port())
    members = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": "0", "GROUP_RANK": str(rank), "WORLD_SIZE": "2"}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        members.append(
            subprocess.Popen(
                [sys.executable, "-c", CHECK], env={**os.environ, **place, **meeting},
                stdout=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    first, second = (json.loads(member.communicate(timeout=100)[0]) for member in members)
    assert second is None
    assert [one["node"].partition(" (")[0] for one in first["nodes"]] == ["node 0", "node 1"]
    assert [one["processes"] for one in first["nodes"]] == [1, 1]
    assert all(one["matmul"] > 0 and one["memory"] > 0 and one["messages"] is None for one in first["nodes"])
    assert first["messages"] > 0
