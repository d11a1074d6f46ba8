"""The registry of attacks, and the runner that survives what they do to it."""

import contextlib
import importlib
import json
import os
import pkgutil
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError

TESTS = Path(__file__).parents[1]
_START_SECONDS = 120.0


@dataclass(frozen=True)
class Attack:
    """One attack: its class, its name, what it does in a scratch folder, and how long it may take."""

    group: str
    name: str
    run: Callable[[Path], None]
    seconds: float
    module: str


@dataclass(frozen=True)
class Result:
    """What came of one attack; `trouble` is empty where it held."""

    group: str
    name: str
    trouble: str
    seconds: float


_attacks: dict[tuple[str, str], Attack] = {}


def attack(
    group: str, name: str = "", *, seconds: float = 60.0, cases: Mapping[str, Any] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as an attack of a class, or as one attack per case."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        title = name or function.__name__.replace("_", " ")
        if cases is None:
            _add(Attack(group, title, function, seconds, function.__module__))
        else:
            for case, value in cases.items():

                def one(scratch: Path, value: Any = value) -> None:
                    function(scratch, value)

                case_title = f"{name}: {case}" if name else case
                _add(Attack(group, case_title, one, seconds, function.__module__))
        return function

    return register


def _add(one: Attack) -> None:
    key = (one.group, one.name)
    assert key not in _attacks, f"two attacks are called {key}"
    _attacks[key] = one


@contextlib.contextmanager
def refusal(words: str = "") -> Iterator[None]:
    """What must end in a TriviumError that says this."""
    try:
        yield
    except TriviumError as error:
        if words not in str(error):
            raise AssertionError(f"the refusal does not say {words!r}: {error}") from None
        return
    raise AssertionError("it was not refused")


def sections(file: str) -> dict[str, str]:
    """The parts of a file among the tests, each under a line `### name`."""
    parts = ("\n" + (TESTS / file).read_text()).split("\n### ")[1:]
    return {name.strip(): source for name, _, source in (part.partition("\n") for part in parts)}


def modules() -> list[str]:
    """The modules of this package that register attacks."""
    package = Path(__file__).parent
    own = {"frame", "__main__"}
    return [f"attack.{part.name}" for part in pkgutil.iter_modules([str(package)]) if part.name not in own]


def load(names: Sequence[str]) -> list[Attack]:
    """Import modules and return the attacks that they register, in order."""
    for name in names:
        importlib.import_module(name)
    return [one for one in _attacks.values() if one.module in names]


def serve(module: str, first: int, report: int) -> None:
    """In a child process: run a module's attacks from number `first` on and report each as a line of JSON."""
    for number, one in enumerate(load([module])[first:], start=first):
        scratch = Path(tempfile.mkdtemp(prefix="attack-"))
        os.chdir(scratch)
        start = time.monotonic()
        trouble = ""
        _say(report, {"begins": number})
        try:
            one.run(scratch)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join(str(error).split())[:300]
            trouble = f"{type(error).__name__}: {said} ({Path(place.filename).name}:{place.lineno})"
        finally:
            os.chdir("/")
            shutil.rmtree(scratch, ignore_errors=True)
        _say(report, {"ended": number, "trouble": trouble, "seconds": round(time.monotonic() - start, 2)})


def _say(report: int, message: dict[str, Any]) -> None:
    os.write(report, json.dumps(message).encode() + b"\n")


def run(module: str, attacks: Sequence[Attack]) -> Iterator[Result]:
    """Run a module's attacks; one that hangs or ends its process is broken, and the rest go on."""
    first = 0
    while first < len(attacks):
        with tempfile.TemporaryDirectory(prefix="attack-") as folder:
            for result in _until_it_ends(module, attacks, first, Path(folder)):
                yield result
                first += 1


def _until_it_ends(module: str, attacks: Sequence[Attack], first: int, folder: Path) -> Iterator[Result]:
    """The results of one process, from attack number `first` to the last or to one that ended the process."""
    heard, said = os.pipe()
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "attack", "--serve", module, str(first), str(said)],
            pass_fds=[said],
            cwd=TESTS,
            env={**os.environ, "TMPDIR": str(folder)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    os.close(said)
    start, limit = time.monotonic(), _START_SECONDS
    trouble, unread = "", b""
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(heard, selectors.EVENT_READ)
            while not trouble:
                if not selector.select(max(0.0, start + limit - time.monotonic())):
                    trouble = f"it took more than {limit:g} seconds"
                    break
                piece = os.read(heard, 1 << 16)
                if not piece:
                    break
                *lines, unread = (unread + piece).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    one = attacks[first]
                    if "begins" in message:
                        start, limit = time.monotonic(), one.seconds
                    else:
                        first += 1
                        yield Result(one.group, one.name, message["trouble"], message["seconds"])
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        os.close(heard)
    if first < len(attacks):
        last = (folder / "output").read_text(errors="replace").strip().rpartition("\n")[2]
        trouble = trouble or f"it ended the process of its class (status {code}): {last[:300]}"
        one = attacks[first]
        yield Result(one.group, one.name, trouble, round(time.monotonic() - start, 2))


def table(results: Sequence[Result]) -> str:
    """Attack class | tried | held | broken."""
    groups = list(dict.fromkeys(result.group for result in results))
    rows = [["attack class", "tried", "held", "broken"]]
    for group in groups:
        own = [result for result in results if result.group == group]
        held = sum(not result.trouble for result in own)
        rows.append([group, str(len(own)), str(held), str(len(own) - held)])
    held = sum(not result.trouble for result in results)
    rows.append(["all", str(len(results)), str(held), str(len(results) - held)])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        " | ".join(
            cell.ljust(width) if not number else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )
