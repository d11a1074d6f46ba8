"""The judge: runs the tests in an isolated process of their own, and asks the program's for every answer."""

import ast
import builtins
import copy
import importlib.abc
import importlib.machinery
import math
import secrets
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from . import values

# What tests measure with, and some data sets leave to the program to import: never the program's own.
_YARDSTICKS = {"math": math, "isclose": math.isclose, "deepcopy": copy.deepcopy}
_STAND_INS = frozenset({"solution", "program", "submission", "candidate", "main", "answer"})


class ProgramGone(BaseException):
    """The program's process ended; no test may catch this."""


class NotPlain(Exception):
    """The tests pass something that cannot be handed to another process."""


class NotTests(Exception):
    """What is given as tests is no Python."""


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
            number = secrets.randbits(52)
            request = {
                "id": number,
                "do": deed,
                "name": name,
                "of": of,
                "arguments": plain,
                "keywords": named,
            }
            frame = values.frame(request)
        except values.Unplain as error:
            self.untestable = f"the tests pass {error}"
            raise NotPlain(self.untestable) from None
        except values.TooLarge as error:
            # Once the program has answered, what is too large may be of its own making.
            self.untestable = "" if self.calls else f"the tests pass {error}"
            raise NotPlain(str(error)) from None
        self.calls += 1
        try:
            values.write(self.peer, frame)
            reply = values.read_frame(self.peer)
            if reply["id"] != number:
                raise ValueError
            raised, result = self.unpack(reply)
            for place, value in reply.get("changed", ()):
                own = arguments[place] if isinstance(place, int) else keywords[place]
                take_over(own, values.decode(value))
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


def take_over(own: Any, changed: Any) -> None:
    """Bring a container that the program changed in place to what it holds now, and those in it as well."""
    if not _alike(own, changed):
        raise ValueError("an argument cannot become this")
    if isinstance(own, list):
        kept = zip(own, changed, strict=False)
        own[:] = [_taken_over(old, new) for old, new in kept] + changed[len(own) :]
    elif isinstance(own, dict):
        taken = {key: _taken_over(own[key], new) if key in own else new for key, new in changed.items()}
        own.clear()
        own.update(taken)
    elif isinstance(own, set):
        own.clear()
        own.update(changed)
    else:
        own[:] = changed


def _alike(old: Any, new: Any) -> bool:
    """Whether both are containers of one kind that can change."""
    return any(isinstance(old, kind) and isinstance(new, kind) for kind in values.CHANGEABLE)


def _taken_over(old: Any, new: Any) -> Any:
    """The old container with the new content, where both are of one kind; else what is new."""
    if _alike(old, new):
        take_over(old, new)
        return old
    return new


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

    def __init__(self, names: dict[str, Any], space: dict[str, Any]) -> None:
        self.names = names
        self.space = space

    def find_spec(
        self, fullname: str, path: Any, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in _STAND_INS else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name, self.space)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__.update(self.names)


class _StandIn(types.ModuleType):
    """The program as a module; `from solution import *` takes the place of nothing the tests have bound."""

    def __init__(self, name: str, space: dict[str, Any]) -> None:
        super().__init__(name)
        self.__dict__["_space"] = space

    @property
    def __all__(self) -> list[str]:
        space = self.__dict__["_space"]
        return [
            name
            for name, thing in self.__dict__.items()
            if isinstance(thing, Function) and space.get(name, thing) is thing
        ]


class Outcome:
    """How many tests ran, how many held, and what was wrong with the first that did not."""

    def __init__(self) -> None:
        self.run = self.held = 0
        self.failure = self.broken = self.missing = ""
        self.own: set[str] = set()

    def record(self, failure: str) -> None:
        self.run += 1
        self.held += not failure
        self.failure = self.failure or failure

    def lacking(self, error: BaseException) -> str:
        """The name that the tests ask of the program and it does not define, where that is the trouble."""
        if type(error) is NameError:
            return error.name if error.name and error.name not in self.own else ""
        if isinstance(error, ImportError) and error.name in _STAND_INS:
            return str(error).partition("'")[2].partition("'")[0]
        if isinstance(error, AttributeError) and isinstance(error.obj, _StandIn):
            return error.name or ""
        return ""

    def attempt(self, what: str, deed: Callable[[], Any]) -> None:
        """Run one test, for which any exception is a failure and the program's end ends everything."""
        try:
            deed()
        except NotPlain:
            raise
        except Exception as error:
            self.missing = self.missing or self.lacking(error)
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
    except NotTests as error:
        outcome.broken = f"the tests could not be run: {error}"
    except ProgramGone:
        outcome.record("the program ended while it was being tested")
    except NotPlain:
        outcome.broken = line.untestable
        outcome.record("NotPlain: the tests pass a value that is too large")
    except BaseException as error:
        trouble = f"{type(error).__name__}: {error}"[:300]
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
        "missing": outcome.missing,
        "calls": line.calls,
    }
    values.write_frame(channel, report)
    return 0


