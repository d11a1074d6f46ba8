"""Diversify: near-duplicates out, and the next prompts drawn towards what is missing.

Each row is compared with those kept so far, by words (MinHash) and by meaning (the mean hidden state of a
checkpoint). Steering draws the next rows of the seed from cells (topic × style × ...) in proportion to

    ((1 + kept) / (2 + drawn))^2 / (1 + kept),

kept and drawn being the cell's rows so far. The second factor alone draws towards cells with little in them;
the first, squared, away from those that bring nothing new however often they are drawn: with its first power
the two cancel, and every cell is drawn equally often.
"""

import random
from collections import Counter
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, PrivateAttr

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.synthesize.diversity import Meanings, Words, cell_of
from trivium.synthesize.row import Row, compared_text
from trivium.synthesize.step import Room, Step


class Steering(Settings):
    """How the next rows are drawn, and when enough is enough."""

    by: list[str] = Field(default=["topic", "persona", "style", "language", "length"], min_length=1)
    """The columns that make the cells of the coverage."""
    stop_below: float = Field(default=0.1, ge=0, lt=1)
    """Stop when of the rows of a round that reach this step a smaller share is new."""
    rounds: Count = Field(default=3, ge=1)
    """Stop only after so many such rounds in a row."""


class Diversify(Step):
    """Leave out near-duplicates of rows that were kept before."""

    name: ClassVar[str] = "diversify"
    short: ClassVar[str] = "threshold"

    threshold: float = Field(default=0.8, gt=0, le=1)
    """From which share of common runs of three words two prompts are the same."""
    similarity: float = Field(default=0.97, gt=0, le=1)
    """From which cosine of their hidden states two prompts are the same."""
    cluster: float = Field(default=0.7, gt=0, le=1)
    """From which cosine two prompts belong to one cluster."""
    embed: str = "own"
    """Whose hidden states: `own` (the stage's own checkpoint, if it has one), `none`, or another model."""
    steer: Steering | None = None
    """Draw what comes next towards what is missing; without it rows come in the order of the seed."""

    _words: Words | None = PrivateAttr(default=None)
    _meanings: Meanings | None = PrivateAttr(default=None)
    _drawn: Counter[tuple[str, ...]] = PrivateAttr(default_factory=Counter)
    _kept: Counter[tuple[str, ...]] = PrivateAttr(default_factory=Counter)
    _rates: list[float] = PrivateAttr(default_factory=list)
    _clusters: int = PrivateAttr(default=0)

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        return [("embed", self.embed, ("model",))] if self.embed not in ("own", "none") else []

    def facts(self) -> dict[str, Any]:
        return {
            "new_by_round": [round(rate, 4) for rate in self._rates],
            **({"clusters": self._clusters} if self._meanings is not None else {}),
        }

    def choose(self, pool: list[Row], count: int, chance: random.Random) -> list[Row]:
        """Take so many rows out of the pool, towards what is missing."""
        assert self.steer is not None, "only a step that steers chooses"
        cells: dict[tuple[str, ...], list[int]] = {}
        for place, row in enumerate(pool):
            cells.setdefault(cell_of(row, self.steer.by), []).append(place)
        chosen: set[int] = set()
        planned = Counter(self._kept)
        while len(chosen) < count and cells:
            names = list(cells)
            weights = [
                ((1 + self._kept[cell]) / (2 + self._drawn[cell])) ** 2 / (1 + planned[cell])
                for cell in names
            ]
            cell = chance.choices(names, weights)[0]
            chosen.add(cells[cell].pop(0))
            planned[cell] += 1
            if not cells[cell]:
                del cells[cell]
        for place in chosen:
            self._drawn[cell_of(pool[place], self.steer.by)] += 1
        taken = [pool[place] for place in sorted(chosen)]
        pool[:] = [row for place, row in enumerate(pool) if place not in chosen]
        return taken

    @property
    def saturated(self) -> bool:
        """Whether the last rounds brought hardly anything new."""
        if self.steer is None or len(self._rates) < self.steer.rounds:
            return False
        return all(rate < self.steer.stop_below for rate in self._rates[-self.steer.rounds :])

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        if self._words is None:
            self._words = Words(self.threshold)
        texts = [compared_text(row) for row in rows]
        signatures = self._words.read(texts)
        vectors = self._embedded(texts, room)
        kept, new = [], 0
        for place, row in enumerate(rows):
            alike, other = self._words.nearest(signatures[place])
            if alike >= self.threshold:
                room.drop(
                    row, f"near-duplicate: {alike:.2f} of its words' runs are those of kept row {other}"
                )
                continue
            if vectors is not None and self._meanings is not None:
                cosine = self._meanings.nearest(vectors[place])
                if cosine >= self.similarity:
                    room.drop(row, f"near-duplicate in meaning: cosine {cosine:.3f} with a kept row")
                    continue
                is_new = self._meanings.add(vectors[place])
                self._clusters += is_new
            else:
                is_new = True
            self._words.add(signatures[place])
            new += is_new
            if self.steer is not None:
                self._kept[cell_of(row, self.steer.by)] += 1
            kept.append(row)
        if rows:
            self._rates.append(new / len(rows))
        return kept

    def _embedded(self, texts: list[str], room: Room) -> np.ndarray | None:
        if self.embed == "none" or not texts:
            return None
        model = room.embedder(self.embed)
        if model is None:
            if self.embed != "own":
                raise TriviumError(f"`diversify`: `embed: {self.embed}` names no checkpoint that lies here.")
            return None
        if self._meanings is None:
            self._meanings = Meanings(self.similarity, self.cluster)
        return self._meanings.read(model.embed(texts))
