# ruff: noqa: E501
"""The scorers beside mathematics' golden table: what they accept, what they refuse, whose fault it was."""

import gzip
import json
import os
import sqlite3
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from trivium.grade.code import CodeScorer, Exam, program_of, read_tests
from trivium.grade.command import grade
from trivium.grade.instructions import follows
from trivium.grade.maths import symbolic
from trivium.grade.maths.scorer import MathScorer
from trivium.grade.rewards import combine, reward_from_file
from trivium.grade.schema import violation
from trivium.grade.scorer import Score, scorer, scorer_names
from trivium.grade.steps import steps_in
from trivium.kit.errors import TriviumError
from trivium.world import questions

DATA = Path(os.environ.get("TRIVIUM_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def value(name: str, completion: str, settings: dict | None = None, **columns) -> float | None:
    return scorer(name, **(settings or {}))(completion, **columns).value


@pytest.mark.parametrize(
    ("completion", "gold", "wanted"),
    [
        ("So the answer is \\boxed{42}.", "42", 1.0),
        ("#### 42", "42", 1.0),
        ("3 + 4 = 7\n#### 7", "6 + 1 = 7\n#### 7", 1.0),
        ("First \\boxed{41}, no: \\boxed{42}", "42", 0.0),
        ("First \\boxed{42}, that is \\boxed{42.0}", "42", 1.0),
        ("\\boxed{42}\n#### 41", "42", 0.0),
        ("\\boxed{41} or \\boxed{42}", "42", 0.0),
        ("<think>\\boxed{1} maybe \\boxed{2}</think>It is \\boxed{42}", "42", 1.0),
        ("<think>\\boxed{42}", "42", 0.0),
        ("The answer is 42.", "42", 1.0),
        ("The answer is 42\nNo, the answer is 43", "42", 0.0),
        ("**Final answer:** 42", "42", 1.0),
        ("I think 42 or so\nI am not sure, there are 41 things", "42", 0.0),
        ("\\boxed{\\frac{1}{2}", "1/2", 0.0),
        ("\\boxed{}", "5", 0.0),
        ("", "5", 0.0),
        ("\\boxed{5} " * 100, "5", 1.0),
        ("".join(f"\\boxed{{{n}}} " for n in range(100)), "5", 0.0),
    ],
)
def test_the_answer_is_found_and_hedges_are_refused(completion: str, gold: str, wanted: float) -> None:
    assert value("math", completion, answer=gold) == wanted


def test_a_bad_gold_is_no_wrong_answer() -> None:
    for gold in ("", "\\frac{", "@@@", "1" * 5000, "9^{9^{9^{9}}}"):
        score = MathScorer()("\\boxed{5}", gold=gold)
        assert (score.value, score.status) == (None, "gold_bad"), gold


def test_algebra_beyond_the_reader_goes_to_a_child_that_can_be_killed() -> None:
    pytest.importorskip("math_verify")
    assert MathScorer().compare("\\int_0^1 2x\\,dx", "1").value == 1.0
    assert MathScorer().compare("\\int_0^1 3x\\,dx", "1").value == 0.0
    # An integral the child has not met: what it remembers it answers at once.
    late = MathScorer(seconds=0.0).compare("\\int_0^1 \\frac{x}{1+x}\\,dx", "1")
    assert (late.value, late.status) == (None, "timeout")
    assert symbolic._child.process is None
    assert MathScorer(seconds=30.0).compare("\\sum_{k=1}^{4} k", "10").value == 1.0


def test_prose_never_reaches_the_algebra_system() -> None:
    for hedge in ("either 5 or 6 or 7", "5 (or maybe 6)", "$5$ and also perhaps $6$", "x such that 5"):
        assert MathScorer().compare(hedge, "5").value == 0.0


def test_tolerance_is_for_those_who_ask() -> None:
    assert value("math", "3.14", gold="\\pi") == 0.0
    assert value("math", "3.14", {"tolerance": 0.001}, gold="\\pi") == 1.0
    assert value("math", "0.333", {"tolerance": 0.01}, gold="1/3") == 1.0
    assert value("math", "0.3", {"tolerance": 0.01}, gold="1/3") == 0.0


def test_a_scores_value_is_none_exactly_when_the_grader_failed() -> None:
    with pytest.raises(AssertionError):
        Score(0.0, "", "gold_bad")
    with pytest.raises(AssertionError):
        Score(None, "", "wrong")


def test_an_unknown_scorer_or_setting_is_named() -> None:
    with pytest.raises(TriviumError, match="mathematics"):
        scorer("mathematics")
    with pytest.raises(TriviumError, match="sharpness"):
        scorer("math", sharpness=3)
    with pytest.raises(TriviumError, match="column"):
        scorer("math")("5", other=3)
    with pytest.raises(TriviumError, match="model"):
        scorer("learned")
    assert all(scorer(name).name == name for name in scorer_names() if name != "learned")


def test_the_world_marks_its_own_answers_right() -> None:
    for question in questions("sums", limit=40):
        assert value("math", question.answer, answer=str(question.truth["answer"])) == 1.0
        assert value("math", question.answer, answer=str(question.truth["answer"] + 1)) == 0.0
        assert value("steps", question.answer) == 1.0
    for question in questions("ledger", limit=40):
        settings = {"database": "world:ledger"}
        assert value("sql", question.answer, settings, sql=question.truth["sql"]) == 1.0
        truth = {"rows": question.truth["rows"], "ordered": question.truth["ordered"]}
        assert value("sql", question.answer, settings, **truth) == 1.0
        assert value("sql", "SELECT 'nobody'", settings, **truth) == 0.0
    for question in questions("chat", limit=200):
        assert value("instructions", question.answer, check=question.check) == 1.0
        assert value("instructions", "zzz", check=question.check) == 0.0


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("3 + 4 = 7\n7 * 2 = 14", 1.0),
        ("3 + 4 = 7\n7 * 2 = 15", 0.5),
        ("Sold 48/2 = <<48/2=24>>24 clips.\nIn all 48+24 = <<48+24=72>>72", 1.0),
        ("She has 48/2 = <<48/2=25>>25", 0.0),
        ("x = 3 + 4 = 7", 1.0),
        ("x = 3 + 4 = 8", 0.0),
        ("10/3 = 3.33", 1.0),
        ("10/3 = 3.34", 0.0),
        ("20% of 50 = 10", 1.0),
        ("$1,000 + $500 = $1,500", 1.0),
        ("2 × 3 = 6", 1.0),
        ("\\frac{6}{2} = 3", 1.0),
        ("1 = 1\n2 = 2\n3 + 4 = 8", 0.0),
        ("3 + 4 = 7\n3 + 4 = 7\n3+4=7\n1 + 1 = 3", 0.5),
        ("nothing to see", 0.0),
        ("2 + 2 = 4 = 5", 0.0),
        ("10^100000000 = 3", 0.0),
    ],
)
def test_steps(text: str, wanted: float) -> None:
    assert value("steps", text) == wanted, steps_in(text)


