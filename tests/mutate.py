"""Mutation testing: change one place of a package, run the test files that import it, see whether one fails.

    python tests/mutate.py trivium/learn --count 20 --seed 1

A mutant is one small edit at a random place: another operator, comparison, sign or constant, `min` for
`max`, a keyword argument, method call or statement left out, a condition negated, `None` returned. Every
kind is equally likely, whatever the tests. Each mutant runs in a process of its own on a scratch copy,
the quick tests first. A test that fails must pass without the mutant, or the mutant is not counted.
Mutants that change nothing a test could see stand in `equivalent_mutants.txt`, with the reason, and are
left out of the score.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType

import pytest
from imports import Imports

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"
OPERATORS = {"Add": ast.Sub, "Sub": ast.Add, "Mult": ast.Div, "Div": ast.Mult, "FloorDiv": ast.Mult}
OPERATORS |= {"Mod": ast.FloorDiv, "BitAnd": ast.BitOr, "BitOr": ast.BitAnd, "Pow": ast.Mult}
COMPARISONS = {"Lt": ast.LtE, "LtE": ast.Lt, "Gt": ast.GtE, "GtE": ast.Gt, "Eq": ast.NotEq, "NotEq": ast.Eq}
COMPARISONS |= {"In": ast.NotIn, "NotIn": ast.In, "Is": ast.IsNot, "IsNot": ast.Is}
NAMES = {"min": "max", "sum": "mean", "any": "all", "floor": "ceil", "amin": "amax", "minimum": "maximum"}
NAMES |= {swapped: name for name, swapped in NAMES.items()}
LIMIT = 900
"""Seconds for the tests of one mutant."""
UNTOUCHED = {"annotation", "returns", "decorator_list", "bases", "type_params"}


@dataclass(frozen=True)
class Mutant:
    """One edit of one file: the changed lines before and after it, and the file's whole new text."""

    path: str
    line: int
    kind: str
    before: str
    after: str
    text: str


