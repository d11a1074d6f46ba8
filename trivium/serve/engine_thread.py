"""The one thread that computes: it opens the models and gives their engines turns."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")
log = logging.getLogger("trivium.serve")

# After so much time spent on commands the engines get their turn, and the other commands wait for the next.
SECONDS_BETWEEN_TURNS = 0.005


class EngineThread:
    """Does what other threads ask for, in order; the engines take turns between short commands and long ones.

    OpenMP keeps helpers for each thread that ever computed. Once they outnumber the cores it lets all of them
    sleep between two products, and waking them takes longer than most products: so only one thread computes.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._turns: list[Callable[[], bool]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engines", daemon=True)
        self._thread.start()

    def __enter__(self) -> EngineThread:
        return self

    def __exit__(self, *_: object) -> None:
        # a process that ends while one of its threads computes is ended by the C++ library: SIGABRT
        self.stop()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def tell(self, command: Callable[[], None]) -> None:
        """Have a command run, between two turns of the engines; after `stop` there are none."""
        with self._condition:
            self._commands.append(command)
            self._condition.notify()

    def do(self, function: Callable[[], Result]) -> Result:
        """Have a function run, wait for it, and return or raise what it does."""
        future: Future[Result] = Future()

        def command() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.tell(command)
        return future.result()

    def take_turns(self, turn: Callable[[], bool]) -> None:
        """Call `turn` again and again; where all turns say that nothing is left to do, wait for a command."""
        self.tell(lambda: self._turns.append(turn))

    def stop(self) -> None:
        """End the thread after what it is doing now."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        busy = False
        while True:
            with self._condition:
                while not (self._commands or busy or self._stopping):
                    self._condition.wait()
                if self._stopping and not self._commands:
                    return
            began = time.perf_counter()
            while self._commands and time.perf_counter() - began < SECONDS_BETWEEN_TURNS:
                _alone(self._commands.popleft())
            # every engine gets its turn, whatever the first one says
            moved = [_alone(turn) for turn in self._turns]
            busy = any(moved)


def _alone(work: Callable[[], Result]) -> Result | None:
    """What the work returns; if it raises, that is logged, for the other models live on this thread, too."""
    try:
        return work()
    except Exception:
        log.exception("the thread that computes goes on after a failure")
        return None
