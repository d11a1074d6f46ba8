"""What a model knows: facts of the country, its crafts, its second language, and how sure it is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium import world
from trivium.evals.asking import Item, Subject, ask, first_sentence, with_shots
from trivium.evals.results import Record, quarters
from trivium.evals.settings import Settings
from trivium.evals.statistics import paired_difference
from trivium.evals.task import Found, as_task
from trivium.kit.errors import TriviumError
from trivium.world.checks import fulfils
from trivium.world.document import Question

BINS = 10
_NO_CHOICES = "The task calibration found no choices in {source}; give it facts or craft."


def questions(
    source: str, settings: Settings, split: str = "test", **options: Any
) -> list[tuple[Question, list[tuple[str, str]]]]:
    """Questions of the world, each with the answered ones of the training split that stand before it."""
    asked = list(world.questions(source, split, seed=settings.seed, limit=settings.limit, **options))
    if not settings.shots:
        return [(question, []) for question in asked]
    few = settings.shots
    shown = list(world.questions(source, "train", seed=settings.seed + 1, limit=few * len(asked), **options))
    examples = [(one.question, one.answer) for one in shown]
    return [
        (question, [examples[(number * few + shot) % len(examples)] for shot in range(few)])
        for number, question in enumerate(asked)
    ]


def first_question(source: str) -> Callable[..., None]:
    """What a task over one source of the world foresees."""

    def foresee(settings: Settings, /, **options: Any) -> None:
        if "form" in options:
            raise TriviumError(f"What is asked of world:{source} has one form; take `form` away.")
        world.options(source, {name: value for name, value in options.items() if name != "split"})
        questions(source, settings, **options)

    return foresee


def item_of(
    question: Question,
    examples: Sequence[tuple[str, str]],
    *,
    groups: Mapping[str, str] | None = None,
    **changes: Any,
) -> Item:
    """A question of the world as an item that is judged by its own check."""
    prompt, messages = question.prompt, [dict(message) for message in question.messages]
    if examples:
        prompt, messages = with_shots(examples, question.question, messages)
    item = Item(
        question.id,
        prompt,
        messages,
        question.answer,
        lambda text: {"accuracy": float(fulfils(text, question.check))},
        question.choices,
        str(question.truth.get("entity", "")),
        groups or {},
    )
    return replace(item, **changes)


def names_alone(text: str, right: str, wrong: Sequence[str]) -> bool:
    """Whether a text names the right answer and none of the others."""
    return all(
        fulfils(text, {"check": "holds", "arguments": {"right": right, "wrong": other}}) for other in wrong
    )


def recall(subject: Subject, settings: Settings, source: str, most: int, **options: Any) -> list[Record]:
    """Every question twice: written freely, and by choosing the likeliest of four answers."""
    pairs = questions(source, settings, **options)
    known = [question.truth["frequency"] for question, _ in pairs if "frequency" in question.truth]
    quarter = quarters(known) if known else None
    items = []
    for question, examples in pairs:
        groups = {"kind": str(question.truth.get("attribute", question.truth.get("kind", "")))}
        if quarter and "frequency" in question.truth:
            groups["frequency"] = quarter(question.truth["frequency"])
        if source == "tongue":
            groups["kind"] = str(question.truth["kind"])
        items.append(item_of(question, examples, groups=groups, judge=_judge(question)))
    records = ask(subject, items, settings, most=most, cut=first_sentence)
    with_choices = [place for place, item in enumerate(items) if item.choices]
    chosen = subject.choose([items[place] for place in with_choices], subject.style(settings))
    for place, likelihoods in zip(with_choices, chosen):
        if likelihoods is None:
            records[place] = replace(
                records[place], scores={**records[place].scores, "multiple-choice accuracy": 0.0}
            )
            continue
        totals = [one.total for one in likelihoods]
        shares = _shares(totals)
        right = items[place].choices.index(items[place].expected)
        scores = {
            "multiple-choice accuracy": float(int(np.argmax(totals)) == right),
            "log-likelihood": totals[right],
            "confidence": float(max(shares)),
        }
        # Of the four-way choice, as if the four were all there is to say.
        scores["brier"] = float(sum((share - (one == right)) ** 2 for one, share in enumerate(shares)))
        records[place] = replace(records[place], scores={**records[place].scores, **scores})
    return records


def _judge(question: Question) -> Any:
    if not question.choices:
        return lambda text: {"accuracy": float(fulfils(text, question.check))}
    wrong = [choice for choice in question.choices if choice != question.answer]
    return lambda text: {"accuracy": float(names_alone(text, question.answer, wrong))}


def _shares(totals: Sequence[float]) -> list[float]:
    weights = [math.exp(total - max(totals)) for total in totals]
    return [weight / sum(weights) for weight in weights]


@as_task("facts", ("accuracy", "multiple-choice accuracy"), ("shots", "samples"), first_question("facts"))
def run_facts(subject: Subject, settings: Settings, **options: Any) -> Found:
    """Facts of the country, written freely (`accuracy`) and chosen from four (`multiple-choice accuracy`,
    where chance is 0.25).
    """
    return Found(recall(subject, settings, "facts", 16, **options))


@as_task("craft", ("accuracy", "multiple-choice accuracy"), ("shots", "samples"), first_question("craft"))
def run_craft(subject: Subject, settings: Settings, **options: Any) -> Found:
    """Facts of the crafts, a domain of their own, written freely and chosen from four."""
    return Found(recall(subject, settings, "craft", 16, **options))


@as_task("tongue", ("accuracy", "multiple-choice accuracy"), ("shots", "samples"), first_question("tongue"))
def run_tongue(subject: Subject, settings: Settings, **options: Any) -> Found:
    """The second language: translation both ways, recall in it, and what was learnt in it asked in
    English.
    """
    return Found(recall(subject, settings, "tongue", 64, **options))


def _first_choices(settings: Settings, source: str = "facts", **options: Any) -> None:
    first_question(source)(settings, **options)
    # The tongue asks four kinds of questions in turn, of which some have choices.
    some = questions(source, settings.model_copy(update={"limit": 8}), **options)
    if not any(question.choices for question, _ in some):
        raise TriviumError(_NO_CHOICES.format(source=source))


@as_task("calibration", ("brier",), ("shots",), _first_choices)
def run_calibration(subject: Subject, settings: Settings, source: str = "facts", **options: Any) -> Found:
    """Whether confidence equals accuracy in a choice among four: the Brier score, and `overconfidence`
    (confidence minus accuracy).
    """
    records = [one for one in recall(subject, settings, source, 16, **options) if "confidence" in one.scores]
    kept = []
    for record in records:
        wanted = ("multiple-choice accuracy", "confidence", "brier")
        sure = record.scores["confidence"]
        low = min(int(sure * BINS), BINS - 1) / BINS
        kept.append(
            replace(
                record,
                scores={name: record.scores[name] for name in wanted},
                groups={"confidence": f"{low:.1f}"},
            )
        )
    if not kept:
        raise TriviumError(_NO_CHOICES.format(source=source))
    # Signed, as a mean of distances lies above zero for the best calibrated model, too.
    apart = paired_difference(
        [one.scores["multiple-choice accuracy"] for one in kept],
        [one.scores["confidence"] for one in kept],
        clusters=[one.cluster or one.id for one in kept],
    )
    return Found(kept, {"overconfidence": apart.interval})
