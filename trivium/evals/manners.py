"""How a model answers: instructions fulfilled, the form asked for kept, and its turn ended by itself."""

import json
import re
from dataclasses import replace
from typing import Any

from trivium.evals.asking import Subject, ask
from trivium.evals.knowledge import first_question, item_of, questions
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task

_FINAL_LINE = re.compile(r"(?:####|[Tt]he answer is) *-?\d+\.?$")


@as_task("instructions", ("accuracy",), ("shots", "samples"), first_question("chat"))
def run_instructions(subject: Subject, settings: Settings, **options: Any) -> Found:
    """Instructions whose fulfilment a program checks."""
    items = [
        item_of(question, examples, groups={"kind": question.truth["kind"]})
        for question, examples in questions("chat", settings, **options)
    ]
    return Found(ask(subject, items, settings, most=48))


def ends_in_form(text: str) -> bool:
    """Whether a worked sum ends with its result in one of the fixed forms."""
    lines = text.strip().splitlines()
    return bool(lines) and _FINAL_LINE.search(lines[-1].strip()) is not None


def is_object(text: str, keys: set[str]) -> bool:
    """Whether a text is a JSON object with exactly these keys."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and set(found) == keys


@as_task("format", ("in form",), ("shots",), first_question("chat"))
def run_format(subject: Subject, settings: Settings, people: int = 240, country: int = 0) -> Found:
    """Answers in the form that was asked for, right or wrong.

    That is a result in the fixed last line, and a JSON object with the keys named.
    """
    half = settings.model_copy(update={"limit": max(1, settings.limit // 2)})
    items = [
        item_of(
            question,
            examples,
            groups={"form": "last line"},
            judge=lambda text: {"in form": float(ends_in_form(text))},
        )
        for question, examples in questions("sums", half, country=int(country))
    ]
    for question, examples in questions("chat", half, kind="json", people=int(people), country=int(country)):
        keys = set(question.check["arguments"]["values"])
        items.append(
            item_of(
                question,
                examples,
                groups={"form": "json"},
                judge=lambda text, keys=keys: {"in form": float(is_object(text, keys))},
            )
        )
    return Found(ask(subject, items, settings, most=96))


@as_task("ending", ("ended",), ("shots",), first_question("chat"))
def run_ending(subject: Subject, settings: Settings, **options: Any) -> Found:
    """Answers that the model ends by itself."""
    chat = settings.model_copy(update={"style": "chat"} if subject.tokenizer.end_of_turn_id else {})
    items = [
        item_of(question, examples, judge=lambda text: {}, groups={"kind": question.truth["kind"]})
        for question, examples in questions("chat", settings, **options)
    ]
    records = ask(subject, items, chat, most=128)
    # An answer that never fitted in was not ended by the model either.
    return Found(
        [replace(one, scores={"ended": 0.0, **one.scores}) for one in records], style=subject.style(chat)
    )
