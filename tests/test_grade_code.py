# ruff: noqa: E501
"""The scorer of programs: which are run, what of them is judged, and whose fault a failure was."""

import gzip
import json
import os
from pathlib import Path

import pytest
from test_grade_scorers import value

from trivium.grade.code import CodeScorer, Exam, program_of, read_tests
from trivium.grade.rewards import combine
from trivium.kit.errors import TriviumError

DATA = Path(os.environ.get("TRIVIUM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def test_programs_are_found_in_what_a_model_writes() -> None:
    assert program_of("Here:\n```python\nx = 1\n```\nand\n```py\nx = 2\n```") == "x = 2\n"
    assert program_of("x = 3") == "x = 3"
    assert program_of("<think>```python\nx = 1\n```</think>```\nx = 2\n```") == "x = 2\n"
    assert program_of("```bash\nls\n```") is None
    assert program_of("") is None


SQUARE = "def f(x):\n    return x * x\n"


@pytest.mark.parametrize(
    ("program", "tests", "entry_point", "wanted", "status"),
    [
        (SQUARE, ["assert f(3) == 9", "assert f(-1) == 1"], None, 1.0, "ok"),
        (SQUARE, "from solution import f\ndef test_it():\n    assert f(3) == 9", None, 1.0, "ok"),
        (SQUARE, "import unittest\nfrom main import f\nclass T(unittest.TestCase):\n"
                 "    def test_it(self): self.assertEqual(f(3), 9)", None, 1.0, "ok"),
        (SQUARE, [{"arguments": [3], "expected": 9}], "f", 1.0, "ok"),
        (SQUARE, [{"arguments": [3], "expected": 9.0}], "f", 0.0, "wrong"),
        (SQUARE, {"inputs": [[3]], "outputs": [9], "fn_name": "f"}, None, 1.0, "ok"),
        ("print(int(input()) ** 2)", [{"input": "3\n", "output": "9"}], None, 1.0, "ok"),
        ("print(10)", [{"input": "3\n", "output": "9"}], None, 0.0, "wrong"),
        ("print(9)\nraise ValueError", [{"input": "", "output": "9"}], None, 0.0, "wrong"),
        ("print(9); exit()", [{"input": "", "output": "9"}], None, 1.0, "ok"),
        ("while True: print(9)", [{"input": "", "output": "9"}], None, 0.0, "wrong"),
        ("while True: pass", [{"input": "", "output": "9"}], None, 0.0, "overtime"),
        ("x = bytearray(600 << 20)", [{"input": "", "output": "9"}], None, 0.0, "memory"),
        ("x = [0] * 10**10", [{"input": "", "output": "9"}], None, 0.0, "memory"),
        ("def f(x): return x +", ["assert f(3) == 9"], None, 0.0, "compile"),
        ("def g(x): return 9", "def check(c): assert c(3) == 9", "f", 0.0, "wrong"),
        (SQUARE, "def check(c): assert c(3) == 9", None, None, "gold_bad"),
        (SQUARE, "def check(c): pass", "f", None, "gold_bad"),
        (SQUARE, "def check(c:", "f", None, "gold_bad"),
        (SQUARE, "import nowhere_to_be_found\nassert f(3) == 9", None, None, "gold_bad"),
        (SQUARE, "x = 1", None, None, "gold_bad"),
        (SQUARE, "assert f(lambda: 1) == 9", None, None, "gold_bad"),
        ("class S:\n    def __init__(self): self.a = []\n    def add(self, x): self.a.append(x); return len(self.a)",
         ["s = S()\nassert s.add(3) == 1\nassert s.add(4) == 2"], None, 1.0, "ok"),
        ("def f(x): yield from range(x)", ["assert list(f(3)) == [0, 1, 2]"], None, 1.0, "ok"),
        ("def f(x): raise ValueError('no')",
         ["try:\n    f(1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'no'"], None, 1.0, "ok"),
        ("from collections import Counter\nf = Counter", ["assert f('aab') == {'a': 2, 'b': 1}"], None, 1.0, "ok"),
        ("def f(*a, **k): return (a, k, {1: (2,)}, {3}, 10**50, float('inf'), b'x', 1j, range(3))",
         ["assert f(1, b=2) == ((1,), {'b': 2}, {1: (2,)}, {3}, 10**50, float('inf'), b'x', 1j, range(3))"],
         None, 1.0, "ok"),
        ("def f(x): return len(x)\ndef len(x): return 7", ["assert len([1]) == 1\nassert f([1]) == 7"], None, 1.0, "ok"),
        ("def f(x):\n    x.append(1)\n    return x", ["a = []\nassert f(a) == [1] and a == []"], None, 1.0, "ok"),
        ("def f(x): raise StopIteration", ["assert all(map(f, [1, 2]))"], None, 0.0, "wrong"),
        ("def f(x): return object()", ["assert f(1)"], None, 0.0, "wrong"),
        ("import sys\ndef f(x): sys.exit(0)", ["try:\n    f(1)\nexcept Exception:\n    pass\nassert True"], None, 1.0, "ok"),
        ("import os\ndef f(x): os._exit(0)", ["try:\n    assert f(1)\nexcept Exception:\n    pass"], None, 0.0, "wrong"),
        ("def f(x): x.sort()", "a = [3, 1, 2]\nf(a)\nassert a == [1, 2, 3]", None, 1.0, "ok"),
        ("def f(x): x.sort()", "def check(c):\n    a = [3, 1, 2]\n    assert c(a) is None\n    assert a == [1, 2, 3]", "f", 1.0, "ok"),
        ("def f(m):\n    for row in m: row.reverse()",
         "a = [[1, 2], [3, 4]]\nrow = a[0]\nf(a)\nassert a == [[2, 1], [4, 3]] and row == [2, 1]", None, 1.0, "ok"),
        ("def f(d, s, b):\n    d['k'] = [1]\n    s.add(2)\n    b.append(3)\n",
         "d, s, b = {}, {1}, bytearray()\nf(d, s=s, b=b)\nassert (d, s, b) == ({'k': [1]}, {1, 2}, b'\\x03')", None, 1.0, "ok"),
        ("def f(x): x.clear(); return []", ["a = [3, 1]\nassert f(a) == sorted(a)"], None, 0.0, "wrong"),
        ("def f(x): raise SyntaxError('the tests')", "y = f(3)\nassert y == 9", None, 0.0, "wrong"),
        ("def f(x): raise ImportError('math')", "y = f(3)\nassert y == 9", None, 0.0, "wrong"),
        ("def f(x): raise NameError('f')", "y = f(3)\nassert y == 9", None, 0.0, "wrong"),
        ("x = 1", ["assert f(3) == 9"], None, 0.0, "wrong"),
        ("x = 1", ["assert True", "assert f(3) == 9"], None, 0.0, "wrong"),
        ("x = 1", "from solution import f\nassert f(3) == 9", None, 0.0, "wrong"),
        ("x = 1", "import solution\nassert solution.f(3) == 9", None, 0.0, "wrong"),
        ("x = 1", "import unittest\nfrom main import *\nclass T(unittest.TestCase):\n"
                  "    def test_it(self): self.assertEqual(f(3), 9)", None, 0.0, "wrong"),
        (SQUARE, "assert f(3) == 9\nimport nowhere_to_be_found", None, None, "gold_bad"),
        (SQUARE, "def test():\n    if False: y = 1\n    assert y == f(1)", None, None, "gold_bad"),
        (SQUARE, "assert f('x' * 9000000)", None, None, "gold_bad"),
        ("def f(x): return x", [{"arguments": {"x": 3}, "expected": 3}], "f", 1.0, "ok"),
        ("def f(x): return x", [{"arguments": [{3}], "expected": {3}}], "f", 1.0, "ok"),
        ("print(input())", [{"input": "\ud800", "output": "\ud800"}], None, 1.0, "ok"),
        ("def f(g, x): return g(g(x))\ndef h(x): return x + 1", ["assert f(h, 1) == 3"], None, 1.0, "ok"),
    ],
)  # fmt: skip
def test_code(
    program: str, tests: object, entry_point: str | None, wanted: float | None, status: str
) -> None:
    score = CodeScorer(seconds=2.0).run(program, read_tests(tests, entry_point))
    assert (score.value, score.status) == (wanted, status), score


def test_many_programs_are_scored_side_by_side_in_their_order() -> None:
    reward = combine([{"name": "code", "seconds": 5.0, "together": 4}]).rewards[0]
    programs = [f"def f(x):\n    return x * x + {n % 3}\n" for n in range(12)]
    values = reward(["p"] * 12, programs, tests=["assert f(3) == 9"] * 12)
    assert values == [float(n % 3 == 0) for n in range(12)]


def test_part_of_the_tests_counts_only_where_asked() -> None:
    tests = ["assert f(3) == 9", "assert f(3) == 10"]
    assert value("code", SQUARE, tests=tests) == 0.0
    assert value("code", SQUARE, {"partial": True}, tests=tests) == 0.5
    lines = [{"input": "3", "output": "9"}, {"input": "3", "output": "8"}]
    assert value("code", "print(9)", {"partial": True}, tests=lines) == 0.5


def test_the_yardstick_is_the_tasks_not_the_programs() -> None:
    prelude = "def distance(a, b):\n    return abs(a - b)\n\ndef f(x):\n    '''Half of x.'''\n"
    tests = Exam(("def check(c):\n    assert distance(c(3), 1.5) < 0.1\n",), entry_point="f", prelude=prelude)
    assert CodeScorer().run("def f(x): return x / 2", tests).value == 1.0
    assert CodeScorer().run("def distance(a, b): return 0\ndef f(x): return 99", tests).value == 0.0
    forged = "def abs(x): return 0\ndef f(x): return 99"
    assert CodeScorer().run(forged, tests).value == 0.0


@pytest.mark.parametrize(
    ("prelude", "tests"),
    [
        ("", "from math import isclose\nfrom solution import *\nassert isclose(f(2), 4)"),
        ("from math import isclose", "from solution import *\nassert isclose(f(2), 4)"),
        ("", "def isclose(a, b): return a == b\nfrom solution import *\nassert isclose(f(2), 4)"),
        ("", "import math\ntry:\n    from main import *\nfinally: pass\nassert math.isclose(f(2), 4)"),
        ("", "assert isclose(f(2), 4)"),
        (
            "",
            "import solution\nfrom solution import *\nfrom copy import deepcopy as isclose\nassert f(2) == 4",
        ),
    ],
)
def test_a_program_does_not_take_the_place_of_what_the_tests_measure_with(prelude: str, tests: str) -> None:
    forged = "class math: isclose = staticmethod(lambda *a: True)\ndef isclose(*a, **k): return True\n"
    exam = Exam((tests,), prelude=prelude)
    assert CodeScorer().run(f"{forged}def f(x): return 0", exam).value == 0.0
    assert CodeScorer().run(f"{forged}def f(x): return x * x", exam).value == 1.0


@pytest.mark.parametrize(
    "tests",
    [
        None, 3, [], {}, "null", "None", "", [["assert f(1) == 1"]], ["assert f(1)", {"arguments": [], "expected": 1}],
        {"inputs": [1], "outputs": [1, 2]}, {"inputs": None, "outputs": [1]}, {"inputs": 3, "outputs": 4},
        [{"arguments": 3, "expected": 3}], [{"arguments": None, "expected": 3}],
        [{"arguments": [3], "expected": object()}], [{"arguments": [3], "expected": 3, "function": 7}],
    ],
    # An address in a name would differ from one worker to the next.
    ids=lambda tests: repr(tests).partition(" at 0x")[0],
)  # fmt: skip
def test_what_is_no_tests_is_said_in_one_sentence(tests: object) -> None:
    with pytest.raises(TriviumError):
        read_tests(tests, "f")


def test_tests_nested_too_deeply_are_no_fault_of_the_program() -> None:
    for tests in ("[" * 100_000, "assert f(1) == " + "(" * 1000 + "1" + ")" * 1000, "assert f(1) == 1\x00"):
        score = CodeScorer().run(SQUARE, read_tests(tests, "f"))
        assert (score.value, score.status) == (None, "gold_bad"), score
    for arguments in (("f", 3), (3, "")):
        with pytest.raises(TriviumError, match="is text"):
            read_tests("assert f(1)", *arguments)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "HumanEval.jsonl.gz").exists(), reason="HumanEval is not here")
def test_humanevals_own_solutions_pass_and_empty_ones_do_not() -> None:
    with gzip.open(DATA / "HumanEval.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    code = CodeScorer()
    passed = failed = 0
    for row in rows:
        exam = Exam((row["test"],), entry_point=row["entry_point"], prelude=row["prompt"])
        passed += code.run(row["prompt"] + row["canonical_solution"], exam).value == 1.0
        failed += code.run(row["prompt"] + "    pass\n", exam).value == 0.0
    assert (passed, failed) == (164, 164)
