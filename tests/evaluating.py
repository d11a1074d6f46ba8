"""What tests of tasks share: a model whose answers and choices a test writes, and asking it."""

from test_tokens import own
from tuning import small_model

from trivium.evals.asking import Subject
from trivium.evals.evaluate import evaluate
from trivium.evals.likelihood import Likelihood
from trivium.evals.settings import Settings
from trivium.generate.requests import Completion


def spoken(text, tokens=3):
    return Completion(text, [0] * tokens, [], "stop", 1)


class Scripted(Subject):
    """A subject whose answers and choices a test writes."""

    def __init__(self, model, tokenizer, say, prefer):
        super().__init__(model, tokenizer)
        self.say, self.prefer = say, prefer

    def answer(self, items, style, settings, most):
        return [[spoken(self.say(item)) for _ in range(1 + settings.samples)] for item in items]

    def choose(self, items, style):
        return [
            [Likelihood((0.0 if self.prefer(item, one) else -9.0,), True) for one in item.choices]
            for item in items
        ]


def oracle(item):
    return item.expected.removeprefix(item.begin).strip()


def scripted(monkeypatch, say=oracle, prefer=lambda item, choice: choice == item.expected):
    monkeypatch.setattr(
        "trivium.evals.evaluate.Subject",
        lambda model, tokenizer, **_: Scripted(model, tokenizer, say, prefer),
    )


def asked(tasks, *, context=512, **settings):
    tokenizer = own()
    model = small_model(tokenizer, context=context)
    return evaluate(model, tokenizer, tasks, Settings(**{"limit": 12, "style": "chat", **settings}))
