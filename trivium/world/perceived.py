"""What questions about pictures and about sounds have in common: how they are made, written and asked."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.world.chance import Chance
from trivium.world.document import Question, Split, WorldDocument


@dataclass(frozen=True)
class Perceived:
    """A picture or a sound, the question about it, its answer, and what is true of it."""

    item: Any
    question: str
    answer: str
    truth: dict[str, Any]


Make = Callable[[Chance, Split, bool, Any], Perceived]
"""The first or (True) the second of a pair, which differ in one way."""


@dataclass(frozen=True)
class Sense:
    """A source of such questions: how each kind is made, and how an item becomes a part of a message."""

    name: str
    shows: str
    kinds: Mapping[str, Make]
    every: tuple[str, ...]
    """What `kind=all` draws from."""
    part: Callable[[Any], dict[str, Any]]
    blank: Callable[[Any, Any], Any]
    """An empty item in place of one, under these options."""
    noisy: Callable[[Chance, Any, Any], Any] = lambda chance, item, options: item

    def made(self, index: int, split: Split, seed: int, options: Any, use: str) -> Perceived:
        """The item and question of this number; `use` keeps documents (write) and questions (ask) apart."""
        if options.kind != "all" and options.kind not in self.kinds:
            raise TriviumError(
                f"world:{self.name} has no kind '{options.kind}'; it has all, {', '.join(self.kinds)}."
            )
        paired = options.paired and use == "ask"
        number, second = (index // 2, index % 2 == 1) if paired else (index, False)
        chance = Chance(use, self.name, split, seed, number)
        kind = chance.pick(self.every) if options.kind == "all" else options.kind
        one = self.kinds[kind](chance, split, second, options)
        truth = {**one.truth, **({"pair": number} if paired else {})}
        return replace(one, item=self.noisy(chance, one.item, options), truth=truth)

    def content(
        self, one: Perceived, index: int, split: Split, seed: int, options: Any, use: str
    ) -> list[dict[str, Any]]:
        """The content of a user's message: the item, or what a baseline shows, then the question."""
        shown = {
            "own": lambda: [one.item],
            "none": list,
            "blank": lambda: [self.blank(one.item, options)],
            # Far away, so that it is of no pair with this one.
            "shuffled": lambda: [self.made(index + 100_003, split, seed, options, use).item],
        }.get(options.shown)
        if shown is None:
            raise TriviumError(
                f"world:{self.name} cannot {self.shows} '{options.shown}'; say own, blank, shuffled or none."
            )
        return [*map(self.part, shown()), {"type": "text", "text": one.question}]

    def document(
        self, index: int, split: Split, seed: int, options: Any, forms: str = "chat or prompt"
    ) -> WorldDocument:
        """A question with its answer, as a conversation to learn from or a prompt."""
        one = self.made(index, split, seed, options, "write")
        asked = {"role": "user", "content": self.content(one, index, split, seed, options, "write")}
        truth = {**one.truth, "answer": one.answer}
        if options.form == "chat":
            answer = {"role": "assistant", "content": one.answer}
            return WorldDocument("", None, {"messages": [asked, answer]}, truth)
        if options.form == "prompt":
            check = {"check": "equals", "arguments": {"answer": one.answer}}
            fields = {"prompt": [asked], "answer": one.answer, "checks": [check]}
            return WorldDocument("", None, fields, truth)
        raise TriviumError(f"world:{self.name} has no form '{options.form}'; use {forms}.")

    def ask(self, index: int, split: Split, seed: int, options: Any) -> Question:
        """The question to a model, whose answer has to be the one word for word."""
        one = self.made(index, split, seed, options, "ask")
        return Question(
            id="",
            prompt=f"Question: {one.question}\nAnswer:",
            question=one.question,
            messages=({"role": "user", "content": self.content(one, index, split, seed, options, "ask")},),
            answer=one.answer,
            check={"check": "equals", "arguments": {"answer": one.answer}},
            truth=one.truth,
        )