def run_cases(cases: list[dict[str, Any]], line: Line, outcome: Outcome) -> None:
    """Call the program with each case's arguments and compare what comes back, types and all."""
    for number, case in enumerate(cases):
        expected, given_to = values.decode(case["expected"]), values.decode(case["arguments"])
        arguments, keywords = ((), given_to) if isinstance(given_to, dict) else (given_to, {})
        call = partial(line.ask, "call", case["function"], None, *arguments, **keywords)

        def test(call: Callable[[], Any] = call, expected: Any = expected) -> None:
            given = call()
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
    sys.meta_path.append(_Finder(names, space))
    prelude, *sources = [parsed(source) for source in (order["prelude"], *order["tests"])]
    entry_point = order["entry_point"]
    outcome.own = {name for tree in (prelude, *sources) for name in bound(tree)}
    space |= {name: thing for name, thing in _YARDSTICKS.items() if name != entry_point}
    # Helpers of the task itself come from the task, so that a program cannot redefine its own yardstick.
    try:
        exec(compile(prelude, "prelude.py", "exec"), space)
    except NameError as error:
        raise NotTests(f"what stands before them fails: {error}") from None
    if entry_point:
        space[entry_point] = space["candidate"] = Function(line, entry_point)
    for source in sources:
        run_tests(source, space, outcome, line, entry_point)


def parsed(source: str) -> ast.Module:
    """The syntax tree of tests, which compiles; what goes wrong later is no fault of their syntax."""
    try:
        tree = ast.parse(source)
        compile(tree, "tests.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise NotTests(str(error) or type(error).__name__) from None
    return tree


def bound(tree: ast.Module) -> Iterator[str]:
    """Every name that tests give to something themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]


def run_tests(
    tree: ast.Module, space: dict[str, Any], outcome: Outcome, line: Line, entry_point: str | None
) -> None:
    """Run one source of tests: its asserts, `check(candidate)`, test functions and TestCases."""
    space.pop("check", None)
    before = dict(space)
    for statement in tree.body:
        code = compile(ast.Module([statement], []), "tests.py", "exec")
        loop = isinstance(statement, ast.For | ast.While | ast.With | ast.Try | ast.If) and any(
            isinstance(part, ast.Assert) for part in ast.walk(statement)
        )
        if isinstance(statement, ast.Assert) or loop or _calls_check(statement):
            outcome.attempt(ast.unparse(statement)[:120], partial(exec, code, space))
        else:
            run_step(code, space, outcome, line)
    called = any(_calls_check(statement) for statement in tree.body)
    for name, thing in list(space.items()):
        if thing is before.get(name):
            continue
        if name == "check" and not called and isinstance(thing, types.FunctionType):
            if not entry_point:
                outcome.broken = "check(candidate) needs the name of the entry point"
                continue
            outcome.attempt("check", partial(thing, Function(line, entry_point)))
        elif name.startswith("test") and isinstance(thing, types.FunctionType):
            outcome.attempt(name, thing)
        elif isinstance(thing, type) and hasattr(thing, "countTestCases") and thing.__module__ == "tests":
            run_case(thing, outcome)


def run_step(code: types.CodeType, space: dict[str, Any], outcome: Outcome, line: Line) -> None:
    """Run a statement that is no test; where the program makes it fail, that is one test failed."""
    try:
        exec(code, space)
    except NotPlain:
        raise
    except Exception as error:
        foreign = isinstance(error, ImportError) and error.name and error.name not in _STAND_INS
        lacking = outcome.lacking(error)
        # Before the program was ever asked, the fault can only be the tests' own.
        if foreign or not (line.calls or lacking):
            raise NotTests(f"{type(error).__name__}: {error}"[:300]) from None
        outcome.missing = outcome.missing or lacking
        outcome.record(f"{type(error).__name__}: {error}"[:300])


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

    class Result(unittest.TestResult):
        def addError(self, test: Any, error: Any) -> None:
            outcome.missing = outcome.missing or outcome.lacking(error[1])
            super().addError(test, error)

    for name in unittest.defaultTestLoader.getTestCaseNames(case):
        test, result = case(name), Result()
        test.run(result)
        trouble = [*result.failures, *result.errors]
        last = trouble[0][1].strip().splitlines()[-1] if trouble else ""
        outcome.record(f"{name}: {last}" if trouble else "")
