"""What each layer of isolation holds, alone and left out, and what happens where a kernel lacks it."""

import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest

from trivium.grade.code import CodeScorer, read_tests
from trivium.grade.sandbox import client, filesystem, imports, monitor, probe
from trivium.grade.sandbox import filter as calls
from trivium.grade.sandbox.client import Limits, Sandbox, announced, sandbox
from trivium.grade.sandbox.layers import LAYERS
from trivium.grade.sandbox.script import run_script
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_text
from trivium.pipeline.run import run
from trivium.stages.parts.stage import Product, Stage, Work

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the isolation is Linux's")
PAGE = Path(__file__).parents[1] / "docs" / "security.md"
ALONE = ("namespaces", "landlock", "calls", "limits")


def opened(without: set[str]) -> set[str]:
    """The groups of attempts of which at least one succeeds without these layers."""
    box = Sandbox(without=without, exactly=True)
    try:
        return {group for group, _ in box.probe()}
    finally:
        box.close()


def test_the_page_says_what_each_layer_holds() -> None:
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("| ") and line.split("|")[1].strip() in probe.GROUPS
    ]
    assert [row[0] for row in rows] == list(probe.GROUPS)
    measured = [opened(set(LAYERS) - {layer}) for layer in ALONE]
    measured += [opened({"namespaces"}), opened(set())]
    for group, *cells in rows:
        assert cells == ["-" if group in found else "held" for found in measured], group


def test_no_two_calls_of_a_processor_have_one_number() -> None:
    """The number of another call would let through what is not listed."""
    for numbers in calls._CALLS.values():
        assert len(set(numbers.values())) == len(numbers)


@pytest.mark.timeout(30)
def test_a_worker_that_dies_before_it_is_confined_is_waited_for_no_longer(monkeypatch) -> None:
    """Its end of the pipe is the only one, so that its death is the end of what it says."""
    monkeypatch.setattr(monitor, "_be_worker", lambda *_: os._exit(3))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        report = monitor._run(SimpleNamespace(own_files=True, without=()), theirs, [], {}, None)
    assert report == {"ended": "isolation", "why": "the worker died at once"}


def test_without_any_layer_every_group_of_attempts_succeeds() -> None:
    """Else an attempt would be refused that could never succeed, or for who owns the bait."""
    box = Sandbox(without=set(LAYERS), exactly=True)
    try:
        found = box.probe()
    finally:
        box.close()
    assert {group for group, _ in found} == {*probe.GROUPS, "damage"}
    # These once got through the filter where there was no namespace and an old Landlock.
    once = {"truncate", "utime", "stat", "a signal for every byte (F_SETOWN, F_SETSIG, O_ASYNC)"}
    assert {*once, "kill", "ending the user's processes"} <= {name for _, name in found}


@pytest.mark.parametrize("layer", ["namespaces", "landlock", "cgroup"])
def test_another_layer_stands_behind_it(layer: str) -> None:
    assert not opened({layer})


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(
    ("without", "landlock"),
    [({"namespaces"}, 1), ({"namespaces"}, 3), ({"namespaces"}, 5), ({"namespaces", "landlock"}, None)],
)
def test_a_kernel_with_less_is_refused(without: set[str], landlock: int | None) -> None:
    with pytest.raises(TriviumError, match=r"Landlock 6 .*--unsafe-sandbox") as refused:
        Sandbox(without=without, landlock=landlock)
    assert "\n" not in str(refused.value)
    box = Sandbox(without=without, landlock=landlock, unsafe=True)
    assert "UNSAFE" in box.described
    box.close()


def test_isolation_that_a_probe_gets_through_is_refused() -> None:
    # The filter is what holds fork; without it the probe finds that and no program is trusted to the rest.
    with pytest.raises(TriviumError, match=r"could still do this: .*fork.*--unsafe-sandbox"):
        Sandbox(without={"calls"})


@pytest.fixture(scope="module", params=["all", "without namespaces"])
def box(request: pytest.FixtureRequest):
    # A kernel that has Landlock 6 but refuses this, or allows namespaces but not here, fails these tests.
    found = Sandbox(without={"namespaces"} if request.param == "without namespaces" else ())
    yield found
    found.close()


def said(box: Sandbox, program: str, limits: Limits | None = None) -> str:
    printed, how = run_script(box, program, "", limits or Limits())
    assert how["code"] == 0, (printed, how)
    return printed.decode().strip()


_TRIED = "import os\ntry: print({})\nexcept OSError: print('refused')"
_NOTHING = ("refused", "[]")


