"""Settings of the stages that prepare texts, and of those that ask models: tokenizer to text_to_sql."""

from __future__ import annotations

import json
from typing import Any

from lines import moves, refuses
from tiny_run import OTHERS, Seen

from trivium.data.shards import Shards
from trivium.evals.results import answers_path
from trivium.kit.files import read_json
from trivium.kit.metrics import read_metrics
from trivium.tokens.tokenizer import Tokenizer

# tokenizer


def made(seen: Seen) -> Tokenizer:
    return Tokenizer.load(seen.folder / "tokenizer")


@moves("vocabulary", 280, kinds=["tokenizer"], both={"data": "others.jsonl"})
def vocabulary(before: Seen, after: Seen) -> None:
    assert before.summary["vocabulary"] < after.summary["vocabulary"] == 280
    assert made(after).vocabulary_size == 280


@moves("digits", "triples", "free", kinds=["tokenizer"], both={"data": "numbers.jsonl", "vocabulary": 280})
@moves(
    "digits",
    "single",
    kinds=["tokenizer"],
    both={"data": "numbers.jsonl", "vocabulary": 280, "digits": "free"},
)
def digits(before: Seen, after: Seen, value: str) -> None:
    """How many digits one token may have."""
    assert longest_number(after) == {"single": 1, "triples": 3, "free": 6}[value]
    assert longest_number(after) != longest_number(before)


def longest_number(seen: Seen) -> int:
    tokenizer = made(seen)
    return max(len(tokenizer.decode([one]).strip()) for one in tokenizer.encode(" 123456"))


@moves("characters", 50, kinds=["tokenizer"], both={"data": "others.jsonl"})
def characters(before: Seen, after: Seen) -> None:
    """Reading stops with the text that reaches so many."""
    assert before.summary["characters"] == sum(map(len, OTHERS))
    assert after.summary["characters"] == sum(map(len, OTHERS[:3]))


SOURCE = {"path": "others.jsonl"}


def reading(name: str, value: Any, before: Any, after: Any, check: Any, **more: Any) -> None:
    moves(f"data.{name}", value, kinds=["tokenizer"], both={"data": [before]}, beside={"data": [after]},
          moved=False, **more)(check)  # fmt: skip


def fewer(before: Seen, after: Seen) -> None:
    assert after.summary["documents"] < before.summary["documents"]


def more(before: Seen, after: Seen) -> None:
    assert after.summary["documents"] > before.summary["documents"]


def longer(before: Seen, after: Seen) -> None:
    """The other column begins with three letters more."""
    assert after.summary["characters"] == before.summary["characters"] + 3 * len(OTHERS)


def other_texts(before: Seen, after: Seen) -> None:
    assert after.summary["characters"] != before.summary["characters"]


reading("path", "texts.jsonl", SOURCE, {"path": "texts.jsonl"}, other_texts)
reading("limit", 5, SOURCE, {**SOURCE, "limit": 5}, fewer)
reading("columns", {"text": "other"}, SOURCE, {**SOURCE, "columns": {"text": "other"}}, longer)
reading("split", "test", {"path": "halves-others"}, {"path": "halves-others", "split": "test"}, fewer)
reading(
    "separator",
    "|",
    {"path": "notes.txt", "separator": "\n\n"},
    {"path": "notes.txt", "separator": "|"},
    more,
)
reading(
    "subset", "en", SOURCE, {**SOURCE, "subset": "en"}, None, refused="names a part of a data set on the hub"
)
DAMAGED = {"path": "damaged-others.jsonl", "on_bad": "skip"}
reading("on_bad", "skip", SOURCE, DAMAGED, lambda before, after: None)
reading("on_bad", "stop", DAMAGED, {"path": "damaged-others.jsonl"}, None, refused="damaged-others.jsonl:")

# corpus


def shards(seen: Seen, split: str = "train") -> Shards:
    return Shards(seen.folder / "data", split)


def manifest(seen: Seen) -> dict[str, Any]:
    return read_json(seen.folder / "data" / "manifest.json")


moves(
    "data.path",
    "others.jsonl",
    kinds=["corpus"],
    both={"data": [{"path": "texts.jsonl"}]},
    beside={"data": [{"path": "others.jsonl"}]},
    moved=False,
)(lambda before, after: _all_from(after, "others.jsonl"))