def edits(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """The kind, the node to replace and the node that replaces it, for every edit of one node."""
    match node:
        case ast.BinOp(left, operator, right) if type(operator).__name__ in OPERATORS:
            if not any(isinstance(getattr(side, "value", 0), str) for side in (left, right)):
                yield "operator", node, ast.BinOp(left, OPERATORS[type(operator).__name__](), right)
                yield "term", node, left
        case ast.UnaryOp(ast.USub(), operand) if not isinstance(operand, ast.Constant):
            yield "sign", node, operand
        case ast.UnaryOp(ast.Not(), operand):
            yield "negation", node, operand
        case ast.Compare(left, [operator], [right]):
            yield "comparison", node, ast.Compare(left, [COMPARISONS[type(operator).__name__]()], [right])
        case ast.BoolOp(operator, values):
            yield "logic", node, ast.BoolOp(ast.Or() if isinstance(operator, ast.And) else ast.And(), values)
            yield "logic", node, values[0]
        case ast.Constant(bool() as value):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield from (("constant", node, ast.Constant(value + step)) for step in (1, -1))
        case ast.Call(function, arguments, keywords):
            if isinstance(function, ast.Name) and function.id in {"min", "max", "any", "all"}:
                yield "name", function, ast.Name(NAMES[function.id])
            if isinstance(function, ast.Attribute) and function.attr in NAMES:
                yield "name", function, ast.Attribute(function.value, NAMES[function.attr])
            for at in range(len(keywords)):
                yield "keyword", node, ast.Call(function, arguments, keywords[:at] + keywords[at + 1 :])
            if isinstance(function, ast.Attribute) and not keywords and not arguments:
                yield "method", node, function.value
        case ast.If(test) | ast.IfExp(test) | ast.While(test) if "TYPE" not in ast.unparse(test):
            yield "condition", test, ast.UnaryOp(ast.Not(), test)
        case ast.comprehension(_, _, [test, *_]):
            yield "condition", test, ast.Constant(True)
        case ast.Return(ast.expr() as value) if not isinstance(value, ast.Constant):
            yield "return", node, ast.Return(ast.Constant(None))
        case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield "statement", node, ast.Pass()


def places(node: ast.AST) -> Iterator[ast.AST]:
    """Every node to change: all but annotations, decorators, assertions, errors and f-strings."""
    yield node
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            spared = name in UNTOUCHED or isinstance(child, ast.Assert | ast.JoinedStr | ast.Raise)
            if isinstance(child, ast.AST) and not spared:
                yield from places(child)


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Every mutant of one file."""
    lines = path.read_text().splitlines(keepends=True)
    for node in places(ast.parse("".join(lines))):
        for kind, old, new in edits(node):
            assert isinstance(old, ast.expr | ast.stmt)
            first, last = old.lineno - 1, (old.end_lineno or old.lineno) - 1
            written = ast.unparse(new) if isinstance(new, ast.stmt) else f"({ast.unparse(new)})"
            head = lines[first].encode()[: old.col_offset].decode()
            tail = lines[last].encode()[old.end_col_offset :].decode()
            before, after = "".join(lines[first : last + 1]), head + written + tail
            text = "".join(lines[:first]) + after + "".join(lines[last + 1 :])
            shown = " ".join(before.split()), " ".join(after.split())
            yield Mutant(str(path.relative_to(ROOT)), old.lineno, kind, *shown, text)


def drawn(paths: list[Path], count: int, seed: int) -> list[Mutant]:
    """`count` mutants, every kind equally often where it has places left, at most one of a line."""
    kinds: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in (mutant for path in paths for mutant in mutants_of(path)):
        kinds[mutant.kind].append(mutant)
    chance = random.Random(seed)
    chosen: dict[tuple[str, int], Mutant] = {}
    while any(kinds.values()) and len(chosen) < count:
        places_left = kinds[chance.choice(sorted(kind for kind in kinds if kinds[kind]))]
        mutant = places_left.pop(chance.randrange(len(places_left)))
        chosen.setdefault((mutant.path, mutant.line), mutant)
    return list(chosen.values())


def _run(scratch: str, words: list[str], said: Connection) -> None:
    """In a process of its own: run pytest on the copy and say which test fails first."""
    os.setsid()
    os.chdir(scratch)
    os.environ["PYTHONPATH"] = scratch
    # A mutant as long as its line, written in the same second, would be taken for what was compiled.
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path[:] = [scratch, *(path for path in sys.path if not path.startswith(str(ROOT / "tests")))]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def report(report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            said.send(report.nodeid.split("[")[0])

    plugin = ModuleType("first_failure")
    plugin.__dict__.update(pytest_runtest_logreport=report, pytest_collectreport=report)
    os._exit(pytest.main(words, plugins=[plugin]))


def failing(scratch: str, tests: list[str]) -> str | None:
    """The first test that fails, those that are not slow first; `None` when all pass or the time is over."""
    end = time.monotonic() + LIMIT
    for marks in ("not slow", "slow"):
        words = ["-x", "-q", "-p", "no:cacheprovider", "--timeout=200", "-m", marks, *tests]
        heard, said = Pipe(duplex=False)
        process = get_context("fork").Process(target=_run, args=(scratch, words, said))
        process.start()
        process.join(max(0.0, end - time.monotonic()))
        if process.exitcode is None:
            os.killpg(process.pid or 0, signal.SIGKILL)
            return None
        if process.exitcode not in (0, 5):
            return str(heard.recv()) if heard.poll() else tests[0]
    return None


def main() -> None:
    """Draw mutants, run their tests, print what became of each and the score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("packages", nargs="+", help="folders or files, such as trivium/learn")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of them, tried before")
    parser.add_argument("--files", type=int, nargs=2, default=(3, 5), help="least and most test files")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests; run nothing")
    asked = parser.parse_args()
    paths = {file for name in asked.packages for file in [ROOT / name, *(ROOT / name).rglob("*.py")]}
    reasons = dict(line.split("  # ") for line in EQUIVALENT.read_text().splitlines() if "  # " in line)
    # Imported once here, what takes seconds to import costs the processes that fork from this one nothing.
    for name in () if asked.list else ("conftest", "torch", "transformers", "peft", "trl", "hypothesis"):
        import_module(name)
    sys.modules.pop("conftest", None)
    imports, sound, score = Imports(), set[str](), defaultdict[str, int](int)
    with tempfile.TemporaryDirectory() as scratch:
        listing = ["git", "ls-files", "-co", "--exclude-standard"]
        for name in subprocess.check_output(listing, cwd=ROOT, text=True).split():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(scratch) / name)
        mutants = drawn(sorted(path for path in paths if path.is_file()), asked.count, asked.seed)
        for mutant in mutants[asked.skip :]:
            tests = imports.tests_of(mutant.path, *asked.files)
            start, verdict, detail = time.monotonic(), "listed", " ".join(tests)
            reason = reasons.get(f"{mutant.path}: {mutant.before} -> {mutant.after}")
            if reason:
                verdict, detail = "equivalent", reason
            elif not asked.list:
                file = Path(scratch) / mutant.path
                original = file.read_text()
                file.write_text(mutant.text)
                test = failing(scratch, tests)
                file.write_text(original)
                verdict, detail = ("killed", test) if test else ("survived", detail)
                if test and test not in sound and failing(scratch, [test]):
                    # Chance, or a bug that a random example found: it says nothing about the mutant.
                    verdict, detail = "unsound", f"{test} fails without the mutant too; repair it first"
                else:
                    sound.add(detail)
            score[verdict] += 1
            seconds = time.monotonic() - start
            print(f"{verdict} {mutant.path}:{mutant.line} ({mutant.kind}, {seconds:.0f} s) {detail}")
            print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
    killed, tried = score["killed"], max(1, score["killed"] + score["survived"])
    apart = f"{score['equivalent']} equivalent, {score['unsound']} without a verdict"
    print(f"{killed} of {tried} killed ({killed / tried:.0%}), {apart}")


if __name__ == "__main__":
    main()
