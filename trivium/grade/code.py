"""The scorer of programs: the program in one isolated process, the tests in another, the verdict here."""

import hashlib
import json
import os
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from trivium.grade.fences import fenced_lines
from trivium.grade.sandbox import values
from trivium.grade.sandbox.client import Fault, Limits, Sandbox, Worker, sandbox
from trivium.grade.sandbox.script import run_script
from trivium.grade.sandbox.worker import OUT_OF_MEMORY
from trivium.grade.scorer import Score, Status, column
from trivium.kit.errors import TriviumError

_PYTHON = ("", "py", "python", "python3")
_LONGEST_PROGRAM = 200_000
_REMEMBERED = 4096
TESTS_COLUMNS = ("tests", "test", "test_list", "test_cases")


@dataclass(frozen=True)
class Exam:
    """What a program is held to: Python sources, calls with results, or inputs with expected output."""

    sources: tuple[str, ...] = ()
    calls: tuple[dict[str, Any], ...] = ()
    scripts: tuple[tuple[str, str], ...] = ()
    entry_point: str | None = None
    prelude: str = ""


@dataclass
class CodeScorer:
    """One where a program passes all its tests; with `partial`, the share that it passes."""

    name: str = "code"
    partial: bool = False
    seconds: float = 10.0
    memory: int = 512 << 20
    unsafe_sandbox: bool = False
    together: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    _known: OrderedDict[str, Score] = field(default_factory=OrderedDict, repr=False)

    def ready(self) -> None:
        sandbox(self.unsafe_sandbox)

    def __call__(self, completion: str, **columns: Any) -> Score:
        tests = read_tests(
            column(columns, TESTS_COLUMNS, self.name),
            columns.get("entry_point"),
            columns.get("prelude") or "",
        )
        program = program_of(completion)
        if program is None:
            return Score(0.0, "there is no program in the text", "unparsed")
        return self.run(program, tests)

    def run(self, program: str, tests: Exam) -> Score:
        """Score a program, or remember how the same one did before on the same tests."""
        if len(program) > _LONGEST_PROGRAM:
            return Score(0.0, "the program is too long", "unparsed")
        key = hashlib.sha256(repr((program, tests)).encode(errors="surrogatepass")).hexdigest()
        if key in self._known:
            return self._known[key]
        box = sandbox(self.unsafe_sandbox)
        try:
            score = self._scripts(box, program, tests) if tests.scripts else self._judged(box, program, tests)
        except (Fault, OSError) as error:
            return Score(None, f"the sandbox failed: {error}", "fault")
        self._known[key] = score
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return score

    def limits(self, factor: float = 1.0) -> Limits:
        """The limits of one worker."""
        return Limits(
            seconds=self.seconds * factor, cpu=max(1, round(self.seconds * factor)), memory=self.memory
        )

    def _judged(self, box: Sandbox, program: str, tests: Exam) -> Score:
        """Load the program; only then send the tests, to another process, and let the two talk."""
        ours, theirs = socket.socketpair()
        with ours, theirs, box.worker(self.limits(), theirs.fileno()) as worker:
            theirs.close()
            worker.send({"role": "program", "program": program})
            try:
                loaded = worker.receive()
                names = loaded.get("names")
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    return _not_loaded(loaded)
            except (EOFError, AttributeError):
                return self._ended(worker, "before it was loaded")
            if tests.entry_point and tests.entry_point not in names:
                return Score(0.0, f"the program defines no {tests.entry_point}", "wrong")
            with box.worker(self.limits(1.5), ours.fileno()) as judge:
                ours.close()
                judge.send(
                    {
                        "role": "judge",
                        "names": names,
                        "entry_point": tests.entry_point,
                        "prelude": tests.prelude,
                        "tests": tests.sources,
                        "cases": tests.calls,
                    }
                )
                try:
                    report = judge.receive()
                except EOFError:
                    how = judge.ending()
                    return Score(0.0, f"the tests did not come to an end ({how['ended']})", "overtime")
            if report["gone"]:
                return self._ended(worker, "while it was being tested")
        return self._verdict(report)

    def _verdict(self, report: dict[str, Any]) -> Score:
        run, held, failure = report["run"], report["held"], report["failure"]
        if report["broken"]:
            return Score(None, report["broken"], "gold_bad")
        if report["missing"]:
            failure = f"the program defines no {report['missing'][:80]}"
        elif run == 0 or report["calls"] == 0:
            return Score(None, "the tests never ask anything of the program", "gold_bad")
        if held == run:
            return Score(1.0, f"{run} of {run} tests pass", "ok")
        value = held / run if self.partial else 0.0
        status: Status = "memory" if "MemoryError" in failure else "wrong"
        return Score(value, f"{held} of {run} tests pass; {failure}", status)

    def _ended(self, worker: Worker, when: str) -> Score:
        """Why a program is gone."""
        worker.end.close()
        worker.deadline = min(worker.deadline, time.monotonic() + 1.0)
        how = worker.ending()
        if how["ended"] == "overtime":
            return Score(0.0, f"the program took more than {self.seconds:g} seconds {when}", "overtime")
        if how.get("out_of_memory") or how.get("memory", 0) > 0.8 * self.memory:
            return Score(0.0, f"the program used up its memory {when}", "memory")
        return Score(0.0, f"the program ended {when} (status {how.get('code')})", "wrong")

    def _scripts(self, box: Sandbox, program: str, tests: Exam) -> Score:
        held = 0
        first: Score | None = None
        for number, (given, expected) in enumerate(tests.scripts, start=1):
            score = self._script(box, program, given, expected, number)
            held += score.value == 1.0
            first = first or (None if score.value == 1.0 else score)
            if first is not None and not self.partial:
                break
        if first is None:
            return Score(1.0, f"{held} of {held} tests pass", "ok")
        total = len(tests.scripts)
        value = held / total if self.partial else 0.0
        passed = f"{held} of {total} tests pass; " if self.partial else ""
        return Score(value, f"{passed}{first.reason}", first.status)

    def _script(self, box: Sandbox, program: str, given: str, expected: str, number: int) -> Score:
        """Run the program once, with this input, and compare what it prints line by line."""
        printed, how = run_script(box, program, given, self.limits())
        if how["ended"] == "endless":
            return Score(0.0, f"test {number}: the program prints without end", "wrong")
        if how["ended"] == "overtime":
            return Score(
                0.0, f"test {number}: the program took more than {self.seconds:g} seconds", "overtime"
            )
        if how["code"] == OUT_OF_MEMORY or how.get("out_of_memory"):
            return Score(0.0, f"test {number}: the program used up its memory", "memory")
        if how["code"] != 0:
            return Score(0.0, f"test {number}: the program failed (status {how['code']})", "wrong")
        wanted = expected.encode(errors="replace").decode()
        if _lines(printed.decode(errors="replace")) != _lines(wanted):
            return Score(0.0, f"test {number}: the program printed something else", "wrong")
        return Score(1.0, f"test {number} passes", "ok")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().split("\n")]


