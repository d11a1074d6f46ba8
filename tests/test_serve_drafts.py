"""`--draft` of the server and the terminal, `draft` in Python: the same answers, and what drafts did."""

import re

import pytest
from generating import tiny_model, tokenizer
from serving import client, raw, running

import trivium
from trivium.kit.errors import TriviumError
from trivium.model.folder import save_model
from trivium.serve.chat import chat
from trivium.serve.models import drafts_of, open_engine


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model, and a smaller one with the same tokenizer."""
    places = {}
    for name, layers in (("model", 3), ("smaller", 1)):
        places[name] = tmp_path_factory.mktemp(name)
        save_model(tiny_model(layers=layers), places[name])
        tokenizer().save(places[name])
    return {name: str(place) for name, place in places.items()}


def test_the_server_counts_drafts_and_answers_as_without(folders):
    plain = open_engine(folders["model"], max_rows=4)
    drafting = open_engine(folders["model"], max_rows=4, draft="lookup")
    drafting.scheduler.speculation.payoff.worth = lambda rows: True
    asked = {"prompt": "the town the town the town the", "max_tokens": 40, "temperature": 0, "n": 2}
    with running({"plain": plain, "drafting": drafting}) as address:
        with client(address) as api:
            answers = [
                [one.text for one in api.completions.create(model=name, **asked).choices]
                for name in ("plain", "drafting")
            ]
        with raw(address) as http:
            metrics = http.get("/metrics").text
    assert answers[0] == answers[1]
    read = dict(re.findall(r'^(trivium_[a-z_]+){model="drafting"} ([0-9.]+)$', metrics, re.M))
    drafted = float(read["trivium_drafted_tokens_total"])
    assert drafted > 0
    accepted = float(read["trivium_accepted_draft_tokens_total"])
    assert float(read["trivium_draft_acceptance"]) == pytest.approx(accepted / drafted)
    assert read["trivium_drafting"] in ("0", "1")
    assert 'trivium_drafted_tokens_total{model="plain"}' not in metrics


@pytest.mark.parametrize("draft", ["lookup", "smaller"])
def test_python_and_the_terminal_take_a_draft(folders, draft, monkeypatch, capsys):
    draft = folders.get(draft, draft)
    expected = trivium.load(folders["model"]).generate("the town", max_new_tokens=30, seed=3)
    model = trivium.load(folders["model"], draft=draft)
    assert model.generate("the town", max_new_tokens=30, seed=3).tokens == expected.tokens
    assert model.engine.drafts
    answers = []
    for given in (None, draft):
        lines = iter(["the town the town", "/quit"])
        monkeypatch.setattr("builtins.input", lambda *_, lines=lines: next(lines))
        chat(folders["model"], temperature=0, max_new_tokens=20, draft=given)
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]
    assert answers[0].strip()


def test_drafts_are_named_for_all_models_or_for_one():
    assert drafts_of({"one", "two"}, ["lookup"]) == {"one": "lookup", "two": "lookup"}
    assert drafts_of({"one", "two"}, ["one=a/b"]) == {"one": "a/b"}
    assert drafts_of({"one", "two"}, ["one=a/b", "lookup"]) == {"one": "a/b", "two": "lookup"}
    assert drafts_of({"one"}, ["runs/x=1/model"]) == {"one": "runs/x=1/model"}


def test_a_draft_that_is_not_there_is_named(folders):
    with pytest.raises(TriviumError, match="no-such-draft"):
        open_engine(folders["model"], draft="no-such-draft")
