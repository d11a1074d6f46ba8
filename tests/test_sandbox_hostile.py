"""Programs that try to get out, to get through, or to take the machine down; none may do any of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attack.sandbox import TESTED

from trivium.grade.code import CodeScorer
from trivium.grade.sandbox.client import Limits, sandbox

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the isolation is Linux's")
FOLDER = Path(__file__).parent / "grade" / "hostile"
CANARY = "trivium-canary-7c1"

# Tests whose every assert a liar would like to satisfy without computing anything.
TESTS = TESTED
SCORER = CodeScorer(seconds=1.0, memory=256 << 20)


def programs() -> dict[str, str]:
    found: dict[str, str] = {}
    for part in (FOLDER / "programs.py.txt").read_text().split("### ")[1:]:
        name, _, source = part.partition("\n")
        found[name.strip()] = source
    return found


PROGRAMS = programs()


def processes() -> set[str]:
    """The processes of this machine that carry the canary in their command line or are called by it."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if CANARY in (entry / "cmdline").read_text() + (entry / "comm").read_text():
                    found.add(entry.name)
            except OSError:
                continue
    return found


def test_there_are_at_least_sixty() -> None:
    assert len(PROGRAMS) >= 60


@pytest.mark.parametrize("name", sorted(PROGRAMS))
def test_a_hostile_program_gains_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("49")
    monkeypatch.setenv("TRIVIUM_SECRET", "49")
    program = (
        PROGRAMS[name]
        .replace("@SECRET@", str(secret))
        .replace("@PARENT@", str(os.getpid()))
        .replace("@REPOSITORY@", str(Path(__file__).parents[1]))
        .replace("@CANARY@", CANARY)
    )
    before = sorted(Path("/tmp").glob(f"*{CANARY}*")), threading.active_count()
    start = time.monotonic()
    score = SCORER.run(program, TESTS)
    assert score.value == 0.0, (name, score)
    assert time.monotonic() - start < 30
    assert (sorted(Path("/tmp").glob(f"*{CANARY}*")), threading.active_count()) == before
    assert secret.read_text() == "49"
    assert not processes()


def test_an_honest_program_passes_beside_them() -> None:
    assert SCORER.run("def f(x):\n    return x * x\n", TESTS).value == 1.0


def test_a_workers_monitor_ends_with_its_client() -> None:
    box = sandbox()
    with box.worker(Limits(seconds=60.0)) as worker:
        worker.send({"role": "script", "program": ""})
    own = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    kept = [process for process in own if _parent(process) == box.process.pid]
    deadline = time.monotonic() + 5
    while kept and time.monotonic() < deadline:
        time.sleep(0.02)
        kept = [process for process in kept if _parent(process) == box.process.pid]
    assert not kept


def test_nothing_outlives_a_grader_that_is_killed(tmp_path: Path) -> None:
    grader = tmp_path / "grader.py"
    grader.write_text(
        "import sys\n"
        "from trivium.grade.sandbox.client import Limits, Sandbox\n"
        "box = Sandbox()\n"
        "with box.worker(Limits(seconds=600.0, cpu=600), 0, 1) as worker:\n"
        "    worker.send({'role': 'script', 'program': 'while True: pass'})\n"
        "    print(box.process.pid, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(grader)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert process.stdout is not None
    family = {int(process.stdout.readline())}
    deadline = time.monotonic() + 10
    while len(family) < 3 and time.monotonic() < deadline:
        family |= {
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _parent(int(entry.name)) in family
        }
    assert len(family) >= 3
    process.kill()
    process.communicate()
    while any(_alive(one) for one in family) and time.monotonic() < deadline + 10:
        time.sleep(0.02)
    assert not any(_alive(one) for one in family)


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def test_a_dead_supervisor_is_replaced() -> None:
    first = sandbox()
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    assert CodeScorer().run("def f(x):\n    return x * x\n", TESTS).value == 1.0
    assert sandbox() is not first
