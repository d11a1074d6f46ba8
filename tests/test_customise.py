"""Customisation on a person's own tables, and what a chain of trainings gained and lost."""

from __future__ import annotations

import json
import sqlite3

import pytest
from test_tokens import own
from tuning import save, small_model, write_rows

import trivium
from trivium.evals.evaluate import chain_table
from trivium.evals.results import Record, Results, TaskResult
from trivium.grade.scorer import scorer
from trivium.grade.sql import open_read_only
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.stages.text_to_sql import schema_of
from trivium.world.ledger import prompt
from trivium.world.tables import database

TOWNS = ("Ash", "Elm", "Oak")
GOODS = ("salt", "wool", "rope", "tin")
SUM = "SELECT SUM(amount) FROM sold WHERE good = '{}' AND town = '{}'"
LIST = "SELECT good FROM sold WHERE town = "
ROWS = [
    {"asked": f"How much {good} went to {town}?", "sql": SUM.format(good, town)}
    for good in GOODS
    for town in TOWNS
] + [{"asked": f"What went to {town}?", "sql": f"{LIST}'{town}' ORDER BY amount"} for town in TOWNS]
QUESTIONS = (
    "{kind: text_to_sql, database: ./shop.sqlite, data: {path: ./asked.jsonl, columns: {question: asked}}"
)
OWN = "{task: own, name: sql, data: asked, scorer: sql, most: 8}"
SFT = "context: 128, batch: 512, steps: 2, validation: {times: 1}"


def shop(folder, rows=ROWS):
    """A small data base of one's own, with questions."""
    with sqlite3.connect(folder / "shop.sqlite") as connection:
        connection.execute("CREATE TABLE sold (good TEXT, town TEXT, amount INTEGER)")
        cells = [(good, town, 3 * a + b + 1) for a, good in enumerate(GOODS) for b, town in enumerate(TOWNS)]
        connection.executemany("INSERT INTO sold VALUES (?, ?, ?)", cells)
    connection.close()
    write_rows(folder / "asked.jsonl", rows)
    save(folder / "base", small_model(own()), own())


def ran(folder, stages):
    (folder / "mine.yaml").write_text(f"name: mine\nstages:\n{stages}")
    return trivium.run(folder / "mine.yaml", runs=folder / "runs")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_ones_own_questions_are_checked_told_of_the_tables_and_held_out(tmp_path):
    again = {"asked": "And to Ash?", "sql": ROWS[-3]["sql"].lower().replace("'ash'", "'Ash'") + " ;"}
    shop(tmp_path, [*ROWS, again])
    run = ran(tmp_path, f"  asked: {QUESTIONS}, held_out: 0.3}}\n")
    train = lines(run["asked"].folder / "data" / "train.jsonl")
    test = lines(run["asked"].folder / "held_out" / "test.jsonl")
    assert len(train) + len(test) == len(ROWS) + 1
    assert run["asked"].summary["held_out"] == len(test) >= 5
    learned = {row["messages"][1]["content"] for row in train}
    assert not learned & {row["answer"] for row in test}
    # Two spellings of one query are on the same side.
    assert (ROWS[-3]["sql"] in learned) == (again["sql"] in learned)
    for row in [*train, *test]:
        assert row["messages"][0]["content"].startswith("sold(good, town, amount)\n")
    grade = scorer("sql")
    for row in test:
        columns = {key: value for key, value in row.items() if key != "messages"}
        assert row["ordered"] == ("ORDER BY" in row["answer"])
        assert grade(row["answer"], **columns).value == 1
        assert grade("SELECT COUNT(*) FROM sold", **columns).value == 0
        assert grade("DROP TABLE sold", **columns).value == 0
        if row["ordered"]:
            assert grade(row["answer"] + " DESC", **columns).value == 0


@pytest.mark.slow
def test_the_whole_recipe_on_a_file_of_ones_own(tmp_path):
    """Fine-tuned on its questions, asked those held out, compared with the model before."""
    shop(tmp_path)
    run = ran(
        tmp_path,
        f"  asked: {QUESTIONS}}}\n"
        f"  sql: {{kind: sft, from: ./base, data: asked, {SFT}}}\n"
        f"  before: {{kind: evaluate, from: ./base, on: [{OWN}]}}\n"
        f"  after: {{kind: evaluate, from: sql, on: [{OWN}], against: before}}\n",
    )
    test = lines(run["asked"].folder / "held_out" / "test.jsonl")
    answers = lines(run["after"].folder / "report" / "results.answers.jsonl")
    assert [row["id"] for row in answers] == [row["id"] for row in test]
    assert run["after"].summary["sql: accuracy"]["n"] == len(test) == 3
    assert run["sql"].summary["data"]["asked"]["rows"] == len(ROWS) - len(test)
    chain = read_json(run["after"].folder / "report" / "chain.json")
    assert chain[0][:3] == ["skill", "./base", "sql"]
    assert chain[1][0] == "sql: accuracy"
    assert chain[1][-1] == "kept"


