"""`/search` and `/tree` in the terminal chat, and `search` where data is synthesized."""

from __future__ import annotations

import json
import re

import pytest
from generating import tiny_engine, tokenizer
from serving import HELLO, conversation
from synthesizing import lines, recipe
from tuning import own, save, small_model

import trivium
from trivium.evals.searching import Searcher
from trivium.generate.search.settings import search_settings
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.serve.chat_search import read_search


def test_terminal_chat_searches_shows_what_it_took_and_the_tree():
    engine = tiny_engine(rows=1)
    talk, out = conversation(("one", engine))
    talk.hear("/tree")
    assert "nothing was searched for yet" in out.getvalue()
    talk.hear("/search beam 4 width=2 separator=' ' max_steps=3 seed=5 temperature=0.8")
    assert "Search: beam, n = 4" in out.getvalue()
    out.truncate(out.seek(0))
    talk.hear("hello")
    settings = search_settings(
        {"method": "beam", "n": 4, "width": 2, "separator": " ", "max_steps": 3, "seed": 5}
    )
    searcher = Searcher(tiny_engine(rows=8), settings)
    ids = tokenizer().encode_chat(HELLO, add_generation_prompt=True).ids
    (expected,) = searcher.run([searcher.explorer(ids, HELLO, 40)])
    told = out.getvalue()
    assert f"(beam: {len(expected.solutions)} solutions, {expected.tokens} tokens drawn" in told
    assert talk.speakers[0].messages[-1]["content"] == expected.text.strip()
    out.truncate(out.seek(0))
    talk.hear("/tree")
    shown = out.getvalue().splitlines()
    assert len(shown) == len(expected.tree.nodes) - 1
    assert sum(line.startswith("*") for line in shown) == expected.chosen.node.depth
    assert re.fullmatch(r"[* ] +\d\.\d\d( x\d)?  .*", shown[0])
    out.truncate(out.seek(0))
    talk.hear("/search -")
    talk.hear("hello")
    assert "tokens drawn" not in out.getvalue()


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("guess 3", "method"),
        ("beam 4 width=3", "multiple"),
        ("best_of 8 nobody", "nobody"),
        ("best_of depth=3", "depth"),
    ],
)
def test_a_search_that_is_none_is_named(written, words, tmp_path):
    with pytest.raises(TriviumError, match=words):
        read_search(written, str(tmp_path))


STEPS = [
    {"answer": {"max_new_tokens": 12, "cut": True, "search": {"method": "best_of", "n": 4, "scorer": "prm"}}}
]
ROWS = [
    {
        "prompt": f"{n} and {n}",
        "completions": ["the river", "345" if n % 2 else "12"],
        "labels": [True, n % 2 == 0],
    }
    for n in range(12)
]


def written(tmp_path, steps=STEPS, **stage):
    """A recipe in which a tiny model answers by a search that a reward model scores."""
    save(tmp_path / "base", small_model(own()), own())
    for name, rows in (("steps", ROWS), ("prompts", [{"prompt": f"the {n} sacks"} for n in range(6)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prm = {
        "kind": "reward",
        "process": True,
        "from": "./base",
        "data": "./steps.jsonl",
        "pairs": 4,
        "steps": 1,
    }
    stage = {"from": "./base", "data": "./prompts.jsonl", "form": "completion", "steps": steps, **stage}
    return recipe(tmp_path, further={"prm": prm}, **stage)


@pytest.mark.slow
def test_synthesized_answers_are_those_that_a_search_hands_over(tmp_path):
    place = written(tmp_path)
    run = trivium.run(place, runs=tmp_path / "runs")
    rows = lines(run["asked"].folder / "data" / "rows.jsonl")
    assert len(rows) == 6
    assert rows[0]["provenance"][-1]["search"] == "best_of"
    plain = written(tmp_path / "plain", [{"answer": {**STEPS[0]["answer"], "search": "majority"}}])
    others = lines(trivium.run(plain, runs=tmp_path / "runs")["asked"].folder / "data" / "rows.jsonl")
    assert [row["completion"] for row in rows] != [row["completion"] for row in others]
    # All four solutions count, not the one that was handed over.
    cost = read_json(run["asked"].folder / "synthesis.json")["cost"]
    assert cost["tokens"] > 6 * 4 * 2
    # What is known is not searched for again: another stage with the same question, search and scorer.
    again = trivium.run(place, runs=tmp_path / "runs", set={"stages.asked.per_round": 3})
    assert again["asked"].summary["requests"] == {"cached": 6}
    assert (again["asked"].folder / "data" / "rows.jsonl").read_text() == (
        run["asked"].folder / "data" / "rows.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    ("search", "stage", "words"),
    [
        ({"method": "beam"}, {}, "token_budget"),
        ("guess", {}, "method"),
        ("best_of", {"engine": "vllm"}, "needs our engine"),
        (
            "best_of",
            {"from": None, "endpoint": {"url": "http://127.0.0.1:1", "model": "m"}},
            "needs our engine",
        ),
    ],
)
def test_a_search_that_synthesize_cannot_do_is_refused(tmp_path, search, stage, words):
    steps = [{"answer": {"search": search}}]
    stage = {name: one for name, one in {"from": "./base", **stage}.items() if one is not None}
    place = recipe(tmp_path, **{"data": "./prompts.jsonl", "steps": steps, **stage})
    with pytest.raises(TriviumError, match=words):
        trivium.run(place, runs=tmp_path / "runs")
