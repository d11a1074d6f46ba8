"""What an isolated worker does: run a program and answer calls to it, or run tests that make such calls."""

import builtins
import contextlib
import importlib
import os
import sys
from itertools import islice
from typing import Any

from . import judge, probe, values

_WARM = """
    abc array ast bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions
    functools hashlib heapq io itertools json math numbers operator queue random re statistics string
    struct textwrap threading time traceback types typing unicodedata zlib
"""
_MOST_ITEMS = 200_000
OUT_OF_MEMORY = 98


def warm_up() -> None:
    """Import what programs commonly import, once, before anything is isolated."""
    for name in _WARM.split():
        importlib.import_module(name)
    # What the interactive interpreter adds, and programs that read and print often end with.
    for name in ("exit", "quit"):
        setattr(builtins, name, sys.exit)


def live(fds: list[int], limits: dict[str, Any]) -> int:
    """Do what the first message asks for; the result is the exit status."""
    channel = fds[0]
    order = values.read_frame(channel)
    quiet()
    if order["role"] == "script":
        return run_script(order["program"], fds[1], fds[2])
    if order["role"] == "judge":
        return judge.sit(channel, fds[1], order)
    if order["role"] == "probe":
        probe_isolation(channel, order["bait"])
        return 0
    Program(channel, fds[1]).live(order["program"])
    return 0


def quiet() -> None:
    """Give the worker no terminal: nothing comes in, and what it prints goes nowhere."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115


def probe_isolation(channel: int, bait: dict[str, Any]) -> None:
    """Try everything a hostile program would, and name each attempt before it and each that succeeds."""
    for group, name, deed in probe.attempts(bait):
        values.write_frame(channel, {"tries": [group, name]})
        try:
            deed()
        except (OSError, ValueError, AttributeError, MemoryError):
            continue
        values.write_frame(channel, {"open": [group, name]})
    values.write_frame(channel, {"done": True})


def run_script(program: str, stdin: int, stdout: int) -> int:
    """Run a whole program with its input and output on pipes."""
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    os.closerange(3, 1 << 10)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        sys.stdout.flush()
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except MemoryError:
        return OUT_OF_MEMORY
    sys.stdout.flush()
    return 0


class Program:
    """An untrusted program, loaded, whose functions the other side calls one by one."""

    def __init__(self, channel: int, peer: int) -> None:
        self.channel = channel
        self.peer = peer
        self.names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
        self.held: list[Any] = []

    def live(self, source: str) -> None:
        """Load the program, tell the parent what it defines, then answer until the other side hangs up."""
        try:
            exec(compile(source, "program.py", "exec"), self.names)
        except SyntaxError as error:
            values.write_frame(self.channel, {"compile": f"{type(error).__name__}: {error}"[:500]})
            return
        except BaseException as error:
            values.write_frame(self.channel, {"raised": [type(error).__name__, spoken(error)]})
            return
        names = [name for name in list(self.names) if type(name) is str and not name.startswith("__")]
        values.write_frame(self.channel, {"names": names[:2000]})
        os.close(self.channel)
        while True:
            try:
                request = values.read_frame(self.peer)
            except EOFError:
                return
            values.write_frame(self.peer, {"id": request["id"], **self.answer(request)})

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request and put its outcome in plain words."""
        try:
            target = self.names[request["name"]] if request["of"] is None else self.held[request["of"]]
            if request["do"] == "call":
                return self.call(target, request)
            return self.plain(self.do(request["do"], target, request))
        except BaseException as error:
            return {"raised": [type(error).__name__, spoken(error)]}

    def do(self, deed: str, target: Any, request: dict[str, Any]) -> Any:
        if deed == "list":
            return list(islice(target, _MOST_ITEMS))
        assert deed == "attribute"
        return getattr(target, request["name"])

    def call(self, target: Any, request: dict[str, Any]) -> dict[str, Any]:
        """Call a function; one that returns nothing may have changed its arguments, which are passed."""
        arguments = [values.decode(argument, self.mine) for argument in request["arguments"]]
        keywords = {name: values.decode(value, self.mine) for name, value in request["keywords"].items()}
        result = target(*arguments, **keywords)
        if result is not None:
            return self.plain(result)
        given = [*enumerate(request["arguments"]), *request["keywords"].items()]
        own = [*arguments, *keywords.values()]
        changed = []
        for (place, before), value in zip(given, own, strict=True):
            if isinstance(value, values.CHANGEABLE):
                # What is not plain any more is not passed: the tests see the argument as it was.
                with contextlib.suppress(values.Unplain, ValueError):
                    after = values.encode(value)
                    if after != before:
                        changed.append([place, after])
        return {"value": None, "changed": changed}

    def mine(self, reference: dict[str, Any]) -> Any:
        ((kind, which),) = reference.items()
        return self.held[which] if kind == "held" else self.names[which]

    def plain(self, result: Any) -> dict[str, Any]:
        try:
            return {"value": values.encode(result)}
        except values.Unplain:
            self.held.append(result)
            return {"held": len(self.held) - 1, "type": type(result).__name__}


def spoken(error: BaseException) -> str:
    """What an exception says, where it can say it."""
    try:
        return str(error)[:300]
    except BaseException:
        return ""
