"""Texts, rows and programs that would fool, stall or break a grader."""

import io
import json
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from attack.frame import attack, refusal
from trivium.grade.code import CodeScorer, program_of, read_tests
from trivium.grade.command import show
from trivium.grade.scorer import Score, scorer
from trivium.kit.errors import TriviumError

_SQUARE = "def f(x):\n    return x * x\n"
_YES = "def isclose(*a, **k): return True\nclass math: isclose = staticmethod(lambda *a: True)\n"
# Tests, and a program that must not pass them nor be excused from them.
EXCUSES: dict[str, tuple[str, Any, str | None]] = {
    **{
        f"{kind} from a call at module level": (f"def f(x): raise {kind}", "y = f(3)\nassert y == 9", None)
        for kind in ("SyntaxError", "ImportError", "NameError", "KeyboardInterrupt", "SystemExit")
    },
    "MemoryError from a call": ("def f(x): raise MemoryError", ["assert f(3) == 9"], None),
    "no such function": ("x = 1", ["assert f(3) == 9"], None),
    "no such function, imported": ("x = 1", "from solution import f\nassert f(3) == 9", None),
    "no such function, as an attribute": ("x = 1", "import solution\nassert solution.f(3) == 9", None),
    "no such function, in a TestCase": (
        "x = 1",
        "import unittest\nfrom main import *\nclass T(unittest.TestCase):\n"
        "    def test(self): self.assertEqual(f(3), 9)",
        None,
    ),
    "isclose of its own, imported after the tests'": (
        f"{_YES}def f(x): return 0",
        "from math import isclose\nfrom solution import *\nassert isclose(f(2), 4)",
        None,
    ),
    "isclose of its own, which the tests forgot": (
        f"{_YES}def f(x): return 0", "assert isclose(f(2), 4)", None
    ),
    "math of its own": (
        f"{_YES}def f(x): return 0", "import math\nfrom main import *\nassert math.isclose(f(2), 4)", None
    ),
    "emptying what it is compared with": (
        "def f(x):\n    x.clear()\n    return []", ["a = [2, 1]\nassert f(a) == sorted(a)"], None
    ),
    "leaving after the first test": (
        "n = 0\ndef f(x):\n    global n\n    n += 1\n    import os\n    if n > 1: os._exit(0)\n    return 9",
        ["assert f(3) == 9", "assert f(4) == 16"],
        None,
    ),
    "an argument that becomes another type": (
        "def f(x):\n    x.append(x)", "a = []\nf(a)\nassert a == [1]", None
    ),
}  # fmt: skip


@attack("grader of programs", cases=EXCUSES)
def excuse(scratch: Path, case: tuple[str, Any, str | None]) -> None:
    """The program is judged, and judged wrong."""
    program, tests, entry_point = case
    score = CodeScorer(seconds=2.0).run(program, read_tests(tests, entry_point))
    assert score.value == 0.0, score


HONEST: dict[str, tuple[str, Any]] = {
    "sorting in place": ("def f(x): x.sort()", "a = [2, 1]\nf(a)\nassert a == [1, 2]"),
    "arguments by name": ("def f(x): return x", [{"function": "f", "arguments": {"x": 1}, "expected": 1}]),
    "a set as the result": ("def f(x): return {x}", [{"function": "f", "arguments": [1], "expected": {1}}]),
    "isclose as the tests have it": (
        "def f(x): return x * x + 1e-12",
        "from math import isclose\nfrom solution import *\nassert isclose(f(2), 4)",
    ),
}


@attack("grader of programs", "an honest program", cases=HONEST)
def honest(scratch: Path, case: tuple[str, Any]) -> None:
    """An honest program still passes."""
    assert CodeScorer(seconds=2.0).run(case[0], read_tests(case[1])).value == 1.0


TESTS: dict[str, Any] = {
    "none": None, "a number": 3, "an empty list": [], "null": "null", "lists in a list": [["assert f(1)"]],
    "unequal inputs and outputs": {"inputs": [1], "outputs": [1, 2]},
    "inputs that are none": {"inputs": None, "outputs": [1]}, "arguments that are none": [
        {"function": "f", "arguments": None, "expected": 1}
    ],
    "an expected object": [{"function": "f", "arguments": [1], "expected": object()}],
    "brackets without end": "[" * 100_000, "tests with a null byte": "assert f(1) == 1\x00",
    "tests with a lone surrogate": "assert f(1) == '\ud800'", "200,000 tests": "assert f(1) == 1\n" * 200_000,
}  # fmt: skip


@attack("grader of programs", "tests that are", cases=TESTS)
def odd_tests(scratch: Path, tests: Any) -> None:
    """Odd tests are no fault of the program: one sentence, or a score that does not count."""
    try:
        score = CodeScorer(seconds=5.0).run(_SQUARE, read_tests(tests))
    except TriviumError:
        return
    assert score.value is None or score.status == "overtime", score