def test_one_wrong_step_spoils_all_where_that_is_asked() -> None:
    assert value("steps", "3 + 4 = 7\n7 * 2 = 15", {"all_or_nothing": True}) == 0.0


SCRIPT = """CREATE TABLE t (a INTEGER, b TEXT);
INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'z');"""


@pytest.mark.parametrize(
    ("query", "gold", "wanted", "status"),
    [
        ("SELECT a FROM t", "SELECT a FROM t ORDER BY a DESC", 0.0, "wrong"),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t", 1.0, "ok"),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a DESC", 1.0, "ok"),
        ("```sql\nSELECT a*1.0 FROM t\n```", "SELECT a FROM t", 1.0, "ok"),
        ("SELECT DISTINCT 1 FROM t", "SELECT 1 FROM t", 0.0, "wrong"),
        ("SELECT a, b FROM t", "SELECT b, a FROM t", 0.0, "wrong"),
        ("DROP TABLE t", "SELECT a FROM t", 0.0, "unparsed"),
        ("WITH q AS (SELECT 1) DELETE FROM t", "SELECT a FROM t", 0.0, "wrong"),
        ("SELECT a FROM t; DROP TABLE t", "SELECT a FROM t", 0.0, "wrong"),
        ("SELECT load_extension('x')", "SELECT a FROM t", 0.0, "wrong"),
        ("SELECT length(zeroblob(1000000000))", "SELECT a FROM t", 0.0, "wrong"),
        ("SELECT nothing FROM t", "SELECT a FROM t", 0.0, "wrong"),
        ("SELECT a FROM t", "SELECT nothing FROM t", None, "gold_bad"),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
            "SELECT 1",
            0.0,
            "overtime",
        ),
        (
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n",
            "SELECT 1",
            0.0,
            "overtime",
        ),
        ("I do not know", "SELECT a FROM t", 0.0, "unparsed"),
    ],
)
def test_sql(query: str, gold: str, wanted: float | None, status: str) -> None:
    score = scorer("sql", database=SCRIPT, seconds=0.5)(query, sql=gold)
    assert (score.value, score.status) == (wanted, status), score


