"""A teacher behind a bad endpoint: nothing lost, nothing paid twice, no budget exceeded."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import yaml
from fake_endpoint import FakeEndpoint, serving
from synthesizing import QUICK, hurry, lines, recipe, synthesized, write_rows

import trivium
from trivium.data.sources import Source, read_documents
from trivium.generate.asking.budget import Budget, Cost, Ledger, believed
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json

MOODS = ["good", "slow", "garbage", "half", "busy", "broken", "lies_low", "lies_high", "empty"]
FORK = multiprocessing.get_context("fork")


def number_of(prompt: str) -> int:
    return int(prompt.split()[-1])


def bad_mood(prompt: str, attempt: int) -> str:
    """Two bad attempts of most prompts, each with another fault, then good or a lie."""
    mood = MOODS[(number_of(prompt) + 4 * attempt) % len(MOODS)]
    return mood if attempt < 2 else "good"


def whole(mood: str) -> bool:
    return mood in ("good", "slow", "lies_low", "lies_high")


def test_from_a_bad_endpoint_every_row_comes_once(tmp_path, monkeypatch):
    hurry(monkeypatch)
    monkeypatch.setenv("FAKE_KEY", "secret-of-the-test")
    with serving(FakeEndpoint(mood=bad_mood)) as fake:
        there = {"url": fake.url, "model": "fake", "key_env": "FAKE_KEY", **QUICK}
        stage = synthesized(tmp_path, endpoint=there, data=str(write_rows(tmp_path, 27)))
        rows = lines(stage / "data" / "rows.jsonl")
        assert sorted(row["messages"][1]["content"] for row in rows) == sorted(
            f"The answer to question number {place}" for place in range(27)
        )
        assert lines(stage / "dropped.jsonl") == []
        # Each prompt is paid for once: what came whole was never asked for again.
        assert set(fake.delivered.values()) == {1}
        expected = sum(
            1 + next(i for i in range(3) if whole(bad_mood(f"number {place}", i))) for place in range(27)
        )
        summary = read_json(stage / "synthesis.json")
        assert fake.requests == expected == summary["cost"]["requests"]
        assert fake.tokens <= summary["cost"]["tokens"]
        assert fake.most_in_flight <= QUICK["concurrency"]
        assert fake.keys == {"Bearer secret-of-the-test"}
        for path in stage.rglob("*"):
            assert not path.is_file() or b"secret-of-the-test" not in path.read_bytes()
        # Another stage with the same questions, here with one step more, asks nothing.
        again = synthesized(
            tmp_path, "again", endpoint=there, data=str(write_rows(tmp_path, 27)),
            steps=["answer", {"traces": {"least_words": 3}}],
        )  # fmt: skip
        assert fake.requests == expected
        cost = read_json(again / "synthesis.json")["cost"]
        assert cost == {"tokens": 0, "requests": 0, "money": 0}
        assert [row["messages"] for row in lines(again / "data" / "rows.jsonl")] == [
            row["messages"] for row in rows
        ]


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize("mood", ["good", "lies_low", "lies_high", "garbage", "half"])
def test_no_budget_of_tokens_is_exceeded_whatever_the_server_says(tmp_path, monkeypatch, mood):
    """Counted by the server itself, for lies about the usage and for answers that are paid for and lost."""
    hurry(monkeypatch)
    long = " ".join(["word"] * 30)
    with serving(
        FakeEndpoint(answer=lambda *_: long, mood=lambda _, attempt: "good" if attempt else mood)
    ) as fake:
        stage = synthesized(
            tmp_path, endpoint={"url": fake.url, "model": "fake", **QUICK}, budget={"tokens": 2000},
            data=str(write_rows(tmp_path, 60)), steps=[{"answer": {"max_new_tokens": 40}}],
        )  # fmt: skip
        summary = read_json(stage / "synthesis.json")
        assert summary["out_of_budget"]
        assert 0 < fake.tokens <= summary["cost"]["tokens"] <= 2000
        kept, dropped = lines(stage / "data" / "rows.jsonl"), lines(stage / "dropped.jsonl")
        assert len(kept) == sum(fake.delivered.values())
        assert len(kept) + len(dropped) == 60
        assert {row["reason"].split(":")[0] for row in dropped} == {"budget"}


def test_requests_and_money_end_a_stage_too(tmp_path, monkeypatch):
    hurry(monkeypatch)
    data = str(write_rows(tmp_path, 30))
    with serving(FakeEndpoint(mood=lambda _, attempt: "good" if attempt else "broken")) as fake:
        there = {"url": fake.url, "model": "fake", "completion_price": 1000.0, **QUICK}
        stage = synthesized(tmp_path, endpoint=there, data=data, budget={"requests": 15})
        assert fake.requests == 15 == read_json(stage / "synthesis.json")["cost"]["requests"]
        assert 0 < len(lines(stage / "data" / "rows.jsonl")) <= 7
        steps = [{"answer": {"max_new_tokens": 10}}]
        money = synthesized(
            tmp_path, "money", "other", endpoint=there, data=data, budget={"money": 0.1}, steps=steps
        )
        spent = read_json(money / "synthesis.json")["cost"]["money"]
        # Six tokens an answer at a thousand a million.
        assert spent == pytest.approx(0.006 * len(lines(money / "data" / "rows.jsonl")))
        assert 0.08 < spent <= 0.1
    with pytest.raises(TriviumError, match=r"budget\.money.*needs prices"):
        synthesized(tmp_path, endpoint={"url": fake.url, "model": "fake"}, data=data, budget={"money": 1})


def run_whole(place: Path, runs: Path) -> None:
    trivium.run(place, runs=runs)
    os._exit(0)


@pytest.mark.slow
def test_killed_at_any_time_it_loses_at_most_what_was_in_flight(tmp_path, monkeypatch):
    data = str(write_rows(tmp_path, 40))
    with serving(FakeEndpoint(delay=0.03)) as fake:
        place = recipe(
            tmp_path, endpoint={"url": fake.url, "model": "fake", **QUICK}, data=data, budget={"requests": 48}
        )
        in_flight: set[str] = set()
        for wanted in (9, 22):
            process = FORK.Process(target=run_whole, args=(place, tmp_path / "runs"))
            process.start()
            while len(fake.delivered) < wanted:
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            # Delivered a moment ago is in flight, too, for the process that died reading it.
            in_flight |= set(fake.open)
            process.join()
            time.sleep(0.1)
            in_flight |= {prompt for prompt in fake.delivered if prompt not in written(tmp_path)}
            assert len(in_flight) <= 2 * QUICK["concurrency"]
        stage = trivium.run(place, runs=tmp_path / "runs")["asked"].folder
        assert len(lines(stage / "data" / "rows.jsonl")) == 40
        twice = {prompt for prompt, count in fake.delivered.items() if count > 1}
        assert twice <= in_flight
        # What was in flight may have been paid for, and counts: the budget holds over all three starts.
        cost = read_json(stage / "synthesis.json")["cost"]["requests"]
        assert 40 <= fake.requests <= cost <= 48


def written(folder: Path) -> set[str]:
    """The prompts whose answers are on disk."""
    [journal] = (folder / "runs" / "store").glob("*/checkpoints/answers.jsonl")
    found = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
    return {line["text"].removeprefix("The answer to ") for line in found if line["what"] == "answer"}


def test_what_cannot_get_better_stops_and_what_one_prompt_cannot_have_drops_it(tmp_path, monkeypatch):
    hurry(monkeypatch)
    data = str(write_rows(tmp_path, 6))
    with serving(FakeEndpoint(mood=lambda prompt, _: "locked")) as fake:
        there = {"url": fake.url, "model": "fake", **QUICK}
        with pytest.raises(TriviumError, match=r"refuses every request for fake: 401 wrong key; check `url`"):
            synthesized(tmp_path, endpoint=there, data=data)
        fake.mood = lambda prompt, _: "refused" if number_of(prompt) == 2 else "good"
        stage = synthesized(tmp_path, endpoint=there, data=data)
        [dropped] = lines(stage / "dropped.jsonl")
        assert dropped["reason"] == "refused by the endpoint: 400 I will not"
        assert len(lines(stage / "data" / "rows.jsonl")) == 5
        fake.mood = lambda prompt, _: "broken"
        monkeypatch.setattr("trivium.generate.asking.writers.MOST_FAILED", 3)
        with pytest.raises(
            TriviumError, match=r"does not answer any more \(no answer after 5 attempts: 500 oops"
        ):
            synthesized(
                tmp_path, "other", endpoint=there, data=str(write_rows(tmp_path / "other", 9)), seed=3
            )
    for wrong, said in (
        ({"url": "ftp://x", "model": "m"}, "is an address such as"),
        ({"url": "https://me:pass@x/v1", "model": "m"}, "holds a password"),
        (
            {"url": "https://x/v1", "model": "m", "key_env": "NO_SUCH_KEY_HERE"},
            "NO_SUCH_KEY_HERE.*is not set",
        ),
    ):
        with pytest.raises(TriviumError, match=said):
            synthesized(tmp_path, "wrong", endpoint=wrong, data=data)


ONCE = {"no_usage", "odd_usage"}
TWICE = {"nested", "error_inside", "reset", "busy_until"}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("mood", sorted(ONCE | TWICE))
def test_an_odd_answer_costs_a_request_and_no_row(tmp_path, monkeypatch, mood):
    """What holds an answer is not asked for again, whatever else is wrong with it; what holds none is."""
    hurry(monkeypatch)
    with serving(FakeEndpoint(mood=lambda _, attempt: "good" if attempt else mood)) as fake:
        stage = synthesized(
            tmp_path, endpoint={"url": fake.url, "model": "fake", **QUICK}, data=str(write_rows(tmp_path, 4))
        )
        cost = read_json(stage / "synthesis.json")["cost"]
        assert len(lines(stage / "data" / "rows.jsonl")) == 4
        assert set(fake.delivered.values()) == {1}
        assert fake.requests == cost["requests"] == (4 if mood in ONCE else 8)
        assert fake.tokens <= cost["tokens"]


def test_an_answer_without_content_is_paid_for_once(tmp_path, monkeypatch):
    """A refusal, or thoughts that used up all tokens: the same would come again."""
    hurry(monkeypatch)
    with serving(FakeEndpoint(mood=lambda prompt, _: "good" if number_of(prompt) else "no_content")) as fake:
        stage = synthesized(
            tmp_path, endpoint={"url": fake.url, "model": "fake", **QUICK}, data=str(write_rows(tmp_path, 3))
        )
        assert fake.requests == 3
        assert [row["reason"] for row in lines(stage / "dropped.jsonl")] == ["empty: the model said nothing"]


@pytest.mark.parametrize("file_format", ["jsonl", "parquet"])
def test_half_an_emoji_is_a_letter_that_files_can_hold(tmp_path, file_format):
    """As servers write that cut an answer between two tokens of one letter; also inside of the JSON of a
    teacher."""
    schema = {"type": "object", "properties": {"topic": {"type": "string"}}}
    teacher = {"template": "Ask about {{ prompt }}", "to": "asked", "schema": schema}
    say = lambda prompt, _: '{"topic": "\\ud83d?"}' if "Ask" in prompt else "smile \ud83d"
    with serving(FakeEndpoint(answer=say)) as fake:
        stage = synthesized(
            tmp_path, endpoint={"url": fake.url, "model": "fake", **QUICK}, data=str(write_rows(tmp_path, 2)),
            steps=[{"teacher": teacher}, {"answer": {"temperature": 0.5}}], file_format=file_format,
        )  # fmt: skip
    rows = [one.fields for one in read_documents(Source(path=str(stage / "data" / f"rows.{file_format}")))]
    assert {row["messages"][-1]["content"] for row in rows} == {"smile \ufffd"}
    assert "\ufffd?" in json.dumps(rows, ensure_ascii=False)


def test_an_answer_has_to_be_whole_within_its_timeout(tmp_path, monkeypatch):
    hurry(monkeypatch)
    with serving(FakeEndpoint(mood=lambda _, attempt: "good" if attempt else "drips")) as fake:
        there = {"url": fake.url, "model": "fake", **QUICK, "timeout": 1.0}
        stage = synthesized(tmp_path, endpoint=there, data=str(write_rows(tmp_path, 1)))
        [row] = lines(stage / "data" / "rows.jsonl")
        assert row["messages"][1]["content"] == "The answer to question number 0"
        assert fake.tokens < read_json(stage / "synthesis.json")["cost"]["tokens"]


def test_a_server_that_moved_is_named(tmp_path, monkeypatch):
    hurry(monkeypatch)
    with serving(FakeEndpoint(mood=lambda *_: "moved")) as fake:
        there = {"url": fake.url, "model": "fake", **QUICK}
        with pytest.raises(TriviumError, match=r"308 redirects to https://new\.example/.*check `url`"):
            synthesized(tmp_path, endpoint=there, data=str(write_rows(tmp_path, 3)))


def test_a_refusal_does_not_wait_for_those_who_wait_for_budget(tmp_path):
    """Three requests are allowed and in flight, a fourth waits for what they may not need."""
    place = recipe(
        tmp_path, endpoint={"url": "", "model": "fake", **QUICK}, data=str(write_rows(tmp_path, 20)),
        budget={"requests": 3},
    )  # fmt: skip
    with serving(FakeEndpoint(mood=lambda *_: "locked", delay=0.5)) as fake:
        place.write_text(place.read_text().replace("url: ''", f"url: {fake.url}"))
        process = FORK.Process(target=run_refused, args=(place, tmp_path / "runs"))
        process.start()
        process.join(60)
        ended = process.exitcode
        if ended is None:
            process.kill()
            process.join()
        assert ended == 3


def run_refused(place: Path, runs: Path) -> None:
    try:
        trivium.run(place, runs=runs)
    except TriviumError:
        os._exit(3)


def test_an_answer_that_was_damaged_on_disk_is_asked_for_again(tmp_path):
    data = str(write_rows(tmp_path, 4))
    with serving(FakeEndpoint()) as fake:
        there = {"url": fake.url, "model": "fake", **QUICK}
        stage = synthesized(tmp_path, endpoint=there, data=data)
        text = (stage / "answers.jsonl").read_text()
        (stage / "answers.jsonl").write_text(text.replace("number 2", "number 7") + '{"what": "ans')
        synthesized(tmp_path, "again", endpoint=there, data=data, steps=["answer", "traces"])
        assert fake.attempts["question number 2"] == 2
        assert fake.requests == 5


def test_the_plan_says_what_it_would_cost_at_most(tmp_path, capsys):
    place = recipe(
        tmp_path, endpoint={"url": "http://127.0.0.1:9/v1", "model": "m", "completion_price": 2.0},
        data=str(write_rows(tmp_path, 50)), budget={"tokens": "1M"},
        steps=[{"answer": {"samples": 4, "max_new_tokens": 100}}, {"verify": "agreement"}],
    )  # fmt: skip
    from trivium.cli import main

    main(["plan", str(place), "--runs", str(tmp_path / "runs")])
    said = " ".join(capsys.readouterr().out.split())
    assert "answers 200" in said
    assert "money at most 0.04" in said


def test_the_ledger_believes_no_server_that_cannot_be_right():
    assert believed(7, "seven words of text that are here", 40) == (7, True)
    assert believed(0, "something", 40) == (40, False)
    assert believed(1, "a text far too long for one token", 40) == (40, False)
    assert believed(41, "x", 40) == (40, False)
    assert believed(0, "", 40) == (0, True)
    ledger = Ledger(Budget(tokens=100))
    assert ledger.reserve(Cost(60, 1))
    assert not ledger.reserve(Cost(60, 1))
    ledger.settle(Cost(60, 1), Cost(10, 1))
    assert ledger.reserve(Cost(60, 1))
    assert ledger.spent + ledger.reserved == Cost(70, 2)


def test_a_recipe_that_asks_nobody_is_refused(tmp_path):
    with pytest.raises(TriviumError, match="`answer` asks a model: name it as `from` or `endpoint`"):
        synthesized(tmp_path, data=str(write_rows(tmp_path, 1)))
    stage = yaml.safe_load(recipe(tmp_path, data="x", steps=[{"anwser": 2}]).read_text())["stages"]["asked"]
    with pytest.raises(TriviumError, match="did you mean `answer`"):
        synthesized(tmp_path, **stage)
