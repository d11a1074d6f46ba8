"""Peers in an environment of their own, each run by a worker process that trains only when it is its turn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
PEER_ENVIRONMENTS = Path(os.environ.get("TRIVIUM_PEERS", HERE.parent / ".venv-peers"))


def peer_python(*packages: str) -> str:
    """The interpreter of an environment that holds these peers and no others, made where it is missing.

    Peers disagree about versions of the libraries they share, so each set of them lives by itself.
    """
    environment = PEER_ENVIRONMENTS / "-".join(packages)
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        install = [str(python), "-m", "pip", "install", "-q", "torch>=2.9,<2.14", "numpy", *packages]
        if subprocess.run(install).returncode:
            shutil.rmtree(environment)
            raise SystemExit(f"the peers {', '.join(packages)} could not be installed")
    return str(python)


class Worker:
    """A process that answers one JSON line for each JSON line it is sent, so that peers can take turns."""

    def __init__(self, python: str, script: str, arguments: dict) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.get("threads", os.cpu_count()))}
        self.process = subprocess.Popen(
            [python, str(HERE / script), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ready = self.read()

    def read(self) -> dict:
        """The worker's next answer; anything it prints that is not an answer is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"a benchmark worker ended early: {self.process.args}")

    def ask(self, **request: object) -> dict:
        """Send one request and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        """End the worker."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def best_batch(sizes: Sequence[int], start: Callable[[int], Worker], speed: str, **request: object) -> int:
    """The size at which a contestant is fastest, so that no peer runs at its worst."""
    speeds = {}
    for size in sizes:
        worker = start(size)
        speeds[size] = worker.ask(**request)[speed]
        worker.close()
    return max(speeds, key=lambda size: speeds[size])


def take_turns(workers: dict[str, Worker], rounds: int, **request: object) -> dict[str, list[dict]]:
    """Let every worker do the same piece of work in turn, `rounds` times, and collect what each answered."""
    answers: dict[str, list[dict]] = {name: [] for name in workers}
    for turn in range(rounds):
        order: Sequence[str] = list(workers) if turn % 2 == 0 else list(reversed(workers))
        for name in order:
            answers[name].append(workers[name].ask(**request))
    return answers
