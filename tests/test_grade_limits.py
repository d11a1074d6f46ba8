"""Texts, patterns, schemas and rows that would stall a grader, or end it without a sentence."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from forked import copied, forked

from trivium.grade import answering_process, patterns
from trivium.grade.answering_process import Helper, Unusable
from trivium.grade.code import program_of
from trivium.grade.command import grade
from trivium.grade.instructions import checks_of, follows
from trivium.grade.maths.extract import marked_answers
from trivium.grade.scorer import scorer
from trivium.grade.sql import open_read_only, orders_rows, query_of
from trivium.kit.errors import TriviumError
from trivium.world.checks import answers_sum, fulfils

LONG = 40_000
RUNS = (
    *(" ", "\n", "\t", "```\n", "*", "*a", "*a\n", "<<", "[", "[a", "(", "()", "'", ".\n", "a-", "<think>"),
    *(
        "#### ",
        "####\n",
        "\\boxed{",
        "\\boxed ",
        "answer is ",
        "```json\n",
        "P.",
        "Section ",
        "1",
        "\\",
        "$a",
    ),
    *("{", "{}", "\\text{", "1,", "```sql\n", " \n", "\n ", "\\phantom{", "1 + 1 = 2\n", "1=", "'' "),
)
BEGUN_RUNS = (
    *(("```", " "), ("```", "a"), ("<<", "a"), ("####", " "), ("\\boxed", " "), ("answer", ":"), ("- ", " ")),
    *(("```json\n", "\n"), ("select ", "("), ("select '", "''"), ('{"a": "', "a")),
)
TEXTS = {
    **{f"run of {piece!r}": piece * (LONG // len(piece)) for piece in RUNS},
    **{f"{begin!r} and a run of {one!r}": begin + one * (LONG // len(one)) for begin, one in BEGUN_RUNS},
    "brackets in brackets": "select " + "(" * (LONG // 2) + ")" * (LONG // 2),
}
CHECKS = {
    "keywords:existence": {"keywords": ["a"]},
    "keywords:frequency": {"keyword": "a", "frequency": 3},
    "language:response_language": {"language": "en"},
    "length_constraints:number_sentences": {"num_sentences": 3},
    "length_constraints:number_paragraphs": {"num_paragraphs": 3},
    "length_constraints:number_words": {"num_words": 4},
    "detectable_content:number_placeholders": {"num_placeholders": 3},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 3},
    "detectable_format:number_highlighted_sections": {"num_highlights": 10**9},
    "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 3},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
}


def grade_everything() -> None:
    answer, steps = scorer("math"), scorer("steps")
    form, tagged = scorer("format", schema={"type": "object"}), scorer("format", tags=("a", "b"))
    for text in TEXTS.values():
        for ended in (text, f"{text}\n```"):
            program_of(ended)
            query_of(ended)
            form(ended)
        orders_rows(text)
        answer(text, gold="3")
        answer("3", gold=text)
        steps(text)
        tagged(text)
        for name, arguments in CHECKS.items():
            follows(text, {"check": name, "arguments": arguments})


@pytest.mark.slow
def test_no_text_takes_more_than_a_linear_time() -> None:
    """A run that was quadratic took minutes of processor time for one text of many; now all take seconds."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (40, 40))
        grade_everything()

    assert copied(limited).wait() == 0


