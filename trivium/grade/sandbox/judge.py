"""The judge: runs the tests in a walled-in process of their own, and asks the program's for every answer."""

import ast
import builtins
import importlib.abc
import importlib.machinery
import secrets
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import values

_STAND_INS = frozenset({"solution", "program", "submission", "candidate", "main", "answer"})


class ProgramGone(BaseException):
    """The program's process ended; no test may catch this."""


class NotPlain(Exception):
    """The tests pass something that cannot be handed to another process."""


class Line:
    """The line to the program's process."""

    def __init__(self, peer: int) -> None:
        self.peer = peer
        self.gone = False
        self.calls = 0
        self.untestable = ""

    def ask(
        self, deed: str, name: str | None, of: int | None = None, *arguments: Any, **keywords: Any
    ) -> Any:
        """Have the program do something and bring back what came of it."""
        if self.gone:
            raise ProgramGone
        try:
            plain = [values.encode(argument, _theirs) for argument in arguments]
            named = {key: values.encode(value, _theirs) for key, value in keywords.items()}
        except values.Unplain as error:
            self.untestable = f"the tests pass {error}"
            raise NotPlain(self.untestable) from None
        number = secrets.randbits(52)
        request = {"id": number, "do": deed, "name": name, "of": of, "arguments": plain, "keywords": named}
        self.calls += 1
        try:
            values.write_frame(self.peer, request)
            reply = values.read_frame(self.peer)
            if reply["id"] != number:
                raise ValueError
            raised, result = self.unpack(reply)
        except Exception:
            # Whatever breaks the protocol ends the conversation, so that no test can go on after it.
            self.gone = True
            raise ProgramGone from None
        if raised is not None:
            raise raised
        return result

    def unpack(self, reply: dict[str, Any]) -> tuple[Exception | None, Any]:
        if "raised" in reply:
            name, text = reply["raised"]
            return exception(str(name), str(text)), None
        if "held" in reply:
            return None, Remote(self, int(reply["held"]), str(reply["type"])[:80])
        return None, values.decode(reply["value"])


def _theirs(value: Any) -> Any:
    """How to name to the program something that is its own."""
    if isinstance(value, Remote):
        return {"held": value._held}
    return {"name": value.__name__} if isinstance(value, Function) else None


