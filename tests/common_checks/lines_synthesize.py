"""What a stage that writes data asks, of whom, how often, and what it writes."""

from __future__ import annotations

import os
from typing import Any

import pyarrow.parquet as parquet
from fake_endpoint import FakeEndpoint, started
from lines import moves, refuses
from tiny_run import Seen

from trivium.kit.files import read_json
from trivium.kit.metrics import read_metrics

FAKES = [
    FakeEndpoint(), FakeEndpoint(answer=lambda *_: "another answer"), FakeEndpoint(), FakeEndpoint(),
    FakeEndpoint(), FakeEndpoint(delay=0.01), FakeEndpoint(delay=0.3),
    FakeEndpoint(mood=lambda prompt, attempt: "good" if attempt % 2 else "broken"),
]  # fmt: skip
for fake in FAKES:
    started(fake)
os.environ["A_KEY_OF_THE_TESTS"] = "made-up"
THERE = {
    "from": None, "steps": ["answer"], "endpoint.url": FAKES[0].url, "endpoint.model": "fake",
    "endpoint.timeout": 20.0,
}  # fmt: skip


def rows(seen: Seen, name: str = "data/rows.jsonl") -> list[dict[str, Any]]:
    return read_metrics(seen.folder / name)


def answers(seen: Seen) -> list[str]:
    return [row["completion"] for row in rows(seen)]


def cost(seen: Seen) -> dict[str, float]:
    return dict(read_json(seen.folder / "synthesis.json")["cost"])


def same(before: Seen, after: Seen) -> None:
    assert answers(before) == answers(after)


@moves("from", "second", kinds=["synthesize"])
def start(before: Seen, after: Seen) -> None:
    assert {row["provenance"][0]["model"] for row in rows(after)} == {"second"}
    assert answers(before) != answers(after)


@moves("seed", 2, kinds=["synthesize"])
def seed(before: Seen, after: Seen) -> None:
    assert answers(before) != answers(after)


@moves("steps", [{"answer": {"max_new_tokens": 2, "cut": True}}], kinds=["synthesize"])
def steps(before: Seen, after: Seen) -> None:
    assert max(map(len, answers(after))) < max(map(len, answers(before)))


@moves("form", "messages", kinds=["synthesize"])
def form(before: Seen, after: Seen) -> None:
    assert [row["messages"][1]["content"] for row in rows(after)] == answers(before)


@moves("form", "completion", kinds=["synthesize"], both={"form": "messages"})
def form_of_text(before: Seen, after: Seen) -> None:
    assert [row["messages"][1]["content"] for row in rows(before)] == answers(after)


def parquet_answers(seen: Seen) -> list[str]:
    return parquet.read_table(seen.folder / "data" / "rows.parquet")["completion"].to_pylist()


@moves("file_format", "parquet", kinds=["synthesize"])
def file_format(before: Seen, after: Seen) -> None:
    assert parquet_answers(after) == answers(before)


@moves("file_format", "jsonl", kinds=["synthesize"], both={"file_format": "parquet"})
def file_format_of_lines(before: Seen, after: Seen) -> None:
    assert answers(after) == parquet_answers(before)


@moves("coverage_by", ["answer"], kinds=["synthesize"])
def coverage_by(before: Seen, after: Seen) -> None:
    covered = [read_json(seen.folder / "synthesis.json")["diversity"]["coverage"] for seen in (before, after)]
    assert [one["columns"] for one in covered] == [[], ["answer"]]
    assert covered[1]["cells"] >= len(covered[1]["counts"]) > 1
    same(before, after)


@moves("seeds", 7, kinds=["synthesize"], both={"per_round": 4})
def seeds(before: Seen, after: Seen) -> None:
    assert answers(after) == answers(before)[: len(answers(after))]
    assert after.summary["not_drawn"] == len(rows(before)) + len(rows(before, "dropped.jsonl")) - 7


@moves("per_round", 5, kinds=["synthesize"])
@moves("max_rows", 3, kinds=["synthesize"])
def rounds(before: Seen, after: Seen) -> None:
    same(before, after)


