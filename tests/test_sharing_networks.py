"""Machines in network and PID namespaces of their own, which share nothing but an object store behind a wire.

Where this machine does not allow namespaces, they are processes with separate disks, and a wire that is cut
is a process that is paused.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from buckets import made, new_bucket, object_store, until
from test_sharing import SCRIPT, TESTS, became
from toys import write_recipe

from trivium.kit.places import place_at
from trivium.pipeline.run import prepare, run
from trivium.pipeline.transfer import pull

pytestmark = pytest.mark.slow


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Machine:
    """A machine with its own disk (`runs`) and, where that is allowed, its own wire and process numbers."""

    runs: Path
    number: int
    wire: str = ""
    process: subprocess.Popen[str] | None = None

    @property
    def address(self) -> str:
        """Where this machine reaches the store."""
        return f"10.97.{self.number}.1" if self.wire else "127.0.0.1"

    def plug_in(self) -> None:
        """Make the wire from this machine's network to that of the store."""
        far = f"{self.wire}f"
        ip("netns", "add", self.wire)
        ip("link", "add", self.wire, "type", "veth", "peer", "name", far, "netns", self.wire)
        ip("addr", "add", f"{self.address}/24", "dev", self.wire)
        ip("link", "set", self.wire, "up")
        ip("-n", self.wire, "addr", "add", f"10.97.{self.number}.2/24", "dev", far)
        ip("-n", self.wire, "link", "set", far, "up")
        ip("-n", self.wire, "link", "set", "lo", "up")

    def unplug(self) -> None:
        """Remove the network."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        if self.wire:
            subprocess.run(["ip", "link", "del", self.wire], capture_output=True)
            subprocess.run(["ip", "netns", "del", self.wire], capture_output=True)

    def start(self, server: dict[str, str], *words: str | Path) -> None:
        """Run `trivium` there."""
        port = server["AWS_ENDPOINT_URL"].rpartition(":")[2]
        apart = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        before = ["ip", "netns", "exec", self.wire, *apart] if self.wire else []
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", SCRIPT, *map(str, words), "--runs", str(self.runs)],
            env={
                **os.environ, **server, "AWS_ENDPOINT_URL": f"http://{self.address}:{port}",
                "PYTHONPATH": str(TESTS), "TRIVIUM_LEASE_SECONDS": "3", "AWS_MAX_ATTEMPTS": "1",
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def ended(self, status: int = 0) -> str:
        """What it said until it ended with this status."""
        assert self.process is not None
        said, _ = self.process.communicate(timeout=120)
        assert self.process.returncode == status, said
        return said

    def cut(self) -> None:
        """Nothing reaches the store any more."""
        assert self.process is not None
        if self.wire:
            ip("link", "set", self.wire, "down")
        else:
            self.process.send_signal(signal.SIGSTOP)

    def mend(self) -> None:
        """All is as before."""
        assert self.process is not None
        if self.wire:
            ip("link", "set", self.wire, "up")
        else:
            self.process.send_signal(signal.SIGCONT)


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with object_store("0.0.0.0") as environment:
        yield environment


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[list[Machine]]:
    """Two machines, each on a wire of its own."""
    with ExitStack() as stack:
        machines = []
        for number in (1, 2):
            name = f"t{uuid.uuid4().hex[:8]}" if shutil.which("ip") and os.geteuid() == 0 else ""
            machine = Machine(tmp_path / f"disk-{number}" / "runs", number, name)
            stack.callback(machine.unplug)
            if name:
                try:
                    machine.plug_in()
                except subprocess.CalledProcessError:
                    machine.wire = ""
            machines.append(machine)
        yield machines


@pytest.fixture
def bucket(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    return new_bucket(server, monkeypatch)


def test_two_machines_make_every_stage_once_and_end_as_one(tmp_path, lab, server, bucket):
    path = write_recipe(tmp_path)
    for machine in lab:
        machine.start(server, "run", path, "--store", bucket)
    said = [machine.ended() for machine in lab]
    for stage in ("words", "base", "left", "right"):
        assert sum(f"{stage}: toy_" in one for one in said) == 1, said
    run(path, tmp_path / "alone")
    assert made(lab[0].runs, "toy") == made(lab[1].runs, "toy") == made(tmp_path / "alone", "toy")


def test_a_machine_that_loses_its_power_is_waited_for_as_long_as_its_lease(tmp_path, lab, server, bucket):
    path, gate = write_recipe(tmp_path), tmp_path / "gate"
    dead, heir = lab
    words = ("run", path, "--store", bucket, "--only", "base", "--set", f"base.gate={gate}")
    dead.start(server, *words)
    folder = f"results/{prepare(path, tmp_path / 'look').nodes['base'].fingerprint}"
    place = place_at(bucket)
    until(lambda: "LEASE.1" in place.names(folder), 150)
    dead.process.kill()
    dead.process.communicate()
    gate.touch()
    heir.start(server, *words)
    said = heir.ended()
    # Its process numbers mean nothing here, so only the lease tells that it is gone.
    assert "waiting for it" in said or not dead.wire, said
    assert "base: toy_train" in said
    assert place.names(folder) == ["COMPLETE"]


def test_a_machine_whose_wire_is_cut_publishes_nothing_and_takes_the_others_result(
    tmp_path, lab, server, bucket
):
    path, gate = write_recipe(tmp_path), tmp_path / "gate"
    alone, heir = lab
    words = ("run", path, "--store", bucket, "--only", "base", "--set", f"base.gate={gate}")
    alone.start(server, *words)
    fingerprint = prepare(path, tmp_path / "look").nodes["base"].fingerprint
    place = place_at(bucket)
    until(lambda: "LEASE.1" in place.names(f"results/{fingerprint}"), 150)
    alone.cut()
    gate.touch()
    heir.start(server, *words)
    assert "base: toy_train" in heir.ended()
    published = place.read(f"results/{fingerprint}/COMPLETE")
    if alone.wire:
        assert "cannot be used" in alone.ended(2)
        alone.mend()
        alone.start(server, *words)
    else:
        alone.mend()
    assert "pulled from s3://" in alone.ended()
    assert place.read(f"results/{fingerprint}/COMPLETE") == published
    assert made(alone.runs, "toy") == made(heir.runs, "toy")
    assert became(pull(path, bucket, tmp_path / "third", only=["base"]))["base"] == "pulled"
