"""Prompts, tokenised, with the columns that their graders read; and what a model answers to them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.data.door import documents
from trivium.data.order import round_keys, shuffled
from trivium.data.settings import MixtureSource
from trivium.data.sources import Document
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint
from trivium.model.transformer import Transformer
from trivium.stages.parts.stage import Work
from trivium.tokens.tokenizer import Tokenizer

PromptContent = str | list[dict[str, Any]]
SHORTEST = 8
"""How many words of a text are read at least before its next ones are asked for."""


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the model reads it and as graders do."""

    ids: list[int]
    content: PromptContent
    columns: dict[str, Any]
    id: str

    @property
    def is_chat(self) -> bool:
        """Whether completions are messages, as the prompt is."""
        return not isinstance(self.content, str)


def read_prompts(
    work: Work,
    mixture: Mapping[str, MixtureSource],
    tokenizer: Tokenizer,
    *,
    room: int,
    prompt_template: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    next_words: int | None = None,
) -> list[Prompt]:
    """All prompts of all sources; those of more than `room` tokens are left out and counted.

    With `next_words` the beginning of a text is the prompt, and the words after it the column `continuation`.
    """
    prompts: list[Prompt] = []
    too_long = too_short = 0
    for name, source in mixture.items():
        if source.weight is not None:
            raise TriviumError(
                f"{work.stage}: `{name}` has a `weight`, which prompts do not use; take it out."
            )
        for document in documents(work, [source]):
            if next_words is not None:
                cut = _cut(document, next_words, work.seed)
                if cut is None:
                    too_short += 1
                    continue
                document = cut
            asked = asked_of(document.fields, document.id)
            if prompt_template is not None:
                asked = prompt_template.format(
                    prompt=asked if isinstance(asked, str) else asked[-1]["content"]
                )
            ids = prompt_ids(asked, tokenizer, tools, work.stage)
            if len(ids) > room:
                too_long += 1
                continue
            columns = {key: value for key, value in document.fields.items() if key != "prompt"}
            prompts.append(Prompt(ids, asked, columns, document.id))
    if too_long:
        work.say(f"{too_long} prompts left out: they have more than {room} tokens")
    if too_short:
        work.say(f"{too_short} texts left out: they have less than {SHORTEST + (next_words or 0)} words")
    if not prompts:
        raise TriviumError(f"{work.stage}: its data holds no prompt of at most {room} tokens.")
    return prompts


def _cut(document: Document, words: int, seed: int) -> Document | None:
    """The beginning of a text as a prompt, and its next words as what is to be named; None if too short."""
    found = list(re.finditer(r"\S+", document.text or ""))
    places = len(found) - words - SHORTEST + 1
    if places < 1:
        return None
    first = SHORTEST + int(fingerprint([seed, document.id]), 16) % places
    text = document.text or ""
    fields = {
        **document.fields,
        "prompt": text[: found[first - 1].end()],
        "continuation": text[found[first].start() : found[first + words - 1].end()],
    }
    return Document(None, fields, document.id)


def asked_of(fields: Mapping[str, Any], where: str) -> PromptContent:
    """The prompt of a row: `prompt`, `question`, or `messages` up to the last reply."""
    asked = fields.get("prompt", fields.get("question", fields.get("problem")))
    if asked is None and isinstance(fields.get("messages"), list):
        asked = list(fields["messages"])
        while asked and asked[-1]["role"] == "assistant":
            asked.pop()
    if not asked or not isinstance(asked, str | list):
        raise TriviumError(
            f"{where}: no prompt; name its column with `columns: {{prompt: ...}}`, or ask the world for "
            "prompts with `?form=prompt`."
        )
    return asked


def prompt_ids(
    asked: PromptContent, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]] | None, stage: str
) -> list[int]:
    """The tokens that a model reads before it answers: a text as it is, messages through the template."""
    if isinstance(asked, str):
        first = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
        return first + tokenizer.encode(asked)
    if not tokenizer.templates:
        raise TriviumError(
            f"{stage}: the prompts are conversations and the model has no chat template; fine-tune it "
            'first, or say how to ask in plain text, as in `prompt_template: "Question: {prompt}\\nAnswer:"`.'
        )
    return tokenizer.encode_prompt(asked, tools=tools)


class Curriculum:
    """The order of prompts: shuffled in every epoch, without those that are too easy or too hard by now."""

    def __init__(self, count: int, seed: int, *, low: float = 0.0, high: float = 1.0, rest: int = 2) -> None:
        self.count, self.seed, self.low, self.high, self.rest = count, seed, low, high, rest
        self.visited = 0
        self.rates: dict[int, tuple[float, int]] = {}
        """For each prompt its pass rate when it was last used, and in which epoch that was."""

    def next(self, wanted: int) -> list[int]:
        """The next prompts; one whose pass rate lay outside the bounds is left out for `rest` epochs."""
        found: list[int] = []
        skipped = 0
        while len(found) < wanted:
            turn, place = divmod(self.visited, self.count)
            keys = round_keys("problems", self.seed, turn)
            index = int(shuffled(np.array([place]), self.count, keys)[0])
            self.visited += 1
            rate, when = self.rates.get(index, (self.low, turn))
            if not self.low <= rate <= self.high and turn - when <= self.rest and skipped < self.count:
                skipped += 1
                continue
            found.append(index)
        return found

    def note(self, index: int, rate: float) -> None:
        self.rates[index] = (rate, max(self.visited - 1, 0) // self.count)

    def state(self) -> dict[str, Any]:
        return {"visited": self.visited, "rates": [[index, *seen] for index, seen in self.rates.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.visited = state["visited"]
        self.rates = {int(index): (rate, turn) for index, rate, turn in state["rates"]}


def identity(prompts: Sequence[Prompt]) -> str:
    """A fingerprint of what is asked, in order."""
    return fingerprint([[prompt.ids, prompt.id] for prompt in prompts])


def answers_to(
    prompts: Sequence[Prompt], model: Transformer, tokenizer: Tokenizer,
    *, n: int, seed: int, temperature: float, max_new_tokens: int,
) -> list[list[str]]:  # fmt: skip
    """The texts of `n` sampled answers to every prompt."""
    requests = [
        Request(
            prompt.ids,
            Sampling(
                temperature=temperature, max_new_tokens=max_new_tokens, seed=seed_of_sample(seed, place)
            ),
            n=n,
        )
        for place, prompt in enumerate(prompts)
    ]
    return [[one.text for one in some] for some in Engine(model, tokenizer).generate(requests)]