def test_nothing_of_the_grader_is_in_sight(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIVIUM_SECRET", "49")
    assert not box.probe()
    assert json.loads(said(box, "import os, json; print(json.dumps(sorted(os.environ)))")) == [
        "LC_ALL",
        "PATH",
    ]
    assert said(box, _TRIED.format("[fd for fd in range(3, 64) if not os.fstat(fd)]")) == "refused"
    assert said(box, _TRIED.format("os.listdir(os.path.dirname(os.__file__) + '/site-packages')")) in _NOTHING
    name = said(box, "import os; print(os.uname().nodename)")
    assert name == ("sandbox" if "namespaces" in box.layers else os.uname().nodename)


MODULES = (
    "abc argparse array ast asyncio base64 bisect calendar cmath collections collections.abc copy csv "
    "concurrent.futures contextlib dataclasses datetime decimal difflib email.message enum fractions "
    "functools gc hashlib heapq html.parser inspect io itertools json logging math numbers operator "
    "pathlib pickle pprint queue random re secrets sqlite3 statistics string struct "
    "tempfile textwrap threading timeit tokenize traceback types "
    "typing unicodedata unittest urllib.parse uuid warnings weakref "
    "xml.etree.ElementTree zlib"
)


def test_honest_programs_have_the_standard_library(box: Sandbox) -> None:
    imports = "\n".join(f"import {name}" for name in MODULES.split())
    assert said(box, f"{imports}\nprint(json.dumps(statistics.mean([1, 2, 3])))") == "2"
    threads = "import threading\nt = threading.Thread(target=lambda: print('thread'))\nt.start()\nt.join()"
    assert said(box, threads) == "thread"


def test_a_module_whose_file_is_missing_stops_nothing(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "linked.py").symlink_to(tmp_path / "nowhere.py")
    (tmp_path / "there.py").write_text("value = 7\n")
    listed = [(name, str(tmp_path / f"{name}.py"), False) for name in ("linked", "there")]
    monkeypatch.setattr(filesystem, "modules", lambda: iter(listed))
    assert list(imports._Finder().known) == ["there"]


def test_threads_have_a_limit(box: Sandbox) -> None:
    bomb = """
import threading
threading.stack_size(32768)
stop = threading.Event()
count = 0
while count < 20000:
    try: threading.Thread(target=stop.wait, daemon=True).start()
    except RuntimeError: break
    count += 1
print(count, flush=True)
stop.set()
"""
    running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    assert int(said(box, bomb, Limits(memory=4 << 30))) < running + 1000


def test_groups_count_all_workers_or_the_log_says_why_not(box: Sandbox) -> None:
    controllers = box.layers.get("cgroup", [])
    if not controllers:
        assert "no cgroup: " in box.described
        return
    folder = Path(box.layers["cgroup_folder"])
    assert int((folder / "pids.max").read_text()) == 512
    with box.worker(Limits(seconds=20)) as worker:
        worker.send({"role": "script", "program": ""})
        worker.ending()
    if "memory" in controllers:
        # Address space is not what counts here: the kernel itself ends the worker for what it has touched.
        hungry = Limits(memory=256 << 20)
        bomb = "data = []\nwhile True: data.append(bytearray(1 << 20))"
        assert run_script(box, bomb, "", hungry)[1]["code"] != 0
    box.close()
    assert not folder.exists()


def test_the_log_names_the_layers_once() -> None:
    lines: list[str] = []
    with announced(lines.append) as kept:
        for _ in range(3):
            CodeScorer().run(f"def f(x): return x + {_}", read_tests(["assert f(0) == 0"]))
    assert lines == [f"programs run in a sandbox: {sandbox().described}"]
    assert kept == [sandbox().described]
    sandbox()
    assert len(lines) == 1


class ToyGrade(Stage):
    kind: Literal["toy_grade"]
    produces: ClassVar[Product] = "data"

    def run(self, work: Work) -> dict[str, Any]:
        score = CodeScorer().run("def f(x): return x", read_tests(["assert f(0) == 0"]))
        with whole_folder(work.output("data")) as folder:
            write_text(folder / "score.txt", str(score.value))
        return {"score": score.value}


def test_the_record_of_a_stage_names_the_layers(tmp_path: Path, capfd) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: graded\nstages:\n  graded: {kind: toy_grade}\n")
    assert run(recipe, tmp_path / "runs").entry("graded").record["sandbox"] == [sandbox().described]
    assert f"graded: programs run in a sandbox: {sandbox().described}" in "".join(capfd.readouterr())


def test_the_unsafe_sandbox_is_permitted_for_a_whole_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Recorded(Sandbox):
        def __init__(self, unsafe: bool = False) -> None:
            asked.append(unsafe)
            super().__init__()

    monkeypatch.setattr(client, "Sandbox", Recorded)
    monkeypatch.setattr(client, "_open", {})
    monkeypatch.delenv("TRIVIUM_UNSAFE_SANDBOX", raising=False)
    sandbox().close()
    with client.permitting_unsafe(True):
        sandbox().close()
    assert asked == [False, True]
    assert "TRIVIUM_UNSAFE_SANDBOX" not in os.environ