def test_a_data_base_in_a_file_is_never_written(tmp_path: Path) -> None:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCRIPT)
    before = path.read_bytes()
    assert value("sql", "SELECT b FROM t", {"database": str(path)}, sql="SELECT b FROM t") == 1.0
    for attack in ("SELECT 1; DELETE FROM t", f"WITH x AS (SELECT 1) SELECT * FROM x; ATTACH '{path}2' AS y"):
        assert value("sql", attack, {"database": str(path)}, sql="SELECT b FROM t") == 0.0
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["shop.db"]
    with pytest.raises(TriviumError, match="does not exist"):
        value("sql", "SELECT 1", {"database": str(tmp_path / "none.db")}, sql="SELECT 1")


def test_form() -> None:
    tags = {"tags": ("think", "answer")}
    assert value("format", "<think>a</think>\n<answer>b</answer>", tags) == 1.0
    for text in (
        "<answer>b</answer><think>a</think>",
        "<think>a</think><think>b</think><answer>c</answer>",
        "<think></think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer></think>",
    ):
        assert value("format", text, tags) == 0.0, text
    assert value("format", "abc-12", {"pattern": r"[a-z]+-\d+"}) == 1.0
    assert value("format", "abc-12 and more", {"pattern": r"[a-z]+-\d+"}) == 0.0
    with pytest.raises(TriviumError, match="regular expression"):
        value("format", "a", {"pattern": "("})
    with pytest.raises(TriviumError, match="needs a pattern"):
        value("format", "a")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "exclusiveMaximum": 150},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "uniqueItems": True, "maxItems": 3},
        "kind": {"enum": ["a", 1, None]},
        "size": {"oneOf": [{"type": "number", "multipleOf": 0.5}, {"const": "big"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "not": {"const": "bad"}}},
}


KEPT = [
    {"name": "A"}, {"name": "Ab", "age": 3.0}, {"name": "A", "tags": ["x", "y"]}, {"name": "A", "kind": None},
    {"name": "A", "size": 2.5}, {"name": "A", "size": "big"}, {"name": "A", "kind": 1, "age": 0},
]  # fmt: skip
BROKEN = [
    {}, {"name": ""}, {"name": "a"}, {"name": 3}, {"name": "A", "age": 150}, {"name": "A", "age": 1.5},
    {"name": "A", "age": True}, {"name": "A", "x": 1}, {"name": "A", "tags": ["x", "x"]}, [], None, "A",
    {"name": "A", "tags": ["bad"]}, {"name": "A", "kind": True}, {"name": "A", "size": 0.3},
    {"name": "A", "size": "small"}, {"name": "A", "tags": list("abcd")}, {"name": "A", "age": -1},
]  # fmt: skip


@pytest.mark.parametrize("given", [*KEPT, *BROKEN])
def test_json_schema(given: object) -> None:
    assert (violation(given, SCHEMA) is None) == (given in KEPT)
    assert value("format", json.dumps(given), {"schema": SCHEMA}) == float(given in KEPT)
    if find_spec("jsonschema"):
        import jsonschema

        assert jsonschema.Draft202012Validator(SCHEMA).is_valid(given) == (given in KEPT)


def test_schema_that_cannot_be_kept_is_not_passed_over() -> None:
    with pytest.raises(TriviumError, match="unevaluatedItems"):
        violation([], {"unevaluatedItems": False})
    assert value("format", "NaN", {"schema": {"type": "number"}}) == 0.0
    assert value("format", "[" * 50_000, {"schema": {}}) == 0.0


