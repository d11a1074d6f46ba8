"""A process that tries forms on a budget: what takes too much ends a copy of this process, not the server.

It reads a JSON object per line and answers each form with one. It ends when the server does, for then its
input ends. Each form is compiled in a copy of this process, which has the vocabularies ready.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

from trivium.generate.constraints import Form, matcher_of, problem_of, vocabulary_of

# Of memory, beyond what the process has when it begins.
MEMORY = 1 << 30
# On a busy machine processor time passes more slowly; so much more of the clock's time is waited.
PATIENCE = 10.0


def main() -> None:
    """Answer until the input ends."""
    with suppress(OSError):
        os.nice(19)
    vocabularies: dict[str, Any] = {}
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        if "tokenizer" in asked:
            vocabularies[asked["model"]] = vocabulary_of(asked["tokenizer"], asked["size"], asked["ends"])
            continue
        answer = _tried(Form(asked["kind"], asked["text"]), vocabularies[asked["model"]], asked["seconds"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _tried(form: Form, vocabulary: Any, seconds: float) -> dict[str, Any]:
    """Why a form is refused (empty where it is not), or that the machine was too busy to find out."""
    heard, said = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            os.close(heard)
            _limit(seconds)
            with os.fdopen(said, "wb") as answer:
                answer.write(_problem(form, vocabulary).encode("utf-8", "replace"))
        finally:
            os._exit(0)
    os.close(said)
    with os.fdopen(heard, "rb") as answer:
        problem = answer.read().decode()
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGALRM:
            return {"busy": True}
        late = os.WTERMSIG(status) == signal.SIGPROF
        problem = _too_much(f"{seconds:g} s" if late else f"{MEMORY >> 20} MiB")
    return {"problem": problem}


def _too_much(what: str) -> str:
    return f"it takes more than {what} to prepare: make it simpler"


def _problem(form: Form, vocabulary: Any) -> str:
    try:
        return problem_of(matcher_of(form, vocabulary))
    except ValueError as error:
        return str(error)
    except MemoryError:
        return _too_much(f"{MEMORY >> 20} MiB")


def _limit(seconds: float) -> None:
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, seconds * PATIENCE)
    with suppress(OSError, ValueError):
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
