"""What runs the attacks and the fuzzing sees every failure, also one that takes its process with it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from attack import frame as attacks
from fuzz import frame as fuzzing
from hypothesis import strategies as st

from trivium.kit.errors import TriviumError

_ATTACKS = """
import os, time
from attack.frame import attack

@attack("probe")
def holds(scratch):
    (scratch / "file").write_text("x")

@attack("probe")
def breaks(scratch):
    assert not list(scratch.iterdir()), "something was left behind"
    raise AssertionError("it broke")

@attack("probe")
def ends_the_process(scratch):
    os._exit(7)

@attack("probe", seconds=0.3)
def hangs(scratch):
    time.sleep(600)

@attack("probe", "case", cases={"one": 1, "two": 2})
def case(scratch, value):
    assert value == 1
"""


def test_every_attack_has_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "probe_attacks.py").write_text(_ATTACKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    results = list(attacks.run("probe_attacks", attacks.load(["probe_attacks"])))
    assert [(result.name, bool(result.trouble)) for result in results] == [
        ("holds", False),
        ("breaks", True),
        ("ends the process", True),
        ("hangs", True),
        ("case: one", False),
        ("case: two", True),
    ]
    said = [result.trouble for result in results]
    assert "it broke" in said[1]
    assert "status 7" in said[2]
    assert "0.3 seconds" in said[3]
    assert attacks.table(results).splitlines()[1:] == ["probe        |     6 |    2 |      4",
                                                       "all          |     6 |    2 |      4"]  # fmt: skip


@pytest.mark.slow
def test_every_attack_and_target_is_known() -> None:
    """What they import is there, under the name that it has today."""
    listed = subprocess.run(
        [sys.executable, "-m", "attack", "--list"],
        cwd=attacks.TESTS,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert len(listed) > 400
    groups = {line.partition(": ")[0] for line in listed}
    assert {"stored files", "recipes", "model folders", "two writers", "power cuts", "chat template"} < groups
    assert len({target.name for target in fuzzing.load()}) > 25


@pytest.mark.slow
def test_an_attack_on_a_server_is_held() -> None:
    results = attacks.run("attack.connections", attacks.load(["attack.connections"]))
    trouble = next(results).trouble
    results.close()
    assert not trouble


def _refuse(example: int) -> None:
    raise TriviumError("no")


def _fail(example: int) -> None:
    assert example < 100


def _sleep(example: int) -> None:
    time.sleep(600)


def _take(example: int) -> None:
    # More than the process that runs all tests can have kept of what it freed.
    assert bytearray(1 << 33)


def _end(example: int) -> None:
    os._exit(7)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("function", "trouble"),
    [
        (_refuse, None),
        (_fail, "with 100"),
        (_sleep, "Late"),
        (_take, "MemoryError"),
        (_end, "it ended its process with "),
    ],
)
def test_every_failing_example_is_found(function, trouble: str | None, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fuzzing, "_STORED", tmp_path)
    seconds = 0.2 if function is _sleep else 60.0
    target = fuzzing.Target("probe", st.integers(0, 1000), function, (TriviumError,), seconds, 512 << 20)
    (result,) = fuzzing.run([target], 3.0, 1, 0)
    assert result.examples > 0
    assert trouble in result.trouble if trouble else not result.trouble
