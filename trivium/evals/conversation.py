"""What a model still knows of a conversation longer than its window, and what fitting it costs."""

import re
from collections.abc import Sequence
from typing import Any, get_args

import torch

from trivium import world
from trivium.evals.asking import Subject
from trivium.evals.knowledge import first_question
from trivium.evals.passkey import ASKED_AS, DEPTHS, characters_per_token
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task, listed, number_option
from trivium.generate.chat_fit import Fitted, Overflow, Unfit, fit_conversation, split_reasoning, summariser
from trivium.generate.requests import Completion, Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError

TURN = 240
"""How many letters of the chronicle a user tells in one turn."""
HEARD = "Go on."
MOST = 24
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def told_in_turns(question: str) -> list[dict[str, str]]:
    """A chronicle told in turns that are each acknowledged, and the question as the last one."""
    body, _, asked = question.rpartition("\n")
    turns = [""]
    for sentence in _SENTENCE.split(body):
        if turns[-1] and len(turns[-1]) + len(sentence) > TURN:
            turns.append("")
        turns[-1] = f"{turns[-1]} {sentence}".strip()
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": HEARD}]
    return [*messages, {"role": "user", "content": asked}]


def _first_of_each(
    settings: Settings, overflow: str = "drop", length: int | None = None, depths: Any = None, **options: Any
) -> None:
    if overflow not in get_args(Overflow):
        ways = ", ".join(get_args(Overflow))
        raise TriviumError(f"The task conversation has no overflow '{overflow}'; it has {ways}.")
    for option in ASKED_AS:
        if option in options:
            raise TriviumError(f"The task conversation has no option '{option}'; it has length and depths.")
    if length is not None and length < 1:
        raise TriviumError(f"The task conversation has no use for length={length}; write how many tokens.")
    for depth in _depths(depths):
        first_question("chronicle")(settings, kind="passkey", depth=depth, **options)


@as_task("conversation", ("accuracy", "tokens"), foresee=_first_of_each)
def run_conversation(
    subject: Subject,
    settings: Settings,
    overflow: str = "drop",
    length: int | None = None,
    depths: str | list[float] | None = None,
    **options: Any,
) -> Found:
    """Pass keys given in an early turn of a conversation longer than the window, which is fitted as
    `overflow` says; `tokens` are all that was read and written for the answer, summaries too.

    Pass keys in conversations of about `length` tokens, twice the window unless said.
    """
    if settings.style == "continue" or not subject.tokenizer.templates:
        raise TriviumError("The task conversation asks through the chat template; ask passkey of this model.")
    wanted = _depths(depths)
    characters = round((length or 2 * subject.window) * characters_per_token(subject, settings))
    most = settings.max_new_tokens or MOST
    told = []
    for number in range(max(settings.limit, len(wanted))):
        depth = wanted[number % len(wanted)]
        own = {**options, "kind": "passkey", "characters": characters, "depth": depth}
        told += list(world.questions("chronicle", "test", seed=settings.seed, start=number, limit=1, **own))
    talks = [_fitted(subject, told_in_turns(one.question), overflow, most) for one in told]
    sampling = Sampling(temperature=0, max_new_tokens=most)
    requests = [Request(one.tokens, sampling, slide=one.slide) for one, _ in talks if one is not None]
    with torch.inference_mode():
        completions = iter(subject.engine.generate(requests))
    records = []
    for number, (question, (fitted, note)) in enumerate(zip(told, talks)):
        answered = note if fitted is None else {**note, **_answered(fitted, next(completions)[0], note)}
        words = re.findall(r"\w+", answered["answer"])
        scores = {"accuracy": float(question.answer in words), "tokens": float(answered["tokens"])}
        groups = {"depth": f"{wanted[number % len(wanted)]:g}"}
        records.append(
            Record(question.id, question.question, question.answer, (answered,), scores, groups=groups)
        )
    return Found(records, style="chat")


def _depths(depths: Any) -> list[float]:
    return [number_option("conversation", "depths", one, float) for one in listed(depths) or DEPTHS]


def _fitted(
    subject: Subject, messages: Sequence[dict[str, str]], overflow: Any, most: int
) -> tuple[Fitted | None, dict[str, Any]]:
    """A conversation brought to fit, and what that took; None where it cannot be."""
    asking = summariser(subject.engine)
    room = subject.window - most
    fitted: Fitted | None = None
    note: dict[str, Any] = {"text": "", "answer": ""}
    try:
        fitted = fit_conversation(messages, subject.tokenizer, room, overflow=overflow, summarise=asking)
        note |= {"left out": fitted.left_out, "summary": fitted.summary}
    except Unfit as problem:
        note["finish"] = str(problem)
    return fitted, {**note, "tokens": asking.prompt_tokens + asking.completion_tokens}


def _answered(fitted: Fitted, completion: Completion, note: dict[str, Any]) -> dict[str, Any]:
    return {
        "text": completion.text,
        "answer": split_reasoning(completion.text, opened=fitted.thinking).answer,
        "finish": completion.finish_reason,
        "tokens": note["tokens"] + len(fitted.tokens) + len(completion.tokens),
    }
