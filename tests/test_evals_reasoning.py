"""Thoughts asked for before the answers of an evaluation: in the prompt, and not judged."""

from types import SimpleNamespace

import pytest
from test_tokens import own
from tuning import small_model

from trivium.evals.asking import Subject
from trivium.evals.evaluate import evaluate
from trivium.evals.settings import Settings
from trivium.evals.task import planned
from trivium.generate.prompting import REQUEST_TO_THINK
from trivium.generate.requests import Completion
from trivium.kit.errors import TriviumError
from trivium.lab.gather_answers import default_tasks


def asked(monkeypatch, spec, said):
    """The prompts a task wrote, and its results when every answer is what a test says."""
    tokenizer, prompts = own(), []

    def generate(requests):
        prompts.extend(tokenizer.decode(one.prompt, skip_control=False) for one in requests)
        return [[Completion(said, [0], [], "stop", 1)] * one.n for one in requests]

    class Stubbed(Subject):
        def __init__(self, model, tokenizer):
            super().__init__(model, tokenizer)
            self.engine = SimpleNamespace(generate=generate)

    monkeypatch.setattr("trivium.evals.evaluate.Subject", Stubbed)
    results = evaluate(small_model(tokenizer, context=512), tokenizer, [f"{spec}&limit=3&style=chat"])
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


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("sums?reasoning=ask&chain_of_thought=false", "to think first and to state the result at once"),
        ("facts?reasoning=ask", "knows no `reasoning`"),
        ("sums?reasoning=loud", "reasoning"),
    ],
)
def test_what_cannot_think_first_says_so(monkeypatch, spec, problem):
    with pytest.raises(TriviumError, match=problem):
        asked(monkeypatch, spec, "")
