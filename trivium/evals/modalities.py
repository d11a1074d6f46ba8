"""What a model sees and hears: questions about pictures and sounds, beside what it guesses without them."""

from dataclasses import replace
from typing import Any

from trivium.evals.asking import Item, Subject, ask
from trivium.evals.knowledge import first_question, questions
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task
from trivium.kit.errors import TriviumError
from trivium.world.checks import fulfils
from trivium.world.document import Question

BASELINES = {"none": "text alone", "blank": "blank", "shuffled": "shuffled"}
"""What is shown in place of a question's own picture or sound, and what its accuracy is called."""
MOST_TOKENS = 24


def _item(question: Question) -> Item:
    return Item(
        question.id,
        question.question,
        [dict(message) for message in question.messages],
        question.answer,
        lambda text: {"accuracy": float(fulfils(text.strip().rstrip("."), question.check))},
        (),
        # Both questions of a pair show the same drawing, so they count as one when intervals are made.
        str(question.truth.get("pair", "")),
        {"kind": str(question.truth["kind"])},
        style="chat",
    )


def shown(subject: Subject, settings: Settings, source: str, baselines: bool, **options: Any) -> Found:
    """Questions with their own picture or sound; the same with another, an empty one, and none."""
    forms = subject.tokenizer.forms
    takes = None if forms is None else forms.picture if source == "pictures" else forms.sound
    if takes is None:
        raise TriviumError(f"The task {source} asks a model that takes no {source}; name another one.")
    # Pairs have to be whole.
    settings = settings.model_copy(update={"limit": settings.limit + settings.limit % 2})
    own = _records(subject, settings, source, **options)
    scores = [dict(record.scores) for record in own]
    right = {number: score["accuracy"] for number, score in enumerate(scores)}
    if options.get("paired", True):
        for number, score in enumerate(scores):
            score["pairs"] = min(right[number], right[number ^ 1])
    if baselines and options.get("shown", "own") == "own":
        for what, name in BASELINES.items():
            others = _records(subject, settings, source, **options, shown=what)
            for score, other in zip(scores, others, strict=True):
                score[name] = other.scores["accuracy"]
    return Found([replace(one, scores=score) for one, score in zip(own, scores, strict=True)], style="chat")


def _records(subject: Subject, settings: Settings, source: str, **options: Any) -> list[Record]:
    items = [_item(question) for question, _ in questions(source, settings, **options)]
    return ask(subject, items, settings, most=MOST_TOKENS)


def _foresee(source: str) -> Any:
    first = first_question(source)

    def foresee(settings: Settings, /, baselines: bool = True, **options: Any) -> None:
        first(settings, **options)

    return foresee


@as_task("pictures", ("accuracy", "pairs", *BASELINES.values()), ("samples",), _foresee("pictures"))
def _pictures(subject: Subject, settings: Settings, baselines: bool = True, **options: Any) -> Found:
    """Questions about pictures: shapes, colours and counts that were never seen together, and baselines."""
    return shown(subject, settings, "pictures", baselines, **options)


@as_task("sounds", ("accuracy", "pairs", *BASELINES.values()), ("samples",), _foresee("sounds"))
def _sounds(subject: Subject, settings: Settings, baselines: bool = True, **options: Any) -> Found:
    """Questions about sounds: melodies that were never heard, and baselines."""
    return shown(subject, settings, "sounds", baselines, **options)
