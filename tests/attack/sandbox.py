"""Programs that try to get out, to get through, or to take the machine down, in the strongest isolation."""

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

from attack.frame import TESTS, attack, refusal, sections
from trivium.grade.code import CodeScorer, Exam
from trivium.grade.sandbox import client, probe
from trivium.grade.sandbox.client import Sandbox

TESTED = Exam(
    sources=(
        "def check(candidate):\n"
        "    assert candidate(3) == 9\n"
        "    assert candidate(7) == 49\n"
        "    assert candidate(-12) == 144\n"
        "    assert type(candidate(2)) is int\n",
    ),
    entry_point="f",
)
CANARY = "trivium-attack-canary"
BAIT = dict.fromkeys(("file", "other", "folder", "link", "socket", "abstract"), "/x") | dict.fromkeys(
    ("process", "tcp", "udp", "memory"), 0
)
ATTEMPTS = {f"{group}: {name}": (group, name) for group, name, _ in probe.attempts(BAIT)}


def run_hostile(scratch: Path, source: str) -> None:
    """No program that only attacks gets a point, and none touches a file or a process beside its own."""
    secret = scratch / "secret.txt"
    secret.write_text("49")
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        program = source.replace("@SECRET@", str(secret)).replace("@REPOSITORY@", str(TESTS.parent))
        program = program.replace("@PARENT@", str(victim.pid)).replace("@CANARY@", CANARY)
        before = time.monotonic()
        score = CodeScorer(seconds=1.0, memory=256 << 20).run(program, TESTED)
        assert score.value == 0.0, score
        assert time.monotonic() - before < 30
        assert victim.poll() is None, "it ended another process"
    finally:
        victim.kill()
        victim.wait()
    assert secret.read_text() == "49"
    assert not list(Path("/tmp").glob(f"*{CANARY}*"))
    assert not _carrying(CANARY), "it left a process behind"


def _carrying(mark: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "comm").read_text() + (entry / "cmdline").read_text():
                    found.append(entry.name)
            except OSError:
                continue
    return found


@cache
def reached(without: frozenset[str]) -> list[tuple[str, str]]:
    """What the probe reaches in a sandbox without these layers, asked once."""
    box = Sandbox(without=without, exactly=True)
    try:
        return box.probe()
    finally:
        box.close()


@attack("sandbox", "hostile program", cases=sections("grade/hostile/programs.py.txt"))
def hostile_program(scratch: Path, source: str) -> None:
    """A hostile program in all layers."""
    run_hostile(scratch, source)


@attack("sandbox", "attempt", cases=ATTEMPTS)
def attempt(scratch: Path, name: tuple[str, str]) -> None:
    """One attempt of the probe in all layers."""
    assert name not in reached(frozenset())


@attack("sandbox", "what the attempts leave behind")
def damage(scratch: Path) -> None:
    """No bait was changed and no process of the user ended."""
    assert not [what for group, what in reached(frozenset()) if group == "damage"]


@attack("sandbox", "attempt without one layer", cases={name: name for name in ("namespaces", "landlock")})
def one_layer_down(scratch: Path, name: str) -> None:
    """Where one of the two large layers falls, the others hold everything."""
    assert not reached(frozenset({name}))


@attack("sandbox", "a kernel with", cases={f"Landlock {n} and no namespaces": n for n in (1, 2, 3, 4, 5)})
def weak_kernel(scratch: Path, landlock: int) -> None:
    """A kernel on which truncate, utime or F_SETOWN would reach the user's files and processes is refused."""
    with refusal("--unsafe-sandbox"):
        Sandbox(without={"namespaces"}, landlock=landlock).close()


@attack("sandbox", "the filter is missing")
def no_filter(scratch: Path) -> None:
    """Isolation that the probe gets through is refused."""
    with refusal("could still do this"):
        Sandbox(without={"calls"}).close()


@attack("sandbox", "the supervisor is killed")
def dead_supervisor(scratch: Path) -> None:
    """The next program has a new sandbox."""
    # Asked for once: as soon as the first one is dead, asking again starts another, whose end nothing brings.
    first = client.sandbox()
    first.process.kill()
    first.process.wait()
    assert CodeScorer().run("def f(x):\n    return x * x\n", TESTED).value == 1.0
