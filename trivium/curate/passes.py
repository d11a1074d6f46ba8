"""Curation in passes over shards: what looks at one document runs in batches, what looks at all in between.

A pass reads every shard, applies what the step before decided on all documents, runs the steps that need
one document alone, and leaves the keys that the next whole-corpus step decides on. A shard whose counts are
written is whole, so work that was killed goes on with the next one, and the bytes are the same as in one go.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

from trivium.curate.batch import BASE, DROPPED, Batch, Outcome, batches, schema_of, strings
from trivium.curate.engines import Workers
from trivium.curate.read import Shard
from trivium.curate.step import Decision, Keys, Step, WholeStep
from trivium.curate.tally import Tally
from trivium.kit.files import sync, write_text

READ = "00"
DONE, DECIDED = "DONE.json", "DECIDED.json"


@dataclass(frozen=True)
class Pass:
    """Steps by their key: the decision applied first, those for one document, the one that needs all."""

    number: int
    decided: tuple[str, WholeStep] | None
    steps: tuple[tuple[str, Step], ...]
    whole: tuple[str, WholeStep] | None
    columns: tuple[tuple[str, arrow.DataType], ...]
    """The columns of what is kept."""


def passes_of(steps: Sequence[Step]) -> list[Pass]:
    """The steps, cut after each one that needs all documents."""
    found: list[Pass] = []
    columns = dict(BASE)
    decided: tuple[str, WholeStep] | None = None
    mine: list[tuple[str, Step]] = []
    for number, step in enumerate(steps, start=1):
        columns |= step.columns()
        key = f"{number:02d}"
        if isinstance(step, WholeStep):
            found.append(Pass(len(found), decided, tuple(mine), (key, step), tuple(columns.items())))
            decided, mine = (key, step), []
        else:
            mine.append((key, step))
    if decided is not None or mine or not found:
        found.append(Pass(len(found), decided, tuple(mine), None, tuple(columns.items())))
    return found


def shard_name(number: int) -> str:
    """The name of a shard's files."""
    return f"{number:05d}"


def is_done(folder: Path, number: int) -> bool:
    """Whether a shard of a pass is whole."""
    return (folder / f"{shard_name(number)}.json").is_file()


def run_shard(one: Pass, folder: Path, number: int, rows: Shard | Path, decisions: Path | None) -> int:
    """Work on one shard and leave its files in `folder`; returns how many documents are left.

    `rows` is what was read, or the file that the pass before kept.
    """
    name = shard_name(number)
    tally, work = Tally(), _Shard(one, decisions, number)
    if isinstance(rows, Shard):
        work.reject(rows.rejects, tally)
        table = rows.table
    else:
        table = parquet.read_table(rows)
    kept: list[arrow.RecordBatch] = []
    keys: list[Keys] = []
    for batch in batches(table):
        if isinstance(rows, Shard):
            tally.add_in(READ, "read", batch)
            tally.add_out(READ, "read", batch, batch.where(np.zeros(batch.size, dtype=bool)), [])
        batch = work.through(batch, tally)
        if batch.size:
            if one.whole is not None:
                keys.append(one.whole[1].keys(batch))
            kept.append(_in_schema(batch.records, one.columns))
    _write(folder / f"{name}.kept.parquet", kept, schema_of(dict(one.columns)))
    _write(folder / f"{name}.dropped.parquet", work.dropped, schema_of(DROPPED))
    count = sum(batch.num_rows for batch in kept)
    if one.whole is not None:
        _write_keys(folder / name, keys, one.whole[1], count, one.columns)
    write_text(folder / f"{name}.json", json.dumps({"documents": count, **tally.as_json()}))
    return count