def exception(name: str, text: str) -> Exception:
    """The built-in exception of that name, or one that names it; never one that would end the judge."""
    kind = getattr(builtins, name, None)
    # StopIteration would silently cut short a test's own loop over its cases.
    kept = (AssertionError, StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and kind not in kept:
        try:
            return kind(text)
        except TypeError:
            pass
    return RuntimeError(f"{name}: {text}")


class Remote:
    """Something that lives in the program's process and is not plain: it can be used, never believed.

    It has no truth value and equals only itself, so an object that claims to equal everything gains nothing.
    """

    def __init__(self, line: Line, held: int, kind: str) -> None:
        self._line, self._held, self._kind, self._read = line, held, kind, False

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._line.ask("call", None, self._held, *arguments, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._line.ask("attribute", name, self._held)

    def __iter__(self) -> Iterator[Any]:
        # Once only, as for a generator: what answers differently each time could please every check.
        items = [] if self._read else self._line.ask("list", None, self._held)
        self._read = True
        return iter(items if isinstance(items, list) else [])

    def __bool__(self) -> bool:
        raise TypeError(f"the program returned a {self._kind}, which is neither true nor false here")

    def __repr__(self) -> str:
        return f"<a {self._kind} of the program>"


class Function:
    """A function or class of the program, called in its own process."""

    def __init__(self, line: Line, name: str) -> None:
        self._line = line
        self.__name__ = name

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._line.ask("call", self.__name__, None, *arguments, **keywords)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets tests write `from solution import f`."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _STAND_INS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__.update(self.names)


class Outcome:
    """How many tests ran, how many held, and what was wrong with the first that did not."""

    def __init__(self) -> None:
        self.run = self.held = 0
        self.failure = self.broken = ""

    def record(self, failure: str) -> None:
        self.run += 1
        self.held += not failure
        self.failure = self.failure or failure

    def attempt(self, what: str, deed: Callable[[], Any]) -> None:
        """Run one test, for which any exception is a failure and the program's end ends everything."""
        try:
            deed()
        except NotPlain:
            raise
        except Exception as error:
            said = str(error)[:200]
            self.record(f"{what}: {type(error).__name__}{': ' + said if said else ''}")
        else:
            self.record("")


def sit(channel: int, peer: int, order: dict[str, Any]) -> int:
    """Run the tests and report how many hold, with the first that does not."""
    line = Line(peer)
    outcome = Outcome()
    try:
        if order["cases"]:
            run_cases(order["cases"], line, outcome)
        else:
            run_sources(order, line, outcome)
    except SyntaxError as error:
        outcome.broken = f"the tests do not compile: {error}"
    except ProgramGone:
        outcome.record("the program ended while it was being tested")
    except NotPlain:
        outcome.broken = line.untestable
    except BaseException as error:
        trouble = f"{type(error).__name__}: {error}"[:300]
        # Before the program was ever asked, the fault can only be the tests' own.
        if line.calls:
            outcome.record(trouble)
        else:
            outcome.broken = f"the tests could not be run: {trouble}"
    report = {
        "held": outcome.held,
        "run": outcome.run,
        "failure": outcome.failure,
        "broken": line.untestable or outcome.broken,
        "gone": line.gone,
        "calls": line.calls,
    }
    values.write_frame(channel, report)
    return 0


def run_cases(cases: list[dict[str, Any]], line: Line, outcome: Outcome) -> None:
    """Call the program with each case's arguments and compare what comes back, types and all."""
    for number, case in enumerate(cases):
        expected = case["expected"]

        def test(case: dict[str, Any] = case, expected: Any = expected) -> None:
            given = line.ask("call", case["function"], None, *case["arguments"])
            if not values.identical(expected, given):
                raise AssertionError(f"{given!r:.80} came back, where {expected!r:.80} is wanted")

        outcome.attempt(f"case {number + 1}", test)


def run_sources(order: dict[str, Any], line: Line, outcome: Outcome) -> None:
    """Run tests written in Python, the program's own names being calls to its process."""
    # A program may call its function `len`, but not have the tests count with it.
    names = {
        name: Function(line, name)
        for name in order["names"]
        if name.isidentifier()
        and not name.startswith("__")
        and (not hasattr(builtins, name) or name == order["entry_point"])
    }
    space: dict[str, Any] = {"__name__": "tests", "__builtins__": builtins, **names}
    sys.meta_path.append(_Finder(names))
    # Helpers of the task itself come from the task, so that a program cannot redefine its own yardstick.
    exec(compile(order["prelude"], "prelude.py", "exec"), space)
    entry_point = order["entry_point"]
    if entry_point:
        space[entry_point] = space["candidate"] = Function(line, entry_point)
    for source in order["tests"]:
        run_tests(source, space, outcome, line, entry_point)


def run_tests(
    source: str, space: dict[str, Any], outcome: Outcome, line: Line, entry_point: str | None
) -> None:
    """Run one source of tests: its asserts, `check(candidate)`, test functions and TestCases."""
    space.pop("check", None)
    before = dict(space)
    for statement in ast.parse(source).body:
        code = compile(ast.Module([statement], []), "tests.py", "exec")
        loop = isinstance(statement, ast.For | ast.While | ast.With | ast.Try | ast.If) and any(
            isinstance(part, ast.Assert) for part in ast.walk(statement)
        )
        if isinstance(statement, ast.Assert) or loop or _calls_check(statement):
            outcome.attempt(ast.unparse(statement)[:120], partial(exec, code, space))
        else:
            exec(code, space)
    called = any(_calls_check(statement) for statement in ast.parse(source).body)
    for name, thing in list(space.items()):
        if thing is before.get(name):
            continue
        if name == "check" and not called and isinstance(thing, types.FunctionType):
            if not entry_point:
                outcome.broken = "check(candidate) needs to be told the entry point"
                continue
            outcome.attempt("check", partial(thing, Function(line, entry_point)))
        elif name.startswith("test") and isinstance(thing, types.FunctionType):
            outcome.attempt(name, thing)
        elif isinstance(thing, type) and hasattr(thing, "countTestCases") and thing.__module__ == "tests":
            run_case(thing, outcome)


def _calls_check(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Name)
        and statement.value.func.id == "check"
    )


def run_case(case: Any, outcome: Outcome) -> None:
    """Run a unittest.TestCase, one test at a time."""
    import unittest

    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        test, result = case(name), unittest.TestResult()
        test.run(result)
        trouble = [*result.failures, *result.errors]
        last = trouble[0][1].strip().splitlines()[-1] if trouble else ""
        outcome.record(f"{name}: {last}" if trouble else "")
