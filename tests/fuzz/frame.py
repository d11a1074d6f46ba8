"""The registry of fuzz targets, and the runner that watches over time and memory from another process."""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.database import DirectoryBasedExampleDatabase
from hypothesis.strategies import SearchStrategy, sampled_from

from trivium.kit.errors import TriviumError

_EXAMPLES_PER_ROUND = 100
_STORED = Path(__file__).parents[2] / ".hypothesis" / "fuzz"


@dataclass(frozen=True)
class Target:
    """A function under fuzz: its strategy, the exceptions that are an answer, the bounds of one example."""

    name: str
    strategy: SearchStrategy[Any]
    run: Callable[[Any], Any]
    refuses: tuple[type[BaseException], ...]
    seconds: float
    memory: int


@dataclass(frozen=True)
class Result:
    """What came of one target: how many examples it had, and what was wrong with the one that failed."""

    name: str
    examples: int
    trouble: str


targets: dict[str, Target] = {}


def fuzz(
    name: str,
    strategy: SearchStrategy[Any],
    *,
    refuses: tuple[type[BaseException], ...] = (),
    seconds: float = 5.0,
    memory: int = 1 << 30,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register a function of one example as a target."""

    def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        assert name not in targets, f"two targets are called {name}"
        targets[name] = Target(name, strategy, function, (TriviumError, *refuses), seconds, memory)
        return function

    return register


def words(text: str) -> SearchStrategy[str]:
    """One of the words of a text."""
    return sampled_from(text.split())


def load() -> list[Target]:
    """Import every module of this package that registers targets."""
    for part in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if part.name not in ("frame", "__main__"):
            importlib.import_module(f"fuzz.{part.name}")
    return list(targets.values())


def run(chosen: Sequence[Target], seconds: float, workers: int, start: int) -> list[Result]:
    """Fuzz the targets, `workers` at a time, for about `seconds` of the clock in all; `start` is the seed."""
    results: list[Result] = []
    share = seconds * min(workers, len(chosen)) / len(chosen)
    waiting = list(chosen)
    with selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            while waiting and len(selector.get_map()) < workers:
                watched = _Watched(waiting.pop(0), share, start)
                selector.register(watched.heard, selectors.EVENT_READ, watched)
            ready = {key.data for key, _ in selector.select(0.2)}
            for key in list(selector.get_map().values()):
                watched = key.data
                if watched in ready:
                    watched.read()
                watched.look()
                if watched.result is not None:
                    selector.unregister(watched.heard)
                    watched.bury()
                    results.append(watched.result)
                    _print(watched.result)
    return results


def _print(result: Result) -> None:
    state = "BROKEN" if result.trouble else "held  "
    print(f"{state} {result.examples:8d} examples  {result.name}  {result.trouble}".rstrip(), flush=True)


class _Watched:
    """A target in a process of its own, which says before every example that it begins."""

    def __init__(self, target: Target, seconds: float, start: int) -> None:
        self.target = target
        self.examples = 0
        self.began = time.monotonic()
        self.result: Result | None = None
        self.unread = b""
        # The example that is being tried lies in a file, for when it takes the process with it.
        self.example = tempfile.NamedTemporaryFile(prefix="fuzz-")  # noqa: SIM115
        self.heard, said = os.pipe()
        self.process = os.fork()
        if self.process == 0:
            code = 1
            try:
                os.close(self.heard)
                os.setsid()
                _be(target, seconds, start, said, self.example.fileno())
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        os.close(said)

    def read(self) -> None:
        piece = os.read(self.heard, 1 << 16)
        *lines, self.unread = (self.unread + piece).split(b"\n")
        for line in lines:
            self.began = time.monotonic()
            if line == b".":
                self.examples += 1
            else:
                self.result = Result(self.target.name, self.examples, json.loads(line))
        if not piece and self.result is None:
            self.result = Result(self.target.name, self.examples, f"it ended its process with {self.shown()}")

    def look(self) -> None:
        # Twice the time, for the machine may be busy and the strategy takes some of it.
        if self.result is None and time.monotonic() - self.began > 2 * self.target.seconds + 5:
            trouble = f"it took more than {self.target.seconds:g} seconds with {self.shown()}"
            self.result = Result(self.target.name, self.examples, trouble)

    def shown(self) -> str:
        return Path(self.example.name).read_text(errors="replace")

    def bury(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self.heard)
        self.example.close()


def _be(target: Target, seconds: float, start: int, said: int, note: int) -> None:
    """In the child: try examples until the time is up or one fails."""
    # Garbage that is freed later would be room on top of the limit.
    gc.collect()
    now_used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = now_used + target.memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGALRM, _late)

    def attempt(example: Any) -> None:
        shown = repr(example)[:4000].encode(errors="backslashreplace")
        os.pwrite(note, shown, 0)
        os.ftruncate(note, len(shown))
        os.write(said, b".\n")
        signal.setitimer(signal.ITIMER_REAL, target.seconds)
        try:
            target.run(example)
        except target.refuses:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    deadline = time.monotonic() + seconds
    rounds = random.Random(f"{start} {target.name}")
    stored = DirectoryBasedExampleDatabase(_STORED)
    trouble = ""
    while not trouble and time.monotonic() < deadline:
        number = rounds.getrandbits(32)
        test = seed(number)(given(target.strategy)(_named(attempt, target.name)))
        test = settings(
            max_examples=_EXAMPLES_PER_ROUND,
            deadline=None,
            database=stored,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
            print_blob=False,
            verbosity=Verbosity.quiet,
        )(test)
        try:
            test()
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            shown = os.pread(note, 4000, 0).decode(errors="replace")
            said_it = " ".join(str(error).split())[:300]
            where = f"{Path(place.filename).name}:{place.lineno}"
            trouble = f"{type(error).__name__}: {said_it} ({where}) with {shown}"
    os.write(said, json.dumps(trouble).encode() + b"\n")


def _named(function: Callable[[Any], None], name: str) -> Callable[[Any], None]:
    """The function under a name of its own, by which Hypothesis keeps the examples that failed."""

    def attempt(example: Any) -> None:
        function(example)

    attempt.__name__ = attempt.__qualname__ = re.sub(r"\W+", "_", name)
    return attempt


class Late(Exception):
    """One example took too long."""


def _late(*_: Any) -> None:
    raise Late("one example took too long")
