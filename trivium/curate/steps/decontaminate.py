"""Decontaminate: documents that hold items of an examination, found by overlap of word n-grams.

An item is its question and, where it has one, its answer. Grams of the question count by how rare they are
among all items, so that the frame of a template proves nothing; a short answer is found by its question.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from trivium.curate.batch import Batch, Outcome
from trivium.curate.characters import Characters, Words
from trivium.curate.examination import QUESTIONS, Examination, items_of
from trivium.curate.step import Step
from trivium.kit.errors import TriviumError
from trivium.kit.files import write_text

_FILTER_BITS = 22
_RARE = 32
_PIECE, _LONG = 48, 64
RECIPE = "recipe"
"""What stands for everything that the recipe itself measures on; loading the recipe names it."""


def _listed(against: Any) -> Any:
    return [against] if isinstance(against, str | Mapping) else against


Against = Annotated[
    list[str | Examination],
    Field(min_length=1),
    BeforeValidator(_listed, json_schema_input_type=str | Examination | list[str | Examination]),
]


def path_of(examination: str | Examination) -> str:
    """Where an examination is."""
    return examination if isinstance(examination, str) else examination.path


def mentions_of(against: Against) -> list[tuple[str, str, tuple[str, ...]]]:
    """What a step with these examinations needs besides its input."""
    return [
        ("against" if isinstance(one, str) else f"against.{place}.path", path_of(one), ("data", "source"))
        for place, one in enumerate(against)
    ]


def planned_against(steps: Iterable[Any]) -> dict[str, str]:
    """What steps search documents for, for `trivium plan`."""
    names = [str(one) for step in steps if step.name == Decontaminate.name for one in step.against]
    return {"decontaminated against": "; ".join(names)} if names else {}


class Decontaminate(Step):
    """Leave out documents that hold what the model will be examined with."""

    name: ClassVar[str] = "decontaminate"
    short: ClassVar[str] = "against"

    against: Against
    """The examinations: `recipe` (all it measures on), files or folders of rows, `world:NAME`, stages."""
    gram: int = Field(default=5, ge=2, le=32)
    """Words an n-gram."""
    overlap: float = Field(default=0.8, gt=0, le=1)
    """How much of a question has to be found, its grams weighted by their rarity among the items."""
    answer: Literal["anywhere", "near", "ignored"] = "anywhere"
    """Where the answer of a question shorter than `long_question` words has to stand, too."""
    long_question: int = Field(default=25, ge=1)
    """A question of so many words is contamination without its answer."""
    least_words: int = Field(default=4, ge=1)
    """Items with fewer words are not looked for, and are counted."""

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return mentions_of(self.against)

    def prepare(self, place: Path, where: Mapping[str, Path]) -> None:
        items = [item for one in self.against for item in items_of(one, where.get(path_of(one)))]
        # A share of a few rows may hold out none.
        if not items and not any(isinstance(one, Examination) and one.held_out for one in self.against):
            raise TriviumError(
                f"`decontaminate`: {', '.join(map(path_of, self.against))} hold no rows with a question or a "
                f"text; rows need one of {', '.join(QUESTIONS)}."
            )
        write_text(place, json.dumps(items, ensure_ascii=False))

    def run(self, batch: Batch) -> Outcome:
        assert self._place is not None
        index = _index(self._place, self.gram, self.least_words)
        words = batch.characters.folded_words(False)
        reasons: list[str | None] = [None] * batch.size
        notes: dict[str, int] = {}
        for document, found in index.search(words, self):
            span = batch.characters.codes[words.starts[found.start] : words.ends[found.end]]
            text = span.tobytes().decode("utf-32-le", "replace").replace("\n", " ")
            with_answer = " with its answer" if found.answered else ""
            first = int(words.first[document])
            reasons[document] = (
                f"leak: {100 * found.overlap:.0f} % of {found.item}{with_answer}, words "
                f"{found.start - first}-{found.end - first}: {text[:200]}"
            )
            notes[f"item: {found.item}"] = notes.get(f"item: {found.item}", 0) + 1
        return Outcome(reasons, notes=notes)


@dataclass(frozen=True)
class Found:
    """An item in a document: its id, how much of it, and which words of the batch."""

    item: str
    overlap: float
    start: int
    end: int
    answered: bool


@dataclass(frozen=True, eq=False)
class _Item:
    id: str
    grams: np.ndarray
    weights: np.ndarray
    words: int
    answer: np.ndarray


class Index:
    """The n-grams of all items, and which items each stands in."""

    def __init__(self, items: Sequence[Sequence[str]], gram: int, least: int) -> None:
        self.gram = gram
        pieces = list(_pieces(items, gram, least))
        self.short = len({one[0] for one in items}) - len({one[0] for one in pieces})
        grams = np.concatenate([one[1] for one in pieces]) if pieces else np.empty(0, np.uint64)
        values, counts = np.unique(grams, return_counts=True)
        rarity = dict(zip(values.tolist(), np.log1p(len(pieces) / counts).tolist()))
        count = dict(zip(values.tolist(), counts.tolist()))
        self.items: list[_Item] = []
        self.holders: dict[int, list[int]] = {}
        for name, mine, words, answer in pieces:
            mine = np.unique(mine)
            weights = np.array([rarity[one] for one in mine.tolist()])
            # A gram that many items share leads to none of them, unless the item has no rarer one.
            common = [count[one] for one in mine.tolist()]
            bound = max(_RARE, min(common))
            for one, times in zip(mine.tolist(), common):
                if times <= bound:
                    self.holders.setdefault(one, []).append(len(self.items))
            self.items.append(_Item(name, mine, weights / weights.sum(), words, answer))
        self.leading = np.sort(np.array(list(self.holders), dtype=np.uint64))
        self.filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self.filter[self.leading >> np.uint64(64 - _FILTER_BITS)] = True

    def search(self, words: Words, settings: Decontaminate) -> Iterator[tuple[int, Found]]:
        """The first item found in each document of a batch."""
        hashes, places = words.grams(self.gram)
        if not len(hashes) or not len(self.leading):
            return
        near = np.flatnonzero(self.filter[hashes >> np.uint64(64 - _FILTER_BITS)])
        at = np.searchsorted(self.leading, hashes[near]).clip(max=len(self.leading) - 1)
        hits = near[self.leading[at] == hashes[near]]
        candidates: dict[int, dict[int, None]] = {}
        for hit in hits.tolist():
            document = int(words.documents[places[hit]])
            for item in self.holders[int(hashes[hit])]:
                candidates.setdefault(document, {})[item] = None
        edges = np.searchsorted(words.documents[places], np.arange(words.count + 1))
        for document, items in candidates.items():
            mine = slice(edges[document], edges[document + 1])
            for item in items:
                found = self._compare(self.items[item], hashes[mine], places[mine], words, document, settings)
                if found is not None:
                    yield document, found
                    break

    def _compare(
        self, item: _Item, hashes: np.ndarray, places: np.ndarray, words: Words, document: int,
        settings: Decontaminate,
    ) -> Found | None:  # fmt: skip
        at = np.searchsorted(item.grams, hashes).clip(max=len(item.grams) - 1)
        hits = np.flatnonzero(item.grams[at] == hashes)
        if item.weights[np.unique(at[hits])].sum() < settings.overlap:
            return None
        # All of it has to stand in one stretch of the text, with room for words put between.
        room = 2 * item.words + self.gram
        best, span = 0.0, (0, 0)
        for first in hits:
            inside = hits[(hits >= first) & (places[hits] < places[first] + room)]
            share = float(item.weights[np.unique(at[inside])].sum())
            if share > best:
                best, span = share, (int(places[first]), int(places[inside[-1]]) + self.gram - 1)
        if best < settings.overlap - 1e-9:
            return None
        answered = len(item.answer) > 0 and self._answered(item, span[1], words, document, settings)
        if (
            settings.answer != "ignored"
            and len(item.answer)
            and item.words < settings.long_question
            and not answered
        ):
            return None
        return Found(item.id, min(best, 1.0), *span, answered)

    def _answered(self, item: _Item, end: int, words: Words, document: int, settings: Decontaminate) -> bool:
        start, stop = int(words.first[document]), int(words.first[document + 1])
        if settings.answer == "near":
            start, stop = end + 1, min(stop, end + 1 + max(20, 3 * len(item.answer)))
        text, size = words.hashes[start:stop], len(item.answer)
        if size <= 3:
            return any(
                (text[place : place + size] == item.answer).all() for place in range(len(text) - size + 1)
            )
        return float(np.isin(item.answer, text).mean()) >= settings.overlap


def _pieces(
    items: Sequence[Sequence[str]], gram: int, least: int
) -> Iterator[tuple[str, np.ndarray, int, np.ndarray]]:
    """Items as (id, grams, words, answer); long texts in pieces, since a part of one is a leak, too."""
    for name, question, answer in items:
        found, said = (Characters([text]).folded_words(False).hashes for text in (question, answer))
        if len(found) < gram:
            # A question too short to have a gram is looked for together with its answer.
            found, said = np.concatenate([found, said]), np.empty(0, np.uint64)
        if len(found) < max(gram, least):
            continue
        cuts = range(0, len(found), _PIECE) if len(found) > _LONG else [0]
        for cut in cuts:
            mine = found[cut : cut + _PIECE] if len(found) > _LONG else found
            if len(mine) < gram:
                continue
            none = np.zeros(len(mine), dtype=np.int64)
            grams, _ = Words(none, none, none, mine, 1).grams(gram)
            yield name, grams, len(mine), said if len(found) <= _LONG else np.empty(0, np.uint64)


@lru_cache(2)
def _index(place: Path, gram: int, least: int) -> Index:
    return Index(json.loads(place.read_text(encoding="utf-8")), gram, least)
