"""Two hosts, each a network namespace with a torchrun of its own; the wire between them is cut for a while.

    python benchmarks/two_hosts.py WORK [--cut 3 25]

A training over both is compared, bit for bit, with one whose wire was never touched. A short cut is one that
TCP outlives; in a long one each host finds the other silent and ends its process, and a host whose torchrun
gives up starts it again, as a scheduler does. WORK is an empty folder that both hosts see. It needs root, for
the namespaces, and about two minutes for each cut.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from slurm_loopback import tiny_recipe

PORT = 29533
SILENT = 12.0
"""Seconds after which a process that says nothing counts as gone."""
GIVES_UP = 400.0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Host:
    """A network namespace, and the torchrun in it."""

    def __init__(self, number: int, work: Path) -> None:
        self.number, self.name, self.work = number, f"trivium{number}", work
        self.address = f"10.98.0.{number}"
        self.starts = 0
        self.agent: subprocess.Popen[bytes] | None = None

    def plug_in(self, wire: str) -> None:
        """Give this host its end of the wire."""
        ip("link", "set", wire, "netns", self.name)
        ip("-n", self.name, "link", "set", wire, "name", "wire")
        ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "wire")
        self.connect(True)
        ip("-n", self.name, "link", "set", "lo", "up")

    def connect(self, on: bool) -> None:
        """Plug the wire in, or out."""
        ip("-n", self.name, "link", "set", "wire", "up" if on else "down")

    def start(self, runs: Path) -> None:
        """Run torchrun with one process; a host has to name the interface that others reach."""
        self.starts += 1
        log = (self.work / f"{runs.name}-host{self.number}.log").open("ab")
        self.agent = subprocess.Popen(
            [
                "ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run",
                "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5", "--rdzv-backend", "c10d",
                "--rdzv-id", "two", "--rdzv-endpoint", f"10.98.0.1:{PORT}", "--local-addr", self.address,
                "--rdzv-conf", f"is_host={int(self.number == 1)}",
                "-m", "trivium.cli", "run", str(self.work / "tiny.yaml"), "--runs", str(runs),
            ],
            stdout=log, stderr=log,
            env={
                **os.environ, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1",
                "TRIVIUM_SILENT_SECONDS": str(SILENT), "TRIVIUM_LOGS": str(self.work / "logs"),
            },
        )  # fmt: skip

    def status(self) -> int | None:
        """The exit status of torchrun, once it has ended."""
        return None if self.agent is None else self.agent.poll()


def trained(runs: Path) -> int:
    """How many steps were written so far."""
    found = list(runs.glob("tiny/base/metrics.jsonl"))
    return found[0].read_bytes().count(b'"step"') if found else 0


def run(hosts: list[Host], runs: Path, cut: float | None) -> dict[str, float]:
    """Train to the end; with `cut` the wire is out for so many seconds once some steps are made."""
    began, found = time.monotonic(), {}
    for host in hosts:
        host.starts = 0
        host.start(runs)
    pulled = False
    while any(host.status() != 0 for host in hosts):
        time.sleep(0.2)
        if time.monotonic() - began > GIVES_UP:
            raise SystemExit(f"not done after {GIVES_UP:.0f} s; see {hosts[0].work}/*.log")
        if cut is not None and not pulled and trained(runs) >= 50:
            hosts[1].connect(False)
            found["cut after step"] = trained(runs)
            time.sleep(cut)
            hosts[1].connect(True)
            pulled = True
        for host in hosts:
            if host.status() not in (None, 0):
                host.start(runs)
    found |= {f"starts of host {host.number}": host.starts for host in hosts}
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def weights(runs: Path) -> bytes:
    """The trained weights as they lie on the disk."""
    return next(iter((runs / "tiny" / "base").resolve().rglob("model.safetensors"))).read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--cut", type=float, nargs="*", default=[3.0, 25.0], help="seconds without the wire")
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    work = asked.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    (work / "tiny.yaml").write_text(tiny_recipe(asked.steps, every=20))
    hosts = [Host(1, work), Host(2, work)]
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ip("link", "add", "triviumw1", "type", "veth", "peer", "name", "triviumw2")
        for host in hosts:
            host.plug_in(f"triviumw{host.number}")
        print("undisturbed", run(hosts, work / "quiet", None), flush=True)
        expected = weights(work / "quiet")
        for cut in asked.cut:
            runs = work / f"cut-{cut:g}"
            told = run(hosts, runs, cut)
            print(f"cut for {cut:g} s", told, "equal:", weights(runs) == expected, flush=True)
    finally:
        for host in hosts:
            if host.agent is not None and host.status() is None:
                host.agent.kill()
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True)


if __name__ == "__main__":
    main()
