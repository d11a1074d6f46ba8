"""Batches of every stage that trains on documents: packed sequences of shards, in the order of a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from trivium.data.mixture import MixturePlan, PlannedSource
from trivium.data.order import round_keys, shuffled
from trivium.data.packing import Method, Packing, pack
from trivium.data.rows import NOTHING, PackedSequence
from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

Learn = Literal["assistant", "everything"]
Lengths = tuple[int, int | None]


@dataclass(frozen=True)
class Ingredient:
    """One source of a mixture: its shards and how it takes part.

    `origin` tells the same source in another stage, and `seen` how many passes such stages made over it.
    """

    name: str
    shards: Shards
    weights: tuple[tuple[float, float], ...] | None = None
    origin: str = ""
    seen: float = 0.0
    max_repeats: float | None = None
    easy_first: str | None = None
    within: Lengths = (0, None)
    """The fewest and the most tokens of the documents that take part."""

    @property
    def tokens(self) -> int:
        """How many tokens the documents that take part have."""
        return int(chosen(self.shards.lengths, self.within).sum())


def chosen(lengths: np.ndarray, within: Lengths) -> np.ndarray:
    """The lengths, with 0 for documents that are shorter or longer than asked for."""
    fewest, most = within
    fits = lengths >= fewest if most is None else (lengths >= fewest) & (lengths <= most)
    return np.where(fits, lengths, 0)


class PackedRows:
    """The rows one split of shards packs into, each read when it is asked for."""

    def __init__(
        self,
        shards: Shards,
        context: int,
        *,
        method: Method = "best_fit",
        seed: int = 0,
        learn: Learn = "assistant",
        source: int = 0,
        within: Lengths = (0, None),
    ) -> None:
        self.shards = shards
        self.packing: Packing = pack(chosen(shards.lengths, within), context, method=method, seed=seed)
        self._masked = learn == "assistant" and shards.has_masks
        self._weights = shards.column("weight") if "weight" in shards.manifest["columns"] else None
        self._source = source

    def __len__(self) -> int:
        return len(self.packing)

    def row(self, index: int) -> PackedSequence:
        """A row, targets inside each document; a piece of a cut document also predicts what follows it."""
        documents, starts, ends = (part.tolist() for part in self.packing.pieces(index))
        lengths = tuple(end - start for start, end in zip(starts, ends, strict=True))
        size = sum(lengths)
        tokens = np.empty(size, dtype=np.int64)
        targets = np.full(size, NOTHING, dtype=np.int64)
        weights = np.zeros(size, dtype=np.float32)
        place = 0
        for document, start, length in zip(documents, starts, lengths, strict=True):
            following = self.shards.tokens_of(document, start, start + length + 1)
            predicted = len(following) - 1
            tokens[place : place + length] = following[:length]
            targets[place : place + predicted] = following[1:]
            weights[place : place + predicted] = 1.0
            if self._masked:
                learned = self.shards.learned_of(document, start + 1, start + 1 + predicted)
                if learned is not None:
                    weights[place : place + predicted] = learned
            if self._weights is not None:
                weights[place : place + predicted] *= self._weights[document]
            place += length
        ids = tuple(self.shards.id(document) for document in documents)
        return PackedSequence(
            tokens, targets, weights, lengths, ids=ids, sources=(self._source,) * len(lengths)
        )

    def ranking(self, column: str) -> np.ndarray:
        """The rows from the lowest mean of a per-document number to the highest: a curriculum."""
        pieces = self.shards.column(column)[self.packing.documents].astype(np.float64)
        sizes = (self.packing.ends - self.packing.starts).astype(np.float64)
        first = self.packing.rows[:-1]
        means = np.add.reduceat(pieces * sizes, first) / np.add.reduceat(sizes, first)
        return np.argsort(means, kind="stable")


class PackedBatches:
    """Global batches as a pure function of the step, for any number of processes, before and after a stop."""

    def __init__(
        self,
        ingredients: Sequence[Ingredient],
        *,
        context: int,
        batch_tokens: int,
        seed: int,
        tokens: int | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        method: Method = "best_fit",
        learn: Learn = "assistant",
    ) -> None:
        if not ingredients:
            raise TriviumError("There is nothing to train on: name at least one source in `data`.")
        if len({ingredient.name for ingredient in ingredients}) != len(ingredients):
            raise TriviumError("Two sources of one mixture have the same name; give each its own.")
        if batch_tokens < context:
            raise TriviumError(f"A batch of {batch_tokens} tokens holds no row of {context}; raise `batch`.")
        self.names = [ingredient.name for ingredient in ingredients]
        self.origins = [ingredient.origin for ingredient in ingredients]
        self.packed = [
            PackedRows(
                ingredient.shards,
                context,
                method=method,
                seed=seed,
                learn=learn,
                source=index,
                within=ingredient.within,
            )
            for index, ingredient in enumerate(ingredients)
        ]
        batch = batch_tokens // context
        available = sum(map(len, self.packed))
        if available == 0:
            raise TriviumError(f"No document of {', '.join(self.names)} has two tokens; give the stage data.")
        if [tokens, steps, epochs].count(None) != 2:
            raise TriviumError("Say how long to train with exactly one of `tokens`, `steps` and `epochs`.")
        if tokens is not None:
            steps = round(tokens / self._tokens_per_row() / batch)
        elif epochs is not None:
            steps = round(epochs * available / batch)
        self.plan = MixturePlan(
            sources=tuple(map(self._planned, ingredients, self.packed)),
            total=max(1, steps or 0) * batch,
            batch=batch,
            seed=seed,
        )

    def _planned(self, ingredient: Ingredient, packed: PackedRows) -> PlannedSource:
        # Without weights, sources count by their rows: each is passed over equally often.
        return PlannedSource(
            name=ingredient.name,
            rows=len(packed),
            weights=ingredient.weights or ((0.0, float(len(packed))),),
            start=round(ingredient.seen * len(packed)),
            max_repeats=ingredient.max_repeats,
            ranking=packed.ranking(ingredient.easy_first) if ingredient.easy_first else None,
            fingerprint=ingredient.shards.fingerprint
            + ("" if ingredient.within == (0, None) else f" {ingredient.within}"),
        )

    def _tokens_per_row(self) -> float:
        return sum(packed.packing.tokens for packed in self.packed) / sum(map(len, self.packed))

    @property
    def steps(self) -> int:
        """How many optimiser steps the plan lasts."""
        return self.plan.steps

    @cached_property
    def fingerprint(self) -> str:
        """Changes when any batch could change."""
        layout = [[rows.packing.context, len(rows), rows.packing.tokens] for rows in self.packed]
        return fingerprint([self.plan.hash, self.plan.batch, layout])

    def rows(self, step: int) -> list[PackedSequence]:
        """The global batch of optimiser step `step`."""
        return [self.packed[source].row(row) for source, row in self.plan.rows(step)]

    def metrics(self, step: int) -> Mapping[str, float]:
        """Nothing to log besides what the objective measures."""
        return {}

    def state(self) -> "tuple[dict[str, Any], dict[str, Tensor]]":
        """All there is to remember: which plan this is. Where in it, the trainer's step says."""
        return {"plan": self.plan.hash}, {}

    def restore(self, json: dict[str, Any], tensors: "dict[str, Tensor]") -> None:
        """Refuse to go on with another order than the one the run began with."""
        if json.get("plan") != self.plan.hash:
            raise TriviumError(
                "The data, the mixture or the seed has changed since this run began, so it cannot go on; "
                "undo the change or start the stage again."
            )

    def consumed(self, step: int) -> dict[str, float]:
        """The passes over every source after `step` steps, by its origin, with those of earlier stages."""
        rows = self.plan.consumed(step)
        return {
            origin: rows[name] / max(1, len(packed))
            for name, origin, packed in zip(self.names, self.origins, self.packed, strict=True)
            if origin
        }

    def shares(self, step: int) -> dict[str, float]:
        """The share of every source in all rows of the first `step` steps."""
        drawn = self.plan.drawn(step * self.plan.batch)
        return {name: count / max(1, sum(drawn)) for name, count in zip(self.names, drawn, strict=True)}

    def report(self) -> dict[str, dict[str, float]]:
        """Per source: what packing did, and what share of the plan it gets in how many passes."""
        drawn = self.plan.drawn(self.plan.steps * self.plan.batch)
        total = max(1, sum(drawn))
        return {
            name: {
                **rows.packing.report(),
                "rows_drawn": count,
                "share": count / total,
                "passes": (source.start + count) / max(1, len(rows)),
            }
            for name, rows, source, count in zip(
                self.names, self.packed, self.plan.sources, drawn, strict=True
            )
        }


def validation_rows(
    shards: Shards, context: int, byte_lengths: np.ndarray, *, tokens: int | None = None, source: int = 0
) -> list[PackedSequence]:
    """Fixed rows to measure on, of about `tokens` tokens; column `bytes` is how many each target stands for.

    Bits per byte is the summed loss of the targets over ln 2 times the sum of `bytes`.
    """
    packed = PackedRows(shards, context, learn="everything", source=source)
    order = shuffled(np.arange(len(packed)), max(1, len(packed)), round_keys("validation"))
    rows: list[PackedSequence] = []
    taken = 0
    for index in order.tolist():
        if tokens is not None and rows and taken + context > tokens:
            break
        row = packed.row(index)
        spelled = np.where(row.targets >= 0, byte_lengths[row.targets], 0).astype(np.float32)
        rows.append(PackedSequence(**{**vars(row), "columns": {"bytes": spelled}}))
        taken += len(row)
    return rows