def _all_from(seen: Seen, file: str) -> None:
    found = shards(seen)
    assert len(found)
    assert all(file in found.id(index) for index in range(len(found)))


@moves("tokenizer", "bigger", kinds=["corpus"])
def tokenizer(before: Seen, after: Seen) -> None:
    for seen, name in ((before, "words"), (after, "bigger")):
        assert manifest(seen)["tokenizer"] == Tokenizer.load(seen.inputs[name]).fingerprint
    assert shards(before).tokens != shards(after).tokens


@moves("validation", 0.5, kinds=["corpus"])
def validation(before: Seen, after: Seen) -> None:
    few, many = (len(shards(seen, "validation")) for seen in (before, after))
    assert few < many
    assert 0.25 < many / (many + len(shards(after))) < 0.75


@moves(
    "unique", False, kinds=["corpus"], both={"data": ["texts.jsonl", "more-texts.jsonl"], "validation": 0.0}
)
def unique(before: Seen, after: Seen) -> None:
    assert 2 * len(shards(before)) == len(shards(after)) == 120


@moves("columns", ["ease"], kinds=["corpus"])
def columns(before: Seen, after: Seen) -> None:
    assert manifest(before)["columns"] == []
    found = shards(after)
    for index in range(len(found)):
        number = int(found.id(index).rpartition(":")[2])
        assert found.column("ease")[index] == (number - 1) % 7


@moves("tokens_per_shard", 200, kinds=["corpus"])
def tokens_per_shard(before: Seen, after: Seen) -> None:
    """The same documents in more files."""
    assert shards(after).tokens == shards(before).tokens
    assert (
        len(list((after.folder / "data").glob("train-*.bin")))
        > 1
        == len(list((before.folder / "data").glob("train-*.bin")))
    )


@moves("workers", 2, kinds=["corpus"])
def workers(before: Seen, after: Seen) -> None:
    """More processes write the same; that they are used is tested where shards are written."""
    assert shards(after).tokens == shards(before).tokens


# evaluate


def results(seen: Seen) -> dict[str, Any]:
    return read_json(seen.folder / "report" / "results.json")


def records(seen: Seen) -> list[dict[str, Any]]:
    return read_metrics(answers_path(seen.folder / "report" / "results.json"))


@moves("from", "second", kinds=["evaluate"])
def asked_model(before: Seen, after: Seen) -> None:
    assert [one["asked"] for one in records(before)] == [one["asked"] for one in records(after)]
    assert [one["answers"] for one in records(before)] != [one["answers"] for one in records(after)]


@moves("on", ["sums"], kinds=["evaluate"])
def on(before: Seen, after: Seen) -> None:
    assert set(results(before)["tasks"]) == {"instructions"}
    assert set(results(after)["tasks"]) == {"sums"}


@moves("against", ["before"], kinds=["evaluate"], both={"asking.seed": 1})
def against(before: Seen, after: Seen) -> None:
    assert "report/compared.json" not in before.files
    assert "report/compared.json" in after.files


@moves("seed", 2, kinds=["evaluate"])
@moves("asking.seed", 2, kinds=["evaluate"])
def other_questions(before: Seen, after: Seen) -> None:
    assert [one["asked"] for one in records(before)] != [one["asked"] for one in records(after)]


@moves("asking.limit", 3, kinds=["evaluate"])
def limit(before: Seen, after: Seen) -> None:
    assert (len(records(before)), len(records(after))) == (2, 3)


@moves("asking.max_new_tokens", 5, kinds=["evaluate"])
def asking_max_new_tokens(before: Seen, after: Seen) -> None:
    longest = [
        max(one["tokens"] for record in records(seen) for one in record["answers"])
        for seen in (before, after)
    ]
    assert longest == [2, 5]


@moves("asking.samples", 3, kinds=["evaluate"], both={"from": "wide", "on": ["sums"]})
def samples(before: Seen, after: Seen) -> None:
    assert {len(record["answers"]) for record in records(before)} == {1}
    assert {len(record["answers"]) for record in records(after)} == {4}


@moves(
    "asking.temperature",
    0.0001,
    kinds=["evaluate"],
    both={"from": "wide", "on": ["sums"], "asking.samples": 3},
)
def temperature(before: Seen, after: Seen) -> None:
    """Nearly none: all samples are the likeliest answer."""

    def apart(seen: Seen) -> int:
        return sum(len({one["text"] for one in record["answers"]}) - 1 for record in records(seen))

    assert apart(before) > apart(after) == 0