def find_fences() -> None:
    for begin, piece in (
        ("", "```\n"),
        ("", "``` "),
        ("```", " "),
        ("```", "a"),
        ("```sql", "\n"),
        ("\n", " ```"),
    ):
        text = begin + piece * (1_000_000 // len(piece))
        for ended in (text, f"{text}\n```"):
            program_of(ended)
            query_of(ended)


def test_fences_are_found_in_one_pass() -> None:
    """In a million characters: a pattern that tries each place again took seconds for forty thousand."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        find_fences()

    assert copied(limited).wait() == 0


def test_a_pattern_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns.matches, "__defaults__", (0.3,))
    score = scorer("format", pattern="(a+)+b")("a" * 5000)
    assert (score.value, score.status) == (0.0, "overtime")
    score = scorer("format", schema={"type": "string", "pattern": "^(a|a)*$"})(json.dumps("a" * 60 + "b"))
    assert (score.value, score.status) == (0.0, "overtime")
    # and the next text has its answer
    assert scorer("format", pattern="(a+)+b")("aab").value == 1.0
    assert scorer("format", pattern="a.b")("a\nb").value == 1.0
    with pytest.raises(TriviumError, match="no regular expression"):
        scorer("format", pattern="(")("a")


def chain(length: int) -> dict:
    """A schema whose comparison branches twice at each of `length` references."""
    parts = {f"p{n}": {"anyOf": [{"$ref": f"#/$defs/p{n + 1}"}] * 2} for n in range(length)}
    return {"$ref": "#/$defs/p0", "$defs": {**parts, f"p{length}": False}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"}, {"anyOf": [{"$ref": "#"}]}, {"not": {"$ref": "#"}}, chain(24),
        {"minimum": "1"}, {"type": 3}, {"type": [[]]}, {"required": 3}, {"properties": []},
        {"anyOf": 3}, {"pattern": "("}, {"pattern": 3}, {"enum": 3}, {"$ref": 3},
        {"minLength": "a"}, {"multipleOf": "a"}, {"items": 3}, 7, [],
    ],
    ids=lambda schema: str(schema)[:40],
)  # fmt: skip
def test_a_schema_that_is_none_is_said_in_one_sentence(schema: object) -> None:
    grade_form = scorer("format", schema=schema)
    with pytest.raises(TriviumError):
        [grade_form(text) for text in ('"a"', "1", "[1]", '{"a": 1}')]


def test_what_an_answer_holds_is_no_fault_of_the_schema() -> None:
    flat = {"type": "array", "items": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "integer"}]}}
    for text, schema, status in (
        ("[" * 3000 + "]" * 3000, {"type": "array"}, "wrong"),
        ("[" * 400 + "]" * 400, {"enum": [1]}, "wrong"),
        ("[" * 400 + "]" * 400, {"items": {"$ref": "#"}}, "wrong"),
        ("1e999", {"multipleOf": 2}, "wrong"),
        ("9" * 400, {"multipleOf": 0.5}, "wrong"),
        ("9" * 5000, {"type": "integer"}, "wrong"),
        (json.dumps([1] * 30_000), {**flat, "uniqueItems": True}, "wrong"),
        (json.dumps(list(range(15_000))), {"uniqueItems": True}, "ok"),
        ("[" + "1," * 45_000 + "1]", {"items": {"allOf": [{"type": "integer"}] * 6}}, "overtime"),
        ("[1, 1.0]", {"uniqueItems": True}, "wrong"),
        ("[1, true, [1], [true]]", {"uniqueItems": True}, "ok"),
    ):
        score = scorer("format", schema=schema)(text)
        assert (score.value, score.status) == (float(status == "ok"), status), (text[:20], schema, score)


@pytest.mark.parametrize(
    "columns",
    [
        {"check": "words", "arguments": 3}, {"check": 3, "arguments": {}}, {"checks": "{"},
        {"checks": "[" * 9999}, {"check": "words", "arguments": {"count": 3, "other": 4}},
        {"instruction_id_list": "a", "kwargs": [{}]},
        {"instruction_id_list": ["keywords:existence"], "kwargs": []},
        {"checks": [{"check": [], "arguments": {}}]},
        {"check": "keywords:letter_frequency", "arguments": {"letter": 3, "let_frequency": 3}},
        {"check": "combination:repeat_prompt", "arguments": {"prompt_to_repeat": 7}},
        {"check": "starts", "arguments": {"with_text": 7}},
    ],
    ids=str,
)  # fmt: skip
def test_checks_that_are_none_are_said_in_one_sentence(columns: dict) -> None:
    with pytest.raises(TriviumError):
        [follows("a text", check) for check in checks_of(columns)]


def test_no_answer_ends_a_check_of_the_world() -> None:
    assert not answers_sum("#### " + "9" * 5000, 9)
    assert not fulfils("[" * 100_000, {"check": "json", "arguments": {"values": {}}})


def test_a_script_for_a_data_base_reaches_no_file(tmp_path: Path) -> None:
    place = tmp_path / "made.sqlite"
    for script in (
        f"CREATE TABLE a (x); ATTACH '{place}' AS other; CREATE TABLE other.b (x);",
        f"CREATE TABLE a (x); VACUUM INTO '{place}';",
        f"CREATE TABLE a (x); PRAGMA temp_store_directory = '{tmp_path}';",
        "CREATE TABLE a (x); \ud800",
    ):
        with pytest.raises(TriviumError, match="script that makes the data base fails"):
            open_read_only(script)
    assert not place.exists()
    made = open_read_only(
        "PRAGMA foreign_keys=OFF; BEGIN; CREATE TABLE a (x); INSERT INTO a VALUES (1); COMMIT;"
    )
    assert made.execute("SELECT x FROM a").fetchall() == [(1,)]
    made.close()
    for rows in (3, [3], "a"):
        with pytest.raises(TriviumError, match="list of rows"):
            scorer("sql", database="CREATE TABLE a (x)")("SELECT x FROM a", rows=rows)
    gold = scorer("sql", database="CREATE TABLE a (x)")("SELECT x FROM a", sql="SELECT '\ud800'")
    assert gold.status == "gold_bad"


def test_the_last_of_several_unclosed_boxes_counts_as_before() -> None:
    assert marked_answers("\\boxed{1} and \\boxed{\\frac{1}{2}").answers == ("1",)
    assert marked_answers("\\boxed{\\frac{1}{2}} \\boxed{\\}}").answers == ("\\frac{1}{2}", "\\}")


def test_fences_are_read_as_before() -> None:
    assert program_of("a ``` b\n```python\nx = '```'\n```\n") == "x = '```'\n"
    assert program_of("  ```py\nx = 1\n  ```\n```\ny") == "x = 1\n"
    assert query_of("So: ```sql\nSELECT 1``` and ```\nSELECT 2\n```") == "SELECT 2"
    assert query_of("```python\nx\n``` then ```SQL\nSELECT 3\n```") == "SELECT 3"


def test_the_command_prints_nothing_a_terminal_obeys(tmp_path: Path) -> None:
    answer = "\\boxed{\x1b[31m\ud800}"
    path = tmp_path / "answer.txt"
    path.write_bytes(b"\xff\xfe")
    shown = CliRunner().invoke(grade, ["math", "--answer", answer, "--gold", "3"])
    assert shown.exit_code == 0
    assert "\\x1b[31m\\ud800" in shown.output
    assert "\x1b" not in shown.output
    kept = CliRunner().invoke(grade, ["math", "--answer", answer, "--gold", "3", "--json"])
    assert json.loads(kept.output)["reason"].count("\x1b") == 1
    for arguments in (["--file", str(path)], ["--file", "-"], ["--file", str(tmp_path)]):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        failed = forked("grade", "math", *arguments, "--gold", "3", text=False, **pipes)
        _, complaints = failed.communicate(b"\xff")
        assert failed.returncode == 2, complaints
        assert b"Traceback" not in complaints


def test_packages_on_pythonpath_are_seen_by_the_algebra_system(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text(
        "import json, sys\nsys.path[:] = json.loads(sys.argv[1])\nimport only_here\nprint(0, flush=True)\n"
        "for line in sys.stdin: print(only_here.VALUE, flush=True)\n"
    )
    (tmp_path / "only_here.py").write_text("VALUE = 7\n")
    asked = Helper(script)
    try:
        sys.path.append(str(tmp_path))
        assert asked.ask("?", 20.0) == 7
    finally:
        sys.path.remove(str(tmp_path))
        asked.stop()


def test_a_helper_that_dies_at_its_start_is_started_once(tmp_path: Path, monkeypatch) -> None:
    script = tmp_path / "child.py"
    script.write_text("import nowhere_to_be_found\n")
    broken = Helper(script)
    monkeypatch.setattr(patterns, "_helper", broken)
    starts: list[int] = []
    popen = answering_process.subprocess.Popen
    monkeypatch.setattr(
        answering_process.subprocess, "Popen", lambda *a, **k: starts.append(1) or popen(*a, **k)
    )
    for _ in range(3):
        with pytest.raises(TriviumError, match=r"cannot be matched here: .*nowhere_to_be_found"):
            scorer("format", pattern="a+")("aaa")
    assert starts == [1]
    with pytest.raises(Unusable):
        broken.ask("?", 1.0)
    assert os.getpid() == broken.owner
