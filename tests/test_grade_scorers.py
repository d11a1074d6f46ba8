"""The scorers beside mathematics' golden table: what they accept, what they refuse, whose fault it was."""

import json
import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner

from trivium.evals.task import ready_for
from trivium.grade.command import grade
from trivium.grade.maths.scorer import MathScorer
from trivium.grade.rewards import combine, reward_from_file
from trivium.grade.scorer import Score, scorer, scorer_names
from trivium.grade.steps import mistake, steps_in
from trivium.kit.errors import TriviumError
from trivium.pipeline.plan import plan
from trivium.world import questions


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


def test_algebra_beyond_the_reader_is_unparsed_and_never_right() -> None:
    for answer in ("\\int_0^1 2x\\,dx", "\\sum_{k=1}^{4} k"):
        score = MathScorer(symbolic=True, seconds=1.0).compare(answer, "1")
        assert (score.value, score.status) == (0.0, "unparsed")


def test_prose_around_the_answer_is_not_right() -> None:
    for hedge in ("either 5 or 6 or 7", "5 (or maybe 6)", "$5$ and also perhaps $6$", "x such that 5"):
        assert MathScorer().compare(hedge, "5").value == 0.0


def test_tolerance_is_for_those_who_ask() -> None:
    assert value("math", "3.14", gold="\\pi") == 0.0
    assert value("math", "3.14", {"tolerance": 0.001}, gold="\\pi") == 1.0
    assert value("math", "0.333", {"tolerance": 0.01}, gold="1/3") == 1.0
    assert value("math", "0.3", {"tolerance": 0.01}, gold="1/3") == 0.0


@pytest.mark.parametrize("gold", ["{}", "{}\\pi"])
@pytest.mark.parametrize("size", [10**-4, 1, 10**6])
def test_the_tolerance_is_relative_to_the_larger_number(gold: str, size: float) -> None:
    """Half a percent is within a tolerance of one, two percent are not, however large the numbers are."""
    settings, unit = {"tolerance": 0.01}, 3.14159265358979 if "pi" in gold else 1.0
    for sign in (1, -1):
        for factor, wanted in ((1.005, 1.0), (0.995, 1.0), (1.02, 0.0), (0.98, 0.0)):
            answer = f"{sign * factor * size * unit:.12f}"
            assert value("math", answer, settings, gold=gold.format(f"{sign * size:f}")) == wanted, answer


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


def test_what_a_wrong_step_should_have_said_is_a_fraction_while_that_is_short() -> None:
    assert mistake("1/3=2") == "1/3=2 is wrong: 1/3 is 1/3"
    assert mistake("1/128=2") == "1/128=2 is wrong: 1/128 is 0.0078125"


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
    (tmp_path / "a.py").write_text("def f(x):\n    return x * x\n")
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


def test_the_plan_tries_what_stages_grade_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unready(_: MathScorer) -> None:
        raise TriviumError("The scorer 'math' has no room.")

    monkeypatch.setattr(MathScorer, "ready", unready, raising=False)
    for told in (
        lambda: plan("pocket", tmp_path / "runs"),
        lambda: ready_for({"task": "gsm8k", "data": "questions.jsonl"}),
        lambda: ready_for("own?data=mine.jsonl"),
    ):
        with pytest.raises(TriviumError, match="has no room"):
            told()
    ready_for("own?data=mine.jsonl&scorer=format")
    ready_for("facts")
    assert len(plan("pocket", tmp_path / "runs", only=["base"])) > 2, "a stage that grades nothing needs none"
