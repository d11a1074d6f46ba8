"""`search` in a chat over HTTP: the answer and tree of Python, the server's bounds, and others meanwhile."""

from __future__ import annotations

import asyncio
import re
import threading

import openai
import pytest
from generating import tiny_engine, tokenizer
from serving import CHAT, HELLO, ScriptedEngine, assert_error, client, raw, running, until
from tuning import own, small_model

from trivium.evals.searching import Searcher
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.generate.search.settings import search_settings
from trivium.grade.learned import learned_scorer
from trivium.model.scalar_head import ScalarHead, save_reward_model, without_language_head
from trivium.serve.limits import Limits
from trivium.serve.searching import SearchOfClient

ASKED = {"model": "one", "messages": HELLO, "max_tokens": 24, "seed": 3}
ROWS = 8


@pytest.fixture(scope="module")
def prm(tmp_path_factory):
    """The folder of a process reward model that was not trained."""
    folder = tmp_path_factory.mktemp("prm")
    model = without_language_head(small_model(own()))
    save_reward_model(
        model,
        ScalarHead(model.config.width, seed=1, bias=True),
        folder,
        pad_id=own().pad_id,
        separator="\n",
    )
    own().save(folder)
    return folder


@pytest.fixture(scope="module")
def address(prm):
    limits = Limits(drain_seconds=2, search_samples=12, search_tokens=600, search_steps=50)
    judges = {"prm": learned_scorer(prm, "prm")}
    with running({"one": tiny_engine(rows=ROWS)}, limits=limits, judges=judges) as place:
        yield place


def in_python(**settings):
    """The same search without a server."""
    searcher = Searcher(tiny_engine(rows=ROWS), search_settings({"seed": 3, **settings}))
    ids = tokenizer().encode_chat(HELLO, add_generation_prompt=True).ids
    (found,) = searcher.run([searcher.explorer(ids, HELLO, 24)])
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "best_of", "n": 10, "scorer": "logprob"},
        {"method": "majority", "n": 4},
        {"method": "beam", "n": 4, "width": 2, "separator": " ", "max_steps": 4},
        {
            "method": "mcts",
            "n": 5,
            "width": 2,
            "separator": " ",
            "scorer": {"model": "prm", "aggregate": "last"},
        },
        {"method": "best_of", "n": 3, "scorer": "prm"},
    ],
    ids=lambda one: f"{one['method']}-{one.get('scorer')}",
)
def test_the_answer_and_the_tree_are_those_of_python(address, prm, settings):
    here = dict(settings)
    if "prm" in str(settings.get("scorer")):
        here["scorer"] = {
            "model": str(prm),
            **({"aggregate": "last"} if settings["method"] == "mcts" else {}),
        }
    expected = in_python(**here).as_json()
    with client(address) as api:
        answer = api.chat.completions.create(**ASKED, extra_body={"search": {**settings, "tree": True}})
        brief = api.chat.completions.create(**ASKED, extra_body={"search": settings})
    found = answer.model_extra["trivium"]["search"]
    assert answer.choices[0].message.content == expected["text"]
    assert found["tree"] == expected["tree"]
    assert len(found["tree"]) > 1
    for name in ("answer", "score", "tokens", "solutions", "scored"):
        assert found[name] == expected[name], name
    assert answer.usage.completion_tokens == expected["tokens"]
    assert brief.choices[0].message.content == expected["text"]
    assert "tree" not in brief.model_extra["trivium"]["search"]


def test_a_stream_is_one_piece(address):
    asked = {**ASKED, "extra_body": {"search": "best_of"}}
    with client(address) as api:
        whole = api.chat.completions.create(**asked)
        parts = list(
            api.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        )
        with raw(address) as http:
            counted = http.get("/metrics").text
    said = [part for part in parts if part.choices and part.choices[0].delta.content]
    assert [part.choices[0].delta.content for part in said] == [whole.choices[0].message.content]
    assert said[0].model_extra["trivium"] == whole.model_extra["trivium"]
    assert parts[-1].usage == whole.usage
    assert 'trivium_searches_total{model="one",method="best_of"}' in counted


