"""What became of the documents: counts by step, source and rule, and examples that a person can read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from trivium.curate.batch import Batch, Outcome

EXAMPLES, EXCERPT = 20, 600
_NOTES, _LINES = 400, 20
_BINS = 20


class Tally:
    """Counts of one shard or of many; adding two gives the same whatever the order."""

    def __init__(self, content: Mapping[str, Any] | None = None) -> None:
        content = content or {}
        self.steps: dict[str, dict[str, Any]] = dict(content.get("steps", {}))
        self.scores: dict[str, list[int]] = dict(content.get("scores", {}))

    def as_json(self) -> dict[str, Any]:
        return {"steps": self.steps, "scores": self.scores}

    def _step(self, key: str, title: str) -> dict[str, Any]:
        empty = {"title": title, "sources": {}, "rules": {}, "examples": {}, "notes": {}}
        return self.steps.setdefault(key, empty)

    def add_in(self, key: str, title: str, batch: Batch) -> None:
        """Count what a step was given."""
        sources = self._step(key, title)["sources"]
        for source, documents, size in _by_source(batch):
            row = sources.setdefault(source, [0, 0, 0, 0])
            row[0] += documents
            row[1] += size

    def add_out(self, key: str, title: str, kept: Batch, dropped: Batch, reasons: list[str]) -> None:
        """Count what a step kept, and why it left the others out."""
        step = self._step(key, title)
        for source, documents, size in _by_source(kept):
            row = step["sources"].setdefault(source, [0, 0, 0, 0])
            row[2] += documents
            row[3] += size
        for name, text, reason in zip(dropped.ids, dropped.texts if reasons else [], reasons):
            rule = reason.partition(":")[0]
            step["rules"][rule] = step["rules"].get(rule, 0) + 1
            self._example(step["examples"].setdefault(rule, []), name, text or "", reason)

    def _example(self, examples: list[list[str]], name: str, text: str, reason: str) -> None:
        """Keep the documents whose ids hash lowest: a random choice that depends on nothing else."""
        order = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        if len(examples) < EXAMPLES or order < examples[-1][0]:
            examples.append([order, name, reason[:300], text[:EXCERPT]])
            examples.sort()
            del examples[EXAMPLES:]

    def add_notes(self, key: str, title: str, outcome: Outcome) -> None:
        """Count what was done inside texts."""
        notes = self._step(key, title)["notes"]
        for name, count in outcome.notes.items():
            notes[name] = notes.get(name, 0) + count

    def add_scores(self, batch: Batch, columns: Iterable[str]) -> None:
        """Count scores from 0 to 1 in bins."""
        for column in columns:
            values = batch.numbers(column)
            counts, _ = np.histogram(np.clip(values[np.isfinite(values)], 0, 1), bins=_BINS, range=(0, 1))
            before = self.scores.get(column, [0] * _BINS)
            self.scores[column] = [one + int(other) for one, other in zip(before, counts)]

    def merge(self, other: Mapping[str, Any]) -> None:
        """Add another shard's counts."""
        for key, theirs in other["steps"].items():
            mine = self._step(key, theirs["title"])
            for source, row in theirs["sources"].items():
                before = mine["sources"].get(source, [0, 0, 0, 0])
                mine["sources"][source] = [one + more for one, more in zip(before, row)]
            for name in ("rules", "notes"):
                for what, count in theirs[name].items():
                    mine[name][what] = mine[name].get(what, 0) + count
            if len(mine["notes"]) > _NOTES:
                ranked = sorted(mine["notes"].items(), key=lambda one: (-one[1], one[0]))
                mine["notes"] = dict(ranked[:_NOTES])
            for rule, examples in theirs["examples"].items():
                both = sorted([*mine["examples"].get(rule, []), *examples])
                mine["examples"][rule] = both[:EXAMPLES]
        for column, counts in other["scores"].items():
            before = self.scores.get(column, [0] * _BINS)
            self.scores[column] = [one + more for one, more in zip(before, counts)]


def _by_source(batch: Batch) -> list[tuple[str, int, int]]:
    names, inverse = np.unique(np.array(batch.sources, dtype=object), return_inverse=True)
    documents = np.bincount(inverse, minlength=len(names))
    sizes = np.bincount(inverse, weights=np.nan_to_num(batch.bytes.astype(np.float64)), minlength=len(names))
    return [(str(name), int(one), int(size)) for name, one, size in zip(names, documents, sizes)]