def prompts(seen: Seen) -> str:
    return json.dumps([one["asked"] for one in records(seen)])


@moves("asking.style", "chat", kinds=["evaluate"], both={"asking.style": "continue"})
@moves("asking.style", "continue", kinds=["evaluate"], both={"asking.style": "chat"})
def style(before: Seen, after: Seen, value: str) -> None:
    """The model reads other tokens, and answers otherwise."""
    styles = {task["style"] for task in results(after)["tasks"].values()}
    assert styles == {value}
    assert [one["answers"] for one in records(before)] != [one["answers"] for one in records(after)]


SUMS = {"from": "wide", "on": ["sums"]}
TALKING = {**SUMS, "asking.style": "chat"}


def other_prompts(before: Seen, after: Seen) -> None:
    """The same questions are put in another way."""
    assert [one["id"] for one in records(before)] == [one["id"] for one in records(after)]
    assert len(before.asked) == len(after.asked)
    assert all(one != other for one, other in zip(before.asked, after.asked))


@moves("asking.shots", 2, kinds=["evaluate"], both={**SUMS, "asking.style": "continue"})
def shots(before: Seen, after: Seen) -> None:
    """Two questions with their answers stand before the same prompt."""
    for plain, prompt in zip(before.asked, after.asked, strict=True):
        assert len(prompt) > 2 * len(plain)
        assert prompt[-8:] == plain[-8:]


moves("asking.chain_of_thought", False, kinds=["evaluate"], both=TALKING)(other_prompts)
moves("asking.reasoning", "ask", "open", kinds=["evaluate"], both=TALKING)(other_prompts)
moves("asking.reasoning", "off", kinds=["evaluate"], both={**TALKING, "asking.reasoning": "open"})(
    other_prompts
)


# compare


def answered(seen: Seen) -> list[dict[str, Any]]:
    return read_metrics(seen.folder / "report" / "answers.jsonl")


def said(seen: Seen, side: int) -> list[str]:
    return [row["answers"][side] for row in answered(seen)]


@moves("from", "forked", kinds=["compare"])
def first_model(before: Seen, after: Seen) -> None:
    assert said(before, 0) != said(after, 0)
    assert said(before, 1) == said(after, 1)


@moves("against", "forked", kinds=["compare"])
def second_model(before: Seen, after: Seen) -> None:
    assert said(before, 0) == said(after, 0)
    assert said(before, 1) != said(after, 1)


@moves("judge", ["mine.py:shortness"], kinds=["compare"])
def judge(before: Seen, after: Seen) -> None:
    assert said(before, 0) == said(after, 0)
    assert [row["scores"] for row in answered(before)] != [row["scores"] for row in answered(after)]


BEST = {"n": 4, "by": ["mine.py:spread"]}


@moves("best_of.n", 2, kinds=["compare"], both={"best_of": BEST})
def best_of(before: Seen, after: Seen) -> None:
    assert [row["n"] for row in before.summary["best_of"]] == [1, 2, 4]
    assert [row["n"] for row in after.summary["best_of"]] == [1, 2]


@moves("best_of.by", ["mine.py:shortness"], kinds=["compare"], both={"best_of": BEST})
def chosen_by(before: Seen, after: Seen) -> None:
    """Of the same four answers, others are handed in."""
    assert said(before, 0) != said(after, 0)
    assert said(before, 1) == said(after, 1)


@moves("temperature", 0.0, kinds=["compare"])
@moves("seed", 2, kinds=["compare"])
def other_draws(before: Seen, after: Seen) -> None:
    assert said(before, 0) != said(after, 0)
    assert said(before, 1) != said(after, 1)


@moves("max_new_tokens", 3, kinds=["compare"])
def shorter_answers(before: Seen, after: Seen) -> None:
    assert max(map(len, said(after, 0))) < max(map(len, said(before, 0)))


# text_to_sql


def questions(seen: Seen, part: str) -> list[dict[str, Any]]:
    return [row for path in sorted(seen.folder.glob(f"{part}/*.jsonl")) for row in read_metrics(path)]