IFEVAL = [
    ("punctuation:no_comma", {}, "No comma here.", "One, two."),
    ("change_case:english_lowercase", {}, "all small.", "Not small."),
    ("change_case:english_capital", {}, "ALL LARGE.", "Not large."),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG day", "A day"),
    ("keywords:existence", {"keywords": ["sun", "moon"]}, "Sun and moon.", "Sunny moon."),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "A sunny day.", "The Sun."),
    ("keywords:frequency", {"keyword": "sun", "frequency": 2, "relation": "at least"}, "sun, Sun", "sun sunny"),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 2, "let_relation": "less than"}, "Ab", "Aa"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "two words", "now three words"),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two!", "One and two."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "one\n***\ntwo", "one\n\ntwo"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First.\n\nThen.",
        "Then.\n\nFirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi.\nP.S. More.", "Hi, P.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a*"),
    ("detectable_format:multiple_sections", {"section_spliter": "PART", "num_sections": 2}, "PART 1\na\nPART 2\nb", "PART 1"),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<A song>>\nla", "<< >> la"),
    ("combination:two_responses", {}, "yes\n******\nno", "yes\n******\nyes"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi!"),
    ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "The end. So."),
    ("startend:quotation", {}, '"All of it."', '"Part" of it.'),
    ("language:response_language", {"language": "de"}, "Das ist nicht der Hund und die Katze", "This is not the dog"),
    ("language:response_language", {"language": "ru"}, "Привет, как дела", "Hello there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), IFEVAL)
def test_ifevals_instructions(name: str, arguments: dict, good: str, bad: str) -> None:
    row = {"instruction_id_list": [name], "kwargs": [{**arguments, "unused": None}]}
    assert value("instructions", good, **row) == 1.0
    assert value("instructions", bad, **row) == 0.0


def test_every_ifeval_check_is_tried_and_shares_add_up() -> None:
    from trivium.grade.ifeval import CHECKS

    assert {name for name, *_ in IFEVAL} == set(CHECKS)
    assert len(CHECKS) == 25
    both = [{"check": "punctuation:no_comma"}, {"check": "words", "arguments": {"count": 3}}]
    assert value("instructions", "one, two", {"partial": True}, checks=both) == 0.0
    assert value("instructions", "one two", {"partial": True}, checks=both) == 0.5
    assert value("instructions", "one two", checks=json.dumps(both)) == 0.0
    assert value("instructions", "Sure, here:\none two three", {"loose": True}, checks=both) == 1.0
    with pytest.raises(TriviumError, match="no check called"):
        follows("a", {"check": "nonsense"})
    with pytest.raises(TriviumError, match="arguments"):
        follows("a", {"check": "words", "arguments": {"amount": 3}})


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


def test_every_reward_function_speaks_trls_signature(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def length(prompts, completions, **columns):\n"
        "    return [None if not c else float(len(c)) for c in completions]\n"
        "def few(prompts, completions, **columns):\n    return [1.0]\n"
        "def nan(prompts, completions, answer, **columns):\n    return [float('nan')] * len(answer)\n"
    )
    combined = combine(["math", {"name": "mine.py:length", "weight": 0.5}], tmp_path)
    completions = ["\\boxed{5}", [{"role": "assistant", "content": "\\boxed{6}"}], ""]
    totals = combined(["p"] * 3, completions, answer=["5", "5", "\\frac{"], trainer_state=object())
    assert combined.names == ["math", "length"]
    assert totals == [1.0 + 0.5 * 9, 0.5 * 1, 0.0] or totals[2] in (0.0, None)
    parts = combined.parts(["p"] * 2, ["#### 5", "#### 5"], answer=["5", "\\frac{"])
    assert parts[0] == [1.0, None]
    assert combined.total([[None], [None]]) == [None]
    assert combined.total([[1.0], [None]]) == [1.0]
    with pytest.raises(TriviumError, match="returned 1 values for 2"):
        reward_from_file("mine.py:few", tmp_path)(["a", "b"], ["a", "b"])
    assert reward_from_file("mine.py:nan", tmp_path)(["a"], ["b"], answer=["c"]) == [None]
    for wrong in ("mine.py:none", "other.py:length", "mine:length"):
        with pytest.raises(TriviumError):
            reward_from_file(wrong, tmp_path)


def test_trls_trainer_would_call_a_reward_like_this() -> None:
    reward = combine(["math"]).rewards[0]
    kwargs = {"prompts": ["p"], "completions": ["#### 5"], "completion_ids": [[1, 2]], "solution": ["5"]}
    assert reward(**kwargs) == [1.0]
    assert reward.name == "math"


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert run(grade, ["math", "--answer", "1/2", "--gold", "0.5"]).output.startswith("1  ok:")
    (tmp_path / "a.py").write_text(SQUARE)
    (tmp_path / "t.py").write_text("assert f(3) == 9\n")
    words = ["code", "--program", str(tmp_path / "a.py"), "--tests", str(tmp_path / "t.py"), "--json"]
    assert json.loads(run(grade, words).output) == {
        "score": 1.0,
        "reason": "1 of 1 tests pass",
        "status": "ok",
    }
    words = ["sql", "--answer", "SELECT 1", "--gold", "SELECT 2", "--database", "world:ledger"]
    assert run(grade, words).output.startswith("0  wrong:")
    assert run(grade, ["steps", "--answer", "1 + 1 = 2"]).output.startswith("1  ok")
    assert run(grade, ["format", "--answer", "ab", "--pattern", "a."]).output.startswith("1  ok")
    checks = '{"check": "words", "arguments": {"count": 2}}'
    assert run(grade, ["instructions", "--answer", "one two", "--checks", checks]).output.startswith("1  ok")
    assert isinstance(run(grade, ["math", "--gold", "1"]).exception, TriviumError)


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
