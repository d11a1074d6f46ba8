"""Hostile schemas and expressions: refused within their budget, while everybody else is answered."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from generating import tiny_engine, tokenizer
from serving import CHAT, GOOD, ScriptedEngine, assert_error, raw, running, until

from trivium.generate.constraints import Constraint, Form, Grammars, form_of, library, matcher_of
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.serve import forms
from trivium.serve.forms import Forms, Trial
from trivium.serve.limits import Limits


def schema(**fields):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": fields}}}


# Without a budget the first takes minutes; it is 40 characters long.
ENDLESS = schema(type="integer", multipleOf=999983)
HARMLESS = {"regex": "[a-m ]{3,20}"}


@pytest.fixture(scope="module")
def grammars():
    return Grammars(tokenizer(), tokenizer().vocabulary_size)


@pytest.fixture
def trial():
    trial = Trial(0.4)
    yield trial
    trial.stop()


def test_a_form_that_takes_too_long_is_refused_and_others_are_tried_after_it(trial, grammars):
    endless = Form("json_schema", json.dumps({"type": "integer", "multipleOf": 999983}))
    assert "more than 0.4 s" in trial.problem("one", grammars, endless)
    process = trial._process.pid
    assert trial.problem("one", grammars, Form("regex", "[ab]+")) == ""
    assert "no text" in trial.problem("one", grammars, Form("regex", r"[^\s\S]"))
    assert trial.problem("one", grammars, Form("regex", "(")) != ""
    assert trial._process.pid == process, "only a copy of the process was ended"


def test_a_trial_that_was_killed_is_started_again(trial, grammars):
    assert trial.problem("one", grammars, Form("regex", "[ab]+")) == ""
    os.kill(trial._process.pid, signal.SIGKILL)
    trial._process.wait()
    assert trial.problem("one", grammars, Form("regex", "[ab]+")) == ""


@pytest.mark.slow
def test_everybody_is_answered_while_hostile_forms_are_tried():
    limits = Limits(grammar_seconds=0.5, queued=200)
    one, two = tiny_engine(rows=4), ScriptedEngine("a baker")
    with (
        running({"one": one, "two": two}, limits=limits) as address,
        raw(address) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        assert http.post(CHAT, json={**GOOD, **HARMLESS}).status_code == 200
        asked = [{**GOOD, **schema(type="integer", multipleOf=number)} for number in (999983, 999979, 999961)]
        hostile = [pool.submit(http.post, CHAT, json=body) for body in asked]
        for _ in range(5):
            for body in (GOOD, {**GOOD, **HARMLESS}, {**GOOD, "model": "two"}):
                assert http.post(CHAT, json=body).status_code == 200
        assert not all(one.done() for one in hostile), "the others were answered only after them"
        for answer in hostile:
            assert_error(answer.result(), 400)
            assert "more than 0.5 s to prepare" in answer.result().text


def test_a_form_is_compiled_once_and_a_refusal_is_remembered(monkeypatch):
    tried, problem = [], Trial.problem
    monkeypatch.setattr(Trial, "problem", lambda self, *what: tried.append(what[-1]) or problem(self, *what))
    with (
        running({"one": tiny_engine()}, limits=Limits(grammar_seconds=0.4)) as address,
        raw(address) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        for fields, status in ((HARMLESS, 200), (ENDLESS, 400)):
            answers = [pool.submit(http.post, CHAT, json={**GOOD, **fields}) for _ in range(8)]
            assert {answer.result().status_code for answer in answers} == {status}
            assert http.post(CHAT, json={**GOOD, **fields}).status_code == status
    assert len(tried) == 2


def test_forms_beyond_those_that_may_wait_get_429(monkeypatch):
    go, begun = threading.Event(), threading.Event()
    monkeypatch.setattr(Trial, "problem", lambda *_: begun.set() or (go.wait(20) and "") or "")
    monkeypatch.setattr(forms, "WAITING", 3)
    with (
        running({"one": tiny_engine()}) as address,
        raw(address) as http,
        ThreadPoolExecutor(8) as pool,
    ):
        waiting = [pool.submit(http.post, CHAT, json={**GOOD, "regex": f"a{n}b{{3}}"}) for n in range(3)]
        begun.wait(20)
        until(lambda: len(statuses(http, "c{4}")) == 1)
        answer = http.post(CHAT, json={**GOOD, "regex": "d{4}"})
        assert_error(answer, 429)
        assert int(answer.headers["retry-after"]) >= 1
        go.set()
        assert {one.result().status_code for one in waiting} == {200}


def statuses(http, regex):
    answer = http.post(CHAT, json={**GOOD, "regex": regex})
    return [answer.status_code] if answer.status_code == 429 else []


def test_an_answer_whose_form_takes_too_long_to_follow_fails_alone():
    engine = tiny_engine()
    wanted = Sampling(seed=1, regex="[a-m ]{40}", max_new_tokens=20)
    [expected] = tiny_engine().generate([Request([5, 6], wanted)])
    matcher = engine.grammars.compiled(form_of(None, wanted.regex)).matcher
    slow = engine.submit(Request([5, 6], wanted, constraint=Constraint(matcher.deep_copy(), 1e-9)))
    quick = engine.submit(Request([5, 6], wanted, constraint=Constraint(matcher, 60.0)))
    while not (slow.done and quick.done):
        engine.step()
    assert quick.completions == expected
    assert isinstance(slow.failure, TriviumError)
    assert "takes more than" in str(slow.failure)


def test_what_a_form_may_take_for_one_token_is_bounded(grammars):
    """Below what its library allows, with which one token of a pattern took seconds of all answers."""
    form = Form("regex", "(((a?){30}(b?){30}){30}){30}")
    grammars.prepare()
    matcher = library().LLMatcher
    grammar = matcher.grammar_from_regex(form.text)
    loose = followed(matcher(grammars._vocabulary, grammar, log_level=0))
    assert followed(matcher_of(form, grammars._vocabulary)) < loose


def followed(matcher):
    """For how many tokens a form is followed until it becomes too large."""
    token = tokenizer().encode("a")[-1]
    for count in range(1000):
        if matcher.is_error():
            return count
        matcher.compute_bitmask()
        matcher.consume_token(token)
    raise AssertionError("it has no bound at all")


def test_what_is_remembered_is_bounded(monkeypatch, grammars):
    import asyncio

    monkeypatch.setattr(Trial, "problem", lambda self, model, tokens, form: "no" * ("x" in form.text))
    monkeypatch.setattr(forms, "FOLLOWED", 3)
    monkeypatch.setattr(forms, "REFUSED", 3)

    async def ask(memory):
        for number in range(8):
            await memory.constraint("one", grammars, Form("regex", f"[ab]{{{number + 1}}}"))
            with pytest.raises(TriviumError, match="no"):
                await memory.constraint("one", grammars, Form("regex", f"x{number}"))

    memory = Forms(1.0)
    asyncio.run(ask(memory))
    memory.stop()
    assert len(memory._followed) == len(memory._refused) == 3


def test_a_schema_that_is_no_json_is_refused():
    with pytest.raises(TriviumError, match="not JSON"):
        form_of({"const": float("nan")}, None)
    with pytest.raises(TriviumError, match="not JSON"):
        form_of({"const": object()}, None)