_LONG = 100_000
RUNS = {
    f"a run of {piece!r}": begin + piece * (_LONG // len(piece))
    for begin, piece in (
        *(("", piece) for piece in (" ", "\n", "```\n", "*a", "<<", "[", "(", "'", "a-", "<think>", "#### ")),
        *(
            ("", piece)
            for piece in ("\\boxed{", "answer is ", "P.", "1", "\\", "$a", "{", "\\text{", " \n", "1=")
        ),
        *(("```", "\t"), ("```", "a"), ("<<", "a"), ("####", "\t"), ("```json\n", "\n\n"), ("select ", "((")),
    )
}
_CHECKS = {
    "keywords:existence": {"keywords": ["a"]},
    "language:response_language": {"language": "en"},
    "length_constraints:number_sentences": {"num_sentences": 3},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 3},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
}


@attack("grader of texts", cases=RUNS)
def long_run(scratch: Path, text: str) -> None:
    """Every grader reads 100,000 characters within seconds."""
    start = time.process_time()
    program_of(text)
    scorer("math")(text, gold="3")
    scorer("steps")(text)
    scorer("format", schema={"type": "object"})(text)
    scorer("format", tags=("a", "b"))(text)
    scorer("sql", database="CREATE TABLE a (x)")(text, sql="SELECT 1")
    checks = [{"check": name, "arguments": arguments} for name, arguments in _CHECKS.items()]
    scorer("instructions")(text, checks=checks)
    assert time.process_time() - start < 10


ANSWERS = {
    "a power of powers": "10^{10^{10^{10}}}",
    "a factorial of factorials": "9!!!!!!",
    "a long power": "9^{99999999}",
    "a million digits": "9" * 1_000_000,
    "a deep fraction": "\\frac{1}{" * 500 + "2" + "}" * 500,
    "brackets": "(" * 3000 + "1" + ")" * 3000,
    "many answers": "\\boxed{1}" * 5000,
    "a lone surrogate": "\ud800",
    "a binomial": "\\binom{999999999}{499999999}",
    "a large exponent": "1e999999999",
    "an interval": "[0," * 300,
}


@attack("grader of texts", "an answer that is", cases=ANSWERS)
def hostile_answer(scratch: Path, answer: str) -> None:
    """An answer or a gold answer of this kind has a score within seconds, and never a point."""
    start = time.process_time()
    for text in (answer, f"\\boxed{{{answer}}}"):
        assert scorer("math")(text, gold="7").value in (0.0, None)
        assert scorer("math")("7", gold=text).value in (0.0, None)
    assert time.process_time() - start < 20


@attack("grader of texts", "a pattern without end", cases={"nested": "(a+)+b", "two ways": "(a|a)*b"})
def endless_pattern(scratch: Path, pattern: str) -> None:
    """A pattern that backtracks for ever is given up."""
    score = scorer("format", pattern=pattern)("a" * 5000)
    assert (score.value, score.status) == (0.0, "overtime")
    assert scorer("format", pattern=pattern)("aab").value == 1.0


SCHEMAS: dict[str, Any] = {
    "refers to itself": {"$ref": "#"},
    "refers to itself through a choice": {"anyOf": [{"$ref": "#"}]},
    "branches 2 ** 40 times": {
        "$ref": "#/$defs/p0",
        "$defs": {
            **{f"p{n}": {"anyOf": [{"$ref": f"#/$defs/p{n + 1}"}] * 2} for n in range(40)},
            "p40": False,
        },
    },
    "has a text for a number": {"minimum": "1"},
    "is a number": 7,
}


@attack("grader of texts", "a schema that", cases=SCHEMAS)
def hostile_schema(scratch: Path, schema: Any) -> None:
    """Such a schema is refused in a sentence."""
    with refusal():
        scorer("format", schema=schema)("1")


SCRIPTS = {
    "attaches a file": "CREATE TABLE a (x); ATTACH '{place}' AS b; CREATE TABLE b.c (x);",
    "copies itself into a file": "CREATE TABLE a (x); VACUUM INTO '{place}';",
    "counts for ever": "CREATE TABLE a AS WITH RECURSIVE r(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r) "
    "SELECT max(x) FROM r;",
}


@attack("grader of texts", "a script for a data base that", cases=SCRIPTS)
def hostile_script(scratch: Path, script: str) -> None:
    """A row's script reaches no file and ends."""
    place = scratch / "made.sqlite"
    with refusal("fails"):
        scorer("sql", database=script.format(place=place))("SELECT 1", sql="SELECT 1")
    assert not place.exists()


@attack("grader of texts", "what a terminal would obey")
def escape_sequences(scratch: Path) -> None:
    """`trivium grade` prints neither escape sequences nor a lone surrogate as they are."""
    for as_json in (False, True):
        said = io.StringIO()
        with redirect_stdout(said):
            show(Score(0.0, "\x1b]0;title\x07 \x1b[2J \ud800 \r\n", "wrong"), as_json)
        printed = said.getvalue()
        assert all(letter.isprintable() for letter in printed.removesuffix("\n")), printed
        printed.encode()
        if as_json:
            assert json.loads(printed)["score"] == 0.0
