"""Batches of every stage that trains on documents: packed sequences of shards, in the order of a plan."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from trivium.data.batches import PlannedBatches
from trivium.data.ingredients import Ingredient, Lengths, chosen
from trivium.data.mixture import MixturePlan, PlannedSource
from trivium.data.packing import Method, Packing, pack
from trivium.data.rows import NOTHING, PackedSequence, predict_text_alone
from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint


class PackedRows:
    """The rows one split of shards packs into, each read when it is asked for."""

    def __init__(
        self,
        shards: Shards,
        context: int,
        *,
        method: Method = "best_fit",
        seed: int = 0,
        source: int = 0,
        within: Lengths = (0, None),
    ) -> None:
        self.shards = shards
        self.packing: Packing = pack(chosen(shards.lengths, within), context, method=method, seed=seed)
        self._masked = shards.has_masks
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
        predict_text_alone(targets, weights)
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


class PackedBatches(PlannedBatches):
    """Batches of rows that documents of shards are packed into."""

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
    ) -> None:
        if not ingredients:
            raise TriviumError("There is nothing to train on: name at least one source in `data`.")
        if len({ingredient.name for ingredient in ingredients}) != len(ingredients):
            raise TriviumError("Two sources of one mixture have the same name; give each its own.")
        if batch_tokens < context:
            raise TriviumError(f"A batch of {batch_tokens} tokens holds no row of {context}; raise `batch`.")
        self.ingredients = list(ingredients)
        self.names = [ingredient.name for ingredient in ingredients]
        self.origins = [ingredient.origin for ingredient in ingredients]
        self.packed = [
            PackedRows(
                ingredient.shards,
                context,
                method=method,
                seed=seed,
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

    @cached_property
    def fingerprint(self) -> str:
        layout = [[rows.packing.context, len(rows), rows.packing.tokens] for rows in self.packed]
        return fingerprint([self.plan.hash, self.plan.batch, layout])

    def rows(self, step: int) -> list[PackedSequence]:
        return [self.packed[source].row(row) for source, row in self.plan.rows(step)]

    def consumed(self, step: int) -> dict[str, float]:
        rows = self.plan.consumed(step)
        return {
            origin: rows[name] / max(1, len(packed))
            for name, origin, packed in zip(self.names, self.origins, self.packed, strict=True)
            if origin
        }

    def shares(self, step: int) -> dict[str, float]:
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