class _Shard:
    """The work on one shard: batches go through the steps, what is left out is collected."""

    def __init__(self, one: Pass, decisions: Path | None, number: int) -> None:
        self.one = one
        self.decision = None if decisions is None else Decision(decisions, number)
        self.dropped: list[arrow.RecordBatch] = []

    def reject(self, rejects: list[tuple[str, str, str]], tally: Tally) -> None:
        """Count what could not be read."""
        if not rejects:
            return
        ids, sources, reasons = (list(one) for one in zip(*rejects))
        reasons = [f"unreadable: {why}" for why in reasons]
        records = {"id": ids, "source": sources, "text": [""] * len(ids)}
        batch = Batch(
            arrow.RecordBatch.from_pydict(records, arrow.schema({name: DROPPED[name] for name in records}))
        )
        tally.add_in(READ, "read", batch)
        tally.add_out(READ, "read", batch.where(np.zeros(len(ids), dtype=bool)), batch, reasons)
        self._drop(batch, "read", reasons)

    def through(self, batch: Batch, tally: Tally) -> Batch:
        """The batch after all steps of the pass."""
        if self.decision is not None and self.one.decided is not None:
            key, step = self.one.decided
            rows = batch.size
            outcome = step.verdict(batch, self.decision)
            self.decision.row += rows
            batch = self._apply(key, step, batch, outcome, tally)
        for key, one in self.one.steps:
            if batch.size:
                batch = self._apply(key, one, batch, one.run(batch), tally)
        if self.one.whole is not None and batch.size:
            # Its columns count from here on, and its verdicts once all keys are known.
            batch = batch.with_columns(self.one.whole[1].run(batch).columns)
        return batch

    def _apply(self, key: str, step: Step, batch: Batch, outcome: Outcome, tally: Tally) -> Batch:
        tally.add_in(key, step.title, batch)
        before = batch
        if outcome.texts is not None:
            batch = batch.with_columns({"text": strings(outcome.texts)})
        if outcome.columns:
            batch = batch.with_columns(outcome.columns)
        if step.needs_raw:
            batch = batch.without("raw")
        reasons = outcome.reasons or [None] * batch.size
        keep = np.array([reason is None for reason in reasons], dtype=bool)
        # A person who asks why wants to see the text as the step was given it.
        shown = batch if step.needs_raw else before
        said = [reason for reason in reasons if reason is not None]
        left = shown.where(~keep) if said else shown.where(np.zeros(batch.size, dtype=bool))
        kept = batch.where(keep)
        tally.add_out(key, step.title, kept, left, said)
        tally.add_notes(key, step.title, outcome)
        if said:
            self._drop(left, step.title, said)
        tally.add_scores(
            kept, [name for name in step.columns() if name.endswith("score") or name == "quality"]
        )
        return kept

    def _drop(self, batch: Batch, step: str, reasons: list[str]) -> None:
        columns = {
            **{name: batch.records.column(name).cast(DROPPED[name]) for name in ("id", "source", "text")},
            "step": arrow.array([step] * batch.size, arrow.string()),
            "reason": arrow.array(reasons, arrow.string()),
        }
        self.dropped.append(arrow.RecordBatch.from_arrays(list(columns.values()), names=list(columns)))


def _in_schema(
    records: arrow.RecordBatch, columns: Sequence[tuple[str, arrow.DataType]]
) -> arrow.RecordBatch:
    arrays = [records.column(name).cast(kind) for name, kind in columns]
    return arrow.RecordBatch.from_arrays(arrays, names=[name for name, _ in columns])


def _write(path: Path, records: Sequence[arrow.RecordBatch], schema: arrow.Schema) -> None:
    table = arrow.Table.from_batches([one.cast(schema) for one in records], schema=schema).combine_chunks()
    beside = path.with_name(f".{path.name}.part")
    parquet.write_table(table, beside, compression="zstd", compression_level=1, row_group_size=4096)
    sync(beside)
    beside.replace(path)


def _write_keys(
    place: Path, keys: list[Keys], whole: WholeStep, count: int, columns: Sequence[tuple[str, arrow.DataType]]
) -> None:
    place.mkdir(exist_ok=True)
    if not keys:
        # The arrays of no documents have their type and shape all the same.
        empty = {name: arrow.array([], kind) for name, kind in columns}
        keys = [whole.keys(Batch(arrow.RecordBatch.from_pydict(empty, schema=arrow.schema(list(columns)))))]
    for name in keys[0]:
        np.save(place / f"{name}.npy", np.concatenate([one[name] for one in keys]), allow_pickle=False)
    np.save(place / "documents.npy", np.array([count]), allow_pickle=False)


def decide(one: Pass, folder: Path, shards: int, workers: Workers) -> dict[str, Any]:
    """Decide on all documents of a pass, once; the facts of it come back."""
    assert one.whole is not None
    done = folder / DECIDED
    if done.is_file():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    shutil.rmtree(folder / "decision", ignore_errors=True)
    (folder / "decision").mkdir()
    facts = one.whole[1].decide(
        [folder / shard_name(number) for number in range(shards)], folder / "decision", workers
    )
    write_text(done, json.dumps(facts))
    return facts


def tallies(folder: Path, shards: int) -> Iterator[dict[str, Any]]:
    """The counts of every shard of a pass."""
    for number in range(shards):
        yield json.loads((folder / f"{shard_name(number)}.json").read_text(encoding="utf-8"))
