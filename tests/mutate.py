"""Mutation testing: change one place of a package, run the test files that import it, see whether one fails.

    python tests/mutate.py trivium/learn --count 20 --seed 1

A mutant is one small edit at a random place: another operator, comparison, sign or constant, `min` for
`max`, a keyword argument, method call or statement left out, a condition negated, `None` returned. Every
kind is equally likely, whatever the tests. Each mutant runs in a process of its own on a scratch copy,
the quick tests first. A test that fails must pass without the mutant, or the run stops. Mutants that
change nothing a test could see stand in `equivalent_mutants.txt`, with the reason, and are left out of
the score.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
EQUIVALENT = Path(__file__).parent / "equivalent_mutants.txt"
OPERATORS = {"Add": ast.Sub, "Sub": ast.Add, "Mult": ast.Div, "Div": ast.Mult, "FloorDiv": ast.Mult}
OPERATORS |= {"Mod": ast.FloorDiv, "BitAnd": ast.BitOr, "BitOr": ast.BitAnd, "Pow": ast.Mult}
COMPARISONS = {"Lt": ast.LtE, "LtE": ast.Lt, "Gt": ast.GtE, "GtE": ast.Gt, "Eq": ast.NotEq, "NotEq": ast.Eq}
COMPARISONS |= {"In": ast.NotIn, "NotIn": ast.In, "Is": ast.IsNot, "IsNot": ast.Is}
NAMES = {"min": "max", "sum": "mean", "any": "all", "floor": "ceil", "amin": "amax", "minimum": "maximum"}
NAMES |= {swapped: name for name, swapped in NAMES.items()}
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
            yield "constant", node, ast.Constant(value + 1)
            yield "constant", node, ast.Constant(value - 1)
        case ast.Call(function, arguments, keywords):
            if isinstance(function, ast.Name) and function.id in NAMES and function.id != "sum":
                yield "name", function, ast.Name(NAMES[function.id])
            if isinstance(function, ast.Attribute) and function.attr in NAMES:
                yield "name", function, ast.Attribute(function.value, NAMES[function.attr])
            for keyword in keywords:
                kept = [other for other in keywords if other is not keyword]
                yield "keyword", node, ast.Call(function, arguments, kept)
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


class Imports:
    """Which test files import which modules, and how directly."""

    def __init__(self) -> None:
        paths = [path for folder in ("trivium", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
        self.files = {_module(str(path.relative_to(ROOT))): path for path in paths}
        self.texts = {name: path.read_text() for name, path in self.files.items()}
        self.edges = {name: self._imported(text) for name, text in self.texts.items()}
        self.tests = [name for name in self.files if name.startswith("tests.test_")]
        for module, text in self.texts.items():
            # A recipe in a test names the kind of a stage, not the module that holds it.
            for kind in re.findall(r"^    kind: Literal\[\"(\w+)\"", text, re.MULTILINE):
                used = re.compile(rf"kind[\"']?[:=] *[\"']?{kind}\b")
                for test in self.tests:
                    self.edges[test] |= {module} if used.search(self.texts[test]) else set()

    def _imported(self, text: str) -> set[str]:
        names: set[str] = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= (inside & self.files.keys()) or {node.module}
        return {name if name in self.files else f"tests.{name}" for name in names} & self.files.keys()

    def distances(self, test: str) -> dict[str, int]:
        """How many imports lead from a test to every module; those inside `tests` cost none."""
        found, waiting = {test: 0}, [test]
        while waiting:
            importer = waiting.pop(0)
            for name in self.edges[importer] - found.keys():
                inside = name.startswith("tests.")
                found[name] = found[importer] + (not inside)
                waiting.insert(0 if inside else len(waiting), name)
        return found

    def tests_of(self, path: str, least: int, most: int) -> list[str]:
        """The test files that import a module, the likeliest first; where they are few, the next nearest."""
        module, ranked = _module(path), []
        words = set(re.split(r"[._]", module))
        for test in self.tests:
            found = self.distances(test)
            shared = len(words & set(re.split(r"[._]", test)))
            if module in found:
                wide = sum(distance == 1 for distance in found.values())
                ranked.append((found[module], -shared, wide, str(self.files[test].relative_to(ROOT))))
        direct = sum(distance == 1 for distance, *_ in ranked)
        return [file for *_, file in sorted(ranked)[: min(max(direct, least), most)]]


def _module(path: str) -> str:
    return ".".join(Path(path).with_suffix("").parts).removesuffix(".__init__")


def failing(scratch: Path, tests: list[str], limit: float) -> str | None:
    """The first test that fails, those that are not slow first; `None` when all pass or the time is over."""
    environment, end = os.environ | {"PYTHONPATH": str(scratch)}, time.monotonic() + limit
    for marks in ("not slow", "slow"):
        words = ["-x", "-p", "no:cacheprovider", "-rfE", "--tb=no", "--timeout=200", "-m", marks, *tests]
        command, left = [sys.executable, "-m", "pytest", *words], end - time.monotonic()
        try:
            ran = subprocess.run(
                command, cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            return None
        if ran.returncode not in (0, 5):
            named = re.search(r"^(?:FAILED|ERROR) ([^\s\[]+)", ran.stdout, re.MULTILINE)
            return named[1] if named else tests[0]
    return None


def main() -> None:
    """Draw mutants, run their tests, print what became of each and the score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("packages", nargs="+", help="folders or files, such as trivium/learn")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--files", type=int, nargs=2, default=(3, 5), help="least and most test files")
    parser.add_argument("--limit", type=float, default=600, help="seconds for the tests of one mutant")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests; run nothing")
    asked = parser.parse_args()
    paths = {file for name in asked.packages for file in [ROOT / name, *(ROOT / name).rglob("*.py")]}
    lines = EQUIVALENT.read_text().splitlines() if EQUIVALENT.exists() else []
    reasons = dict(line.split("  # ", 1) for line in lines if "  # " in line)
    imports, sound, score = Imports(), set[str](), defaultdict[str, int](int)
    with tempfile.TemporaryDirectory() as scratch:
        listing = ["git", "ls-files", "-co", "--exclude-standard"]
        for name in subprocess.check_output(listing, cwd=ROOT, text=True).split():
            (Path(scratch) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(scratch) / name)
        for mutant in drawn(sorted(path for path in paths if path.is_file()), asked.count, asked.seed):
            tests = imports.tests_of(mutant.path, *asked.files)
            start, verdict, detail = time.monotonic(), "listed", " ".join(tests)
            reason = reasons.get(f"{mutant.path}: {mutant.before} -> {mutant.after}")
            if reason:
                verdict, detail = "equivalent", reason
            elif not asked.list:
                (Path(scratch) / mutant.path).write_text(mutant.text)
                test = failing(Path(scratch), tests, asked.limit)
                shutil.copy2(ROOT / mutant.path, Path(scratch) / mutant.path)
                verdict, detail = ("killed", test) if test else ("survived", detail)
                if test and test not in sound and failing(Path(scratch), [test], asked.limit):
                    sys.exit(f"{test} fails without a mutant too; repair it first")
                sound.add(detail)
            score[verdict] += 1
            seconds = time.monotonic() - start
            print(f"{verdict} {mutant.path}:{mutant.line} ({mutant.kind}, {seconds:.0f} s) {detail}")
            print(f"    - {mutant.before}\n    + {mutant.after}", flush=True)
    killed, tried = score["killed"], max(1, score["killed"] + score["survived"])
    print(f"{killed} of {tried} killed ({killed / tried:.0%}), {score['equivalent']} equivalent")


if __name__ == "__main__":
    main()