@moves("data.path", "answers.jsonl", kinds=["synthesize"], moved=False,
       both={"data": [{"path": "problems.jsonl"}]}, beside={"data": [{"path": "answers.jsonl"}]})  # fmt: skip
def path(before: Seen, after: Seen) -> None:
    assert all(row["id"].startswith("answers") for row in rows(after))


# What was asked before is free, so a budget shows with another seed alone.
@moves("budget.tokens", 60, kinds=["synthesize"], both={"seed": 11}, beside={"seed": 12})
def tokens(before: Seen, after: Seen) -> None:
    assert cost(after)["tokens"] <= 60 < cost(before)["tokens"]


@moves("budget.requests", 5, kinds=["synthesize"], both={"seed": 13}, beside={"seed": 14})
def requests(before: Seen, after: Seen) -> None:
    assert cost(after)["requests"] == 5 < cost(before)["requests"]


PRICED = {**THERE, "endpoint.completion_price": 1e6, "steps": [{"answer": {"max_new_tokens": 20}}]}


@moves("budget.money", 50.0, kinds=["synthesize"], both={**PRICED, "seed": 15}, beside={"seed": 16})
def money(before: Seen, after: Seen) -> None:
    assert 0 < cost(after)["money"] <= 50 < cost(before)["money"]


@moves(
    "endpoint.completion_price", 1e6, kinds=["synthesize"], both={**THERE, "seed": 17}, beside={"seed": 18}
)
@moves("endpoint.prompt_price", 1e6, kinds=["synthesize"], both={**THERE, "seed": 19}, beside={"seed": 20})
def price(before: Seen, after: Seen) -> None:
    assert cost(before)["money"] == 0
    assert 30 < cost(after)["money"] < cost(after)["tokens"]


@moves("endpoint.url", FAKES[1].url, kinds=["synthesize"], both=THERE)
def url(before: Seen, after: Seen) -> None:
    assert set(answers(after)) == {"another answer"}
    assert "another answer" not in answers(before)


@moves("endpoint.model", "other", kinds=["synthesize"], both={**THERE, "endpoint.url": FAKES[2].url})
def model(before: Seen, after: Seen) -> None:
    assert {body["model"] for body in FAKES[2].bodies} == {"fake", "other"}


@moves("endpoint.body", {"tier": "low"}, kinds=["synthesize"], both={**THERE, "endpoint.url": FAKES[3].url})
def body(before: Seen, after: Seen) -> None:
    assert {one.get("tier") for one in FAKES[3].bodies} == {None, "low"}


@moves("endpoint.key_env", "A_KEY_OF_THE_TESTS", kinds=["synthesize"],
       both={**THERE, "seed": 21, "endpoint.url": FAKES[4].url}, beside={"seed": 22})  # fmt: skip
def key(before: Seen, after: Seen) -> None:
    assert FAKES[4].keys == {None, "Bearer made-up"}


@moves("endpoint.concurrency", 1, kinds=["synthesize"], both={**THERE, "seed": 23},
       beside={"seed": 24, "endpoint.url": FAKES[5].url})  # fmt: skip
def concurrency(before: Seen, after: Seen) -> None:
    assert FAKES[5].most_in_flight == 1


@moves("endpoint.requests_per_minute", 6000.0, kinds=["synthesize"], both={**THERE, "seed": 25})
@moves("endpoint.tokens_per_minute", 100_000, kinds=["synthesize"], both={**THERE, "seed": 26})
def rates(before: Seen, after: Seen) -> None:
    same(before, after)


SLOW = {**THERE, "endpoint.url": FAKES[6].url, "endpoint.retries": 0}
refuses("endpoint.timeout", 0.02, "No row is left", kinds=["synthesize"], both=SLOW, beside={"seed": 27})
BROKEN = {**THERE, "endpoint.url": FAKES[7].url}
refuses("endpoint.retries", 0, "No row is left", kinds=["synthesize"], both=BROKEN, beside={"seed": 28})