def _not_loaded(loaded: dict[str, Any]) -> Score:
    if "compile" in loaded:
        return Score(0.0, f"the program does not compile: {str(loaded['compile'])[:200]}", "compile")
    kind, said = (
        (*loaded.get("raised", ()), "", "")[:2] if isinstance(loaded.get("raised"), list) else ("", "")
    )
    status: Status = "memory" if kind == "MemoryError" else "wrong"
    return Score(
        0.0, f"the program fails as it is loaded: {str(kind)[:80]} {str(said)[:200]}".strip(), status
    )


def program_of(completion: str) -> str | None:
    """The program in a completion: its last fenced block of Python, or the whole where nothing is fenced."""
    text = completion.rpartition("</think>")[2] if "</think>" in completion else completion
    blocks = [code for language, code in fenced_lines(text) if language.lower() in _PYTHON]
    if blocks:
        return blocks[-1]
    return None if "```" in text or not text.strip() else text


def read_tests(tests: Any, entry_point: str | None = None, prelude: str = "") -> Exam:
    """Tests in any of the shapes data sets have: source, list of asserts, calls, inputs and outputs."""
    for name, value in (("entry_point", entry_point), ("prelude", prelude)):
        if value is not None and not isinstance(value, str):
            raise TriviumError(f"The column {name} of a program's tests is text, not {value!r:.80}.")
    if isinstance(tests, str) and tests.strip().lower() not in ("", "null", "none", "nan"):
        if tests.lstrip()[:1] not in ("[", "{"):
            return Exam(sources=(tests,), entry_point=entry_point, prelude=prelude)
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError):
            return Exam(sources=(tests,), entry_point=entry_point, prelude=prelude)
    if isinstance(tests, dict) and "inputs" in tests and "outputs" in tests:
        function = tests.get("fn_name") or entry_point
        pairs = _pairs(tests["inputs"], tests["outputs"])
        tests = [
            {"function": function, "arguments": given, "expected": wanted}
            if function
            else {"input": given, "output": wanted}
            for given, wanted in pairs
        ]
    if isinstance(tests, list) and tests:
        if all(isinstance(test, str) for test in tests):
            return Exam(sources=tuple(tests), entry_point=entry_point, prelude=prelude)
        if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
            return Exam(scripts=tuple((_text(test["input"]), _text(test["output"])) for test in tests))
        if all(isinstance(test, dict) and {"arguments", "expected"} <= test.keys() for test in tests):
            calls = tuple(_call({"function": entry_point, **test}) for test in tests)
            if all(isinstance(call["function"], str) for call in calls):
                return Exam(calls=calls)
    raise _no_tests(tests)


def _no_tests(tests: Any) -> TriviumError:
    return TriviumError(
        "Tests are Python source, a list of asserts, or a list of {input, output} or "
        f"{{function, arguments, expected}}; not {shortened(tests)!r}."
    )


def shortened(value: Any) -> str:
    """The beginning of a value's text; some values nest too deeply to have one."""
    try:
        return str(value)[:80]
    except RecursionError:
        return f"a nested {type(value).__name__}"


def _pairs(inputs: Any, outputs: Any) -> list[tuple[Any, Any]]:
    if not isinstance(inputs, list | tuple) or not isinstance(outputs, list | tuple):
        raise TriviumError("The inputs and outputs of a program's tests are two lists of one length.")
    if len(inputs) != len(outputs):
        raise TriviumError(
            f"A program's tests have {len(inputs)} inputs and {len(outputs)} outputs; give one for each."
        )
    return list(zip(inputs, outputs, strict=True))


def _call(case: dict[str, Any]) -> dict[str, Any]:
    """One call with its values in the form that is passed to another process."""
    if not isinstance(case["arguments"], list | tuple | dict):
        raise TriviumError(
            "The arguments of a call in a program's tests are a list, or an object for arguments by name; "
            f"not {shortened(case['arguments'])!r}."
        )
    try:
        return case | {name: values.encode(case[name]) for name in ("arguments", "expected")}
    except (values.Unplain, ValueError) as error:
        raise TriviumError(f"A call in a program's tests holds what cannot be passed: {error}.") from error


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