def test_the_country_is_told_of_as_any_data_base_is():
    for form in ("short", "full"):
        assert prompt("How many?", form) == schema_of(database(), form) + "\nHow many?"


def test_the_same_recipe_asks_the_country(tmp_path):
    shop(tmp_path)
    run = ran(
        tmp_path,
        "  asked: {kind: text_to_sql, database: world:ledger, tables: none,"
        " data: {path: 'world:ledger?form=question', limit: 20},"
        " held_out: {path: 'world:ledger?form=question', split: test, limit: 10}}\n",
    )
    train = lines(run["asked"].folder / "data" / "train.jsonl")
    test = lines(run["asked"].folder / "held_out" / "test.jsonl")
    assert (len(train), len(test)) == (20, 10)
    grade = scorer("sql")
    assert all(grade(row["answer"], **row).value == 1 for row in test)


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"asked": "Why?", "sql": "SELECT weight FROM sold"},
            "asked.jsonl:16: its query fails: no such column",
        ),
        ({"asked": "Why?", "sql": "SELECT good FROM sold WHERE town = 'Fir'"}, "finds nothing"),
        ({"asked": "Why?", "sql": "DELETE FROM sold"}, "its query fails"),
        ({"asked": "Why?"}, "has no `sql`, only question"),
    ],
)
def test_a_bad_question_is_named(tmp_path, row, words):
    shop(tmp_path, [*ROWS, row])
    with pytest.raises(TriviumError, match=words):
        ran(tmp_path, f"  asked: {QUESTIONS}}}\n")
    if "sql" in row:
        run = ran(tmp_path, f"  asked: {QUESTIONS}, on_bad: skip}}\n")
        assert run["asked"].summary["left_out"] == 1
        assert "asked.jsonl:16" in run["asked"].summary["named"][0]


def report(name, **right):
    """A model's answers: how many of a hundred questions of each skill are right, the first ones."""
    tasks = {}
    for label, count in right.items():
        records = [Record(str(n), "?", "!", scores={"accuracy": float(n < count)}) for n in range(100)]
        tasks[label] = TaskResult(label, label, ("accuracy",), records, "chat")
    return Results(name, tasks)


def test_gained_here_lost_there():
    """Beside the step before and beside the first: a small difference is neither gained nor lost."""
    base = report("base", chat=2, sql=1)
    chat = report("sft", chat=80, sql=1)
    sql = report("sql", chat=50, sql=90)
    table = chain_table([base, chat, sql])
    assert table[0] == [
        "skill", "base", "sft", "sql", "since sft (95 %)", "", "since base (95 %)", "",
    ]  # fmt: skip
    rows = {row[0]: row for row in table[1:]}
    assert rows["chat: accuracy"][1:4] == ["0.02", "0.8", "0.5"]
    assert (rows["chat: accuracy"][5], rows["chat: accuracy"][7]) == ("lost", "gained")
    assert rows["chat: accuracy"][4].startswith("-0.3 (")
    assert (rows["sql: accuracy"][5], rows["sql: accuracy"][7]) == ("gained", "gained")
    (kept,) = chain_table([chat, report("held", chat=79)])[1:]
    assert kept[-1] == "kept"


def test_a_skill_asked_only_lately_has_no_past():
    table = chain_table([report("base", chat=2), report("sft", chat=80), report("sql", chat=79, craft=5)])
    assert [row[0] for row in table[1:]] == ["chat: accuracy"]
    later = chain_table(
        [report("base", chat=2), report("sft", chat=80, craft=9), report("sql", chat=79, craft=5)]
    )
    craft = later[2]
    assert craft[:4] == ["craft: accuracy", "", "0.09", "0.05"]
    assert craft[6:] == ["", ""]


def test_a_script_of_sql_makes_the_data_base_and_anything_else_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "create").mkdir()
    script = tmp_path / "create" / "shop.sql"
    script.write_text("CREATE TABLE goods (name TEXT); INSERT INTO goods VALUES ('nail');")
    assert open_read_only(str(script)).execute("SELECT name FROM goods").fetchall() == [("nail",)]
    for content in (b"a letter", b"\xff\xfe\x00"):
        (tmp_path / "shop.txt").write_bytes(content)
        with pytest.raises(TriviumError, match=r"shop\.txt is neither a SQLite data base nor a script"):
            open_read_only(str(tmp_path / "shop.txt"))
