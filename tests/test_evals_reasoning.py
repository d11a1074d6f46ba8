"""Thoughts asked for before the answers of an evaluation: in the prompt, and not judged."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
from lab import two_models
from test_tokens import own
from tuning import small_model

from trivium.evals.asking import Subject
from trivium.evals.evaluate import evaluate
from trivium.evals.settings import Settings
from trivium.evals.task import planned
from trivium.generate.chat_fit import REQUEST_TO_THINK
from trivium.generate.requests import Completion
from trivium.kit.errors import TriviumError
from trivium.lab.compare import collect
from trivium.lab.compare_numbers import numbers
from trivium.lab.gather import find_all
from trivium.lab.gather_answers import default_tasks
from trivium.lab.page import page


def answering(monkeypatch, said, tokenizer):
    """The prompts that subjects will be given, who answer everything with what a test says."""
    prompts = []

    def generate(requests):
        prompts.extend(tokenizer.decode(one.prompt, skip_control=False) for one in requests)
        return [[Completion(said, [0], [], "stop", 1)] * one.n for one in requests]

    class Stubbed(Subject):
        def __init__(self, model, tokenizer, engine=None):
            super().__init__(model, tokenizer)
            self.engine = SimpleNamespace(generate=generate)

    monkeypatch.setattr("trivium.evals.evaluate.Subject", Stubbed)
    return prompts


def asked(monkeypatch, spec, said, tokenizer=None):
    """The prompts a task wrote, and its results when every answer is what a test says."""
    tokenizer = tokenizer or own()
    prompts = answering(monkeypatch, said, tokenizer)
    settings = Settings(limit=3, style="chat")
    results = evaluate(small_model(tokenizer, context=512), tokenizer, [spec], settings)
    [task] = results.tasks.values()
    return prompts, task.records


def test_thoughts_are_begun_for_the_model_and_not_judged(monkeypatch):
    prompts, records = asked(monkeypatch, "sums?reasoning=open", "1 + 1 = 3\n</think>\n#### 7")
    assert all(REQUEST_TO_THINK in one for one in prompts)
    assert all(one.endswith("<think>\n") for one in prompts)
    assert [record.answers[0]["answer"] for record in records] == ["#### 7"] * 3
    # the wrong sum was a thought
    assert all("valid steps" not in record.scores for record in records)
    _, endless = asked(monkeypatch, "sums?reasoning=open", "1 + 1 = 2 #### 7")
    assert [record.answers[0]["answer"] for record in endless] == [""] * 3


def test_thoughts_are_asked_for(monkeypatch):
    prompts, _ = asked(monkeypatch, "sums?reasoning=ask", "#### 7")
    plain, _ = asked(monkeypatch, "sums?reasoning=off", "#### 7")
    assert all(REQUEST_TO_THINK in one for one in prompts)
    assert not any("<think>" in one for one in plain)
    assert [one.split("assistant")[-1] for one in prompts] == [one.split("assistant")[-1] for one in plain]


def test_a_comparison_that_asks_for_thoughts_still_asks_for_results_at_once():
    settings = Settings(reasoning="ask")
    told = [planned(spec, settings) for spec in default_tasks({}, [512])]
    assert [one.settings.reasoning for one in told if one.task.name == "sums"] == ["ask", "off"]


def test_thoughts_that_a_template_begins_are_not_judged_either(monkeypatch):
    thinker = deepcopy(own())
    thinker.templates["default"] += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    prompts, endless = asked(monkeypatch, "sums?samples=1", "1 + 1 = 2 #### 7", thinker)
    assert all(one.endswith("<think>\n") for one in prompts)
    assert [answer["answer"] for record in endless for answer in record.answers] == [""] * 6
    assert all(answer["text"].startswith("<think>\n1 + 1") for answer in endless[0].answers)
    _, ended = asked(monkeypatch, "sums", "1 + 1 = 2\n</think>\n#### 7", thinker)
    assert [record.answers[0]["answer"] for record in ended] == ["#### 7"] * 3


def test_thoughts_that_a_template_begins_are_no_answer_of_a_search():
    thinker = deepcopy(own())
    thinker.templates["default"] += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    settings = Settings(limit=2, style="chat", max_new_tokens=6, search={"method": "best_of", "n": 2})
    results = evaluate(small_model(thinker, context=512), thinker, ["sums"], settings)
    answers = [record.answers[0] for record in results.tasks["sums"].records]
    assert all(one["text"] == "<think>\n" + one["search"]["text"] for one in answers)
    # The thought never ends, so there is no answer.
    assert [one["answer"] for one in answers] == ["", ""]


def test_a_model_asked_as_text_is_asked_without_thoughts_and_that_is_told(monkeypatch):
    prompts, told = answering(monkeypatch, "#### 7", own()), []
    settings = Settings(reasoning="open", limit=2)
    # The stub's answers end no turn, so `auto` asks it as text.
    results = evaluate(small_model(own()), own(), ["sums"], settings, name="base", say=told.append)
    sums = results.tasks["sums"]
    assert (sums.style, sums.settings["reasoning"]) == ("continue", "off")
    assert not any(REQUEST_TO_THINK in one or "<think>" in one for one in prompts)
    assert "base is asked as text" in told[0]


def test_a_page_asks_text_models_without_thoughts_and_says_whom(monkeypatch, tmp_path):
    turns = iter([False, True])
    monkeypatch.setattr(Subject, "_greet", lambda self: next(turns))
    settings = Settings(reasoning="ask", limit=2, max_new_tokens=2)
    members = find_all(two_models(tmp_path), tmp_path)
    raw = collect(members, [], tmp_path / "kept", ["sums"], settings, "", None)
    models = raw["tasks"]["sums"]["models"]
    assert {name: (one["style"], one["reasoning"]) for name, one in models.items()} == {
        "first": ("continue", "off"), "second": ("chat", "ask"),
    }  # fmt: skip
    assert "need a chat template; first was asked without." in page(
        {"collected": raw, "numbers": numbers(raw)}
    )


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("sums?reasoning=ask&chain_of_thought=false", "to think first and to state the result at once"),
        ("sums?reasoning=ask&style=continue", "which only a chat template can ask for"),
        ("facts?reasoning=ask", "knows no `reasoning`"),
        ("sums?reasoning=loud", "reasoning"),
    ],
)
def test_what_cannot_think_first_says_so(spec, problem):
    with pytest.raises(TriviumError, match=problem):
        planned(spec, Settings())