@pytest.mark.parametrize(
    ("search", "more", "names"),
    [
        ({"method": "guess"}, {}, "search.method"),
        ({"n": 8, "depth": 3}, {}, "search.depth"),
        ({"n": 13}, {}, "search.n"),
        ({"method": "beam", "n": 4, "width": 3}, {}, "search"),
        ({"method": "mcts", "width": 13}, {}, "search.n"),
        ({"n": 12, "max_new_tokens": 60}, {}, "search.n"),
        ({"token_budget": 601}, {}, "search.token_budget"),
        ({"method": "beam", "max_steps": 51}, {}, "search.max_steps"),
        ({"method": "beam", "lookahead": 51}, {}, "search.lookahead"),
        ({"separator": "x" * 257}, {}, "search.separator"),
        ({"scorer": "/etc/passwd.py:score"}, {}, "search.scorer"),
        ({"scorer": {"model": "/tmp/prm"}}, {}, "search.scorer"),
        ({"scorer": {"name": "code"}}, {}, "search.scorer"),
        ({"scorer": {"model": "prm", "aggregate": "most"}}, {}, "search.scorer.aggregate"),
        ({"scorer": {"model": "logprob", "aggregate": "min"}}, {}, "search.scorer.aggregate"),
        ({"temperature": 1e9}, {}, "search.temperature"),
        ({}, {"temperature": 0}, "search.temperature"),
        ({}, {"n": 2}, None),
        ({}, {"logprobs": True}, None),
        ({}, {"regex": "a+"}, None),
        ({}, {"top_k": 3}, None),
        ({"max_new_tokens": 4000}, {}, "search.n"),
        (3, {}, "search"),
    ],
)  # fmt: skip
def test_what_a_search_may_not_ask_for_is_refused(address, search, more, names):
    with raw(address) as http:
        answer = http.post(CHAT, json={**ASKED, **more, "search": search})
    assert_error(answer, 400)
    if names is not None:
        assert answer.json()["error"]["param"] == names


def test_a_card_says_what_a_search_may_ask_for(address):
    with client(address) as api:
        facts = api.models.retrieve("one").model_extra["trivium"]["search"]
    assert facts == {"samples": 12, "tokens": 600, "steps": 50, "scorers": ["logprob", "steps", "prm"]}


def test_searches_leave_half_of_the_rows_and_others_are_answered_meanwhile():
    engine, most = ScriptedEngine("a b c d e f g h " * 8, rows=4, delay=0.004), []
    limits = Limits(drain_seconds=2, searches=2)
    with running({"one": engine}, limits=limits) as address, client(address) as api, raw(address) as http:
        asked = {"model": "one", "messages": HELLO, "max_tokens": 60}
        ended = []

        def search():
            ended.append(api.chat.completions.create(**asked, extra_body={"search": {"n": 6}}))

        threads = [threading.Thread(target=search) for _ in range(2)]
        for one in threads:
            one.start()
        until(lambda: len(engine.rows) == 2)
        assert_error(http.post(CHAT, json={**asked, "search": "majority"}), 429)
        for _ in range(3):
            most.append(len(engine.rows))
            answer = api.chat.completions.create(**{**asked, "max_tokens": 2})
            assert answer.choices[0].message.content
        assert not ended
        assert max(most) == 2
        for one in threads:
            one.join(60)
    assert [one.usage.completion_tokens for one in ended] == [6 * 60] * 2


def test_a_search_whose_client_left_draws_nothing_more():
    engine = ScriptedEngine("a b c d e f g h " * 8, rows=4, delay=0.004)
    with running({"one": engine}, limits=Limits(drain_seconds=2, searches=1)) as address:
        asked = {"model": "one", "messages": HELLO, "max_tokens": 60}
        with client(address, timeout=0.2) as api, pytest.raises(openai.APITimeoutError):
            api.chat.completions.create(**asked, extra_body={"search": {"n": 30}})
        until(lambda: not engine.rows)
        drawn = engine.counts["generated_tokens"]
        with client(address) as api:
            answer = api.chat.completions.create(**asked, extra_body={"search": {"n": 2}})
        assert answer.usage.completion_tokens == engine.counts["generated_tokens"] - drawn == 120


def test_the_tokens_of_searches_are_counted_by_model(address):
    with raw(address) as http:
        assert http.post(CHAT, json={**ASKED, "search": {"n": 2}}).status_code == 200
        assert re.search(r'trivium_search_tokens_total\{model="one"\} [1-9]', http.get("/metrics").text)


def test_when_one_sample_fails_the_others_are_drawn_no_longer(monkeypatch):
    stopped = []

    async def sample(_: SearchOfClient, request: Request) -> None:
        try:
            await asyncio.sleep(0 if request.sampling.seed == 5 else 60)
        except asyncio.CancelledError:
            stopped.append(request.sampling.seed)
            raise
        raise OSError("the engine fell over")

    async def drawn() -> set[int | None]:
        with pytest.raises(OSError, match="fell over"):
            await search._drawn([Request([1], Sampling(seed=5), n=3)])
        await asyncio.sleep(0)
        return set(stopped)

    search = SearchOfClient.__new__(SearchOfClient)
    monkeypatch.setattr(SearchOfClient, "_sample", sample)
    assert asyncio.run(drawn()) == {seed_of_sample(5, 1), seed_of_sample(5, 2)}