def texts(seen: Seen) -> list[str]:
    return [row["messages"][0]["content"] for part in ("data", "held_out") for row in questions(seen, part)]


moves(
    "data.path",
    "few-questions.jsonl",
    kinds=["text_to_sql"],
    both={"data": [{"path": "questions.jsonl"}]},
    beside={"data": [{"path": "few-questions.jsonl"}]},
    moved=False,
)(lambda before, after: _fewer_questions(before, after))


def _fewer_questions(before: Seen, after: Seen) -> None:
    assert 0 < len(texts(after)) < len(texts(before))


@moves(
    "database",
    "shop.sqlite",
    kinds=["text_to_sql"],
    both={"data": {"path": "questions.jsonl"}, "tables": "full"},
)
def database(before: Seen, after: Seen) -> None:
    """The other shop has a column more."""
    assert not any("weight" in text for text in texts(before))
    assert all("weight" in text for text in texts(after))


@moves("tables", "full", "none", kinds=["text_to_sql"])
@moves("tables", "short", kinds=["text_to_sql"], both={"tables": "none"})
def tables(before: Seen, after: Seen, value: str) -> None:
    told = {"full": "CREATE TABLE goods", "short": "goods(name, price)", "none": "What costs"}[value]
    assert all(text.startswith(told) for text in texts(after))


@moves("held_out", 0.5, kinds=["text_to_sql"])
def held_out(before: Seen, after: Seen) -> None:
    assert (before.summary["held_out"], after.summary["held_out"]) == (3, 6)


@moves("seed", 2, kinds=["text_to_sql"])
def which_are_held_out(before: Seen, after: Seen) -> None:
    assert len(questions(before, "held_out")) == len(questions(after, "held_out"))
    assert questions(before, "held_out") != questions(after, "held_out")


@moves("on_bad", "skip", kinds=["text_to_sql"])
def skips(before: Seen, after: Seen) -> None:
    assert after.summary["left_out"] == 0


refuses("on_bad", "stop", "its query fails", kinds=["text_to_sql"], both={
    "data": "bad-questions.jsonl", "on_bad": "skip"})  # fmt: skip


def held_out_from(name: str, value: Any, before: Any, after: Any, check: Any, **more: Any) -> None:
    moves(f"held_out.{name}", value, kinds=["text_to_sql"],
          both={"data": "more-questions.jsonl", "held_out": before}, beside={"held_out": after},
          moved=False, **more)(check)  # fmt: skip


def fewer_are_held_out(before: Seen, after: Seen) -> None:
    assert 0 < after.summary["held_out"] < before.summary["held_out"]


def put_otherwise(before: Seen, after: Seen) -> None:
    assert all("zz" in row["messages"][0]["content"] for row in questions(after, "held_out"))
    assert not any("zz" in row["messages"][0]["content"] for row in questions(before, "held_out"))


ASKED = {"path": "few-questions.jsonl"}
FEWER = {"path": "halves-few-questions/test.jsonl"}
held_out_from("path", FEWER["path"], ASKED, FEWER, fewer_are_held_out)
held_out_from("limit", 2, ASKED, {**ASKED, "limit": 2}, fewer_are_held_out)
held_out_from(
    "columns", {"question": "other"}, ASKED, {**ASKED, "columns": {"question": "other"}}, put_otherwise
)
HALVES = {"path": "halves-few-questions"}
held_out_from("split", "test", HALVES, {**HALVES, "split": "test"}, fewer_are_held_out)
held_out_from(
    "subset", "en", ASKED, {**ASKED, "subset": "en"}, None, refused="names a part of a data set on the hub"
)
BAD = {"path": "damaged-few-questions.jsonl", "on_bad": "skip"}
held_out_from("on_bad", "skip", ASKED, BAD, lambda before, after: None)
held_out_from(
    "on_bad",
    "stop",
    BAD,
    {"path": "damaged-few-questions.jsonl"},
    None,
    refused="damaged-few-questions.jsonl:",
)
WORDS = "`separator` changes nothing here"
held_out_from("separator", "|", ASKED, {**ASKED, "separator": "|"}, None, refused=WORDS)
refuses("data.separator", "|", WORDS, kinds=["text_to_sql"],
        beside={"data": [{"path": "questions.jsonl", "separator": "|"}]}, moved=False)  # fmt: skip
