"""A person's own data as tasks: texts held out, replies beside those written, pairs by their likelihood."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np

from trivium.data.preferences import PreferenceData
from trivium.data.shapes import Example, example_of, recognised
from trivium.data.sources import Document, read_documents
from trivium.data.split import MOST_READ, first_held, prompt_hash, unseen
from trivium.evals.asking import Item, Judge, Subject, ask
from trivium.evals.likelihood import log_likelihoods
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task
from trivium.kit.errors import TriviumError


@as_task("replies", ("ended", "as written"))
def run_replies(subject: Subject, settings: Settings, data: str, held_out: float = 0.0) -> Found:
    """The last answers of a person's own conversations, asked for again; `as written` is the share that
    says word for word what the data says.
    """
    items = [
        Item(name, prompt, messages, answer, _judge(answer))
        for name, prompt, messages, answer in exchanges(unseen(data, held_out, settings.limit))
    ]
    if not items:
        raise TriviumError(f"{data} holds no conversation that ends with an answer.")
    return Found(ask(subject, items, settings, most=64))


def _judge(answer: str) -> Judge:
    """Whether a text says what the answer says, white space aside."""
    return lambda text: {"as written": float(text.split() == answer.split())}


def exchanges(documents: list[Document]) -> Iterator[tuple[str, str, list[dict[str, Any]], str]]:
    """Each conversation's id, its last question as text, the messages before its last answer, and that."""
    for document in documents:
        example: Example = example_of(recognised(document.fields), document.fields)
        if example.prompt is not None and example.completion is not None:
            messages: list[dict[str, Any]] = [{"role": "user", "content": example.prompt}]
            yield document.id, example.prompt, messages, example.completion
        elif example.messages and example.messages[-1]["role"] == "assistant":
            messages = [dict(one) for one in example.messages[:-1]]
            answer = example.messages[-1].get("content")
            if messages and isinstance(answer, str):
                yield document.id, str(messages[-1].get("content")), messages, answer


@as_task("pairs", ("pair accuracy",))
def run_pairs(subject: Subject, settings: Settings, data: str, held_out: float = 0.0) -> Found:
    """A person's own pairs: how often the chosen answer is likelier than the rejected one."""
    reader = PreferenceData(subject.tokenizer, subject.window)
    pairs = (one for one in reader.read(islice(read_documents(data), MOST_READ)) if one.is_pair)
    kept = first_held(pairs, lambda one: prompt_hash(one.prompt), held_out, settings.limit)
    prompts = [one.prompt.tolist() for one in kept for _ in one.completions]
    answers = [answer.tokens.tolist() for one in kept for answer in one.completions]
    totals = np.array([one.total for one in log_likelihoods(subject.model, prompts, answers)]).reshape(-1, 2)
    decode = subject.tokenizer.decode
    return Found(
        [
            Record(
                one.id, decode(one.prompt.tolist()), decode(one.completions[0].tokens.tolist()), (),
                {"pair accuracy": 0.5 if chosen == rejected else float(chosen > rejected)},
            )
            for one, (chosen, rejected) in zip(kept, totals, strict=True)
        ]
    )  # fmt: skip
