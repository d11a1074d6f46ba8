"""Forms of answers, compiled beside the engines: tried on a budget, one at a time, and remembered."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import trivium
from trivium.generate.constraints import Constraint, Form, Grammars, refusal
from trivium.kit.errors import TriviumError
from trivium.serve.failures import RequestRefused

log = logging.getLogger("trivium.serve")

# Forms that are remembered: those that can be followed take memory, the others a sentence each.
FOLLOWED = 32
REFUSED = 1024
# Forms that may wait to be compiled.
WAITING = 16

Outcome = Constraint | str
"""What came of a form: where it is refused, why."""


class Forms:
    """Compiles the forms that clients ask for; what takes long holds up other new forms, and nothing else."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: of processor time that a form may take to be compiled, and an answer to follow it."""
        self._seconds = seconds
        self._thread = ThreadPoolExecutor(1, "forms", initializer=_least_priority)
        self._trial = Trial(seconds)
        self._followed: OrderedDict[str, Constraint] = OrderedDict()
        self._refused: OrderedDict[str, str] = OrderedDict()
        self._under_way: dict[str, asyncio.Future[Outcome]] = {}

    async def constraint(self, model: str, grammars: Grammars, form: Form) -> Constraint:
        """A constraint at the beginning of the form, or a refusal; the same form is compiled once."""
        key = sha256(json.dumps([model, *form]).encode("utf-8", "surrogatepass")).hexdigest()
        outcome: Outcome | None = self._followed.get(key) or self._refused.get(key)
        if outcome is None:
            outcome = await asyncio.shield(self._asked(key, model, grammars, form))
        if isinstance(outcome, str):
            raise TriviumError(outcome)
        return outcome.fork()

    def _asked(self, key: str, model: str, grammars: Grammars, form: Form) -> asyncio.Future[Outcome]:
        """The outcome of a form that is being compiled, or that is put in line."""
        if key not in self._under_way:
            if len(self._under_way) >= WAITING:
                problem = f"{WAITING} new forms of answers are waiting to be prepared; ask again"
                wait = max(1, round(self._seconds))
                raise RequestRefused(problem, status=429, code="rate_limit_exceeded", retry_after=wait)
            loop = asyncio.get_running_loop()
            future = loop.run_in_executor(self._thread, self._compiled, model, grammars, form)
            future.add_done_callback(lambda done: self._remember(key, done))
            self._under_way[key] = future
        return self._under_way[key]

    def _compiled(self, model: str, grammars: Grammars, form: Form) -> Outcome:
        """On the thread for forms."""
        try:
            if problem := self._trial.problem(model, grammars, form):
                return str(refusal(form, problem))
            return grammars.compiled(form, self._seconds)
        except TriviumError as error:
            return str(error)

    def _remember(self, key: str, done: asyncio.Future[Outcome]) -> None:
        self._under_way.pop(key, None)
        if done.cancelled() or done.exception() is not None:
            return
        outcome = done.result()
        if isinstance(outcome, Constraint):
            self._followed[key] = outcome
            if len(self._followed) > FOLLOWED:
                self._followed.popitem(last=False)
        else:
            self._refused[key] = outcome
            if len(self._refused) > REFUSED:
                self._refused.popitem(last=False)

    def stop(self) -> None:
        """Compile nothing more."""
        self._trial.stop()
        self._thread.shutdown(wait=False, cancel_futures=True)


class Trial:
    """The other end of `grammar_trial`: says what is wrong with a form before it is compiled here."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._lock, self._stopped = threading.Lock(), False

    def problem(self, model: str, grammars: Grammars, form: Form) -> str:
        """Why a form is refused; empty where it is not, and where nothing can be tried on this machine."""
        if not hasattr(os, "fork"):
            return ""
        try:
            self._start()
            if model not in self._known:
                tokens = {"tokenizer": grammars.tokenizer, "size": grammars.size, "ends": grammars.ends}
                self._say({"model": model, **tokens})
                self._known.add(model)
            self._say({"model": model, **form._asdict(), "seconds": self._seconds})
            assert self._process is not None
            assert self._process.stdout is not None
            answer = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            self._end()
            log.warning("forms cannot be tried: %s", error)
            answer = {"busy": True}
        if "busy" in answer:
            raise RequestRefused("the form of the answer could not be prepared; ask again", status=503)
        return answer["problem"]

    def _start(self) -> None:
        with self._lock:
            if self._stopped:
                raise OSError("the server is being stopped")
            if self._process is not None and self._process.poll() is None:
                return
            self._known.clear()
            places = [str(Path(trivium.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
            self._process = subprocess.Popen(
                # what lies in the folder from which the server was started must not be imported
                [sys.executable, "-P", "-m", "trivium.serve.grammar_trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, places)),
                    "TOKENIZERS_PARALLELISM": "false",
                },
                start_new_session=True,
            )

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        self._process.stdin.flush()

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def stop(self) -> None:
        """End the process, and start no other."""
        self._stopped = True
        self._end()


def _least_priority() -> None:
    """Let what computes for answers go before this thread."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
