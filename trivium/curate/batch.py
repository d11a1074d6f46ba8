"""A batch of documents: an Arrow record batch, with its texts and their characters at hand for the steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as arrow
import pyarrow.compute as compute

from trivium.curate.characters import Characters
from trivium.data.formats import ID_COLUMN

BASE: dict[str, arrow.DataType] = {
    "id": arrow.string(),
    "source": arrow.string(),
    "line": arrow.int64(),
    "text": arrow.large_string(),
    "fields": arrow.string(),
}
"""The columns every document has; steps add their own. `fields` is JSON of what else the row held."""
RAW: dict[str, arrow.DataType] = {"raw": arrow.large_binary(), "media": arrow.string()}
"""Before `extract`: the bytes as they were read, and of what kind they are."""
DROPPED: dict[str, arrow.DataType] = {
    "id": arrow.string(),
    "source": arrow.string(),
    "text": arrow.large_string(),
    "step": arrow.string(),
    "reason": arrow.string(),
}
_CHARACTERS, _DOCUMENTS = 1 << 17, 2048
# Arrow's own allocator keeps what is freed; the system's gives large blocks back.
arrow.set_memory_pool(arrow.system_memory_pool())


def schema_of(columns: Mapping[str, arrow.DataType]) -> arrow.Schema:
    """A schema that says which column is the document's id, for whatever reads the file later."""
    return arrow.schema(list(columns.items()), metadata={ID_COLUMN: b"id"})


@dataclass(frozen=True, eq=False)
class Batch:
    """Some documents in order; a step makes a new batch from it and never changes one."""

    records: arrow.RecordBatch

    @property
    def size(self) -> int:
        return int(self.records.num_rows)

    @cached_property
    def texts(self) -> list[str]:
        return self.records.column("text").to_pylist()

    @cached_property
    def ids(self) -> list[str]:
        return self.records.column("id").to_pylist()

    @cached_property
    def sources(self) -> list[str]:
        """The source of every document."""
        return self.records.column("source").to_pylist()

    @cached_property
    def characters(self) -> Characters:
        """The texts as one array of code points."""
        return Characters(self.texts)

    @cached_property
    def bytes(self) -> np.ndarray:
        """The bytes of every text in UTF-8, [documents]."""
        return compute.binary_length(self.records.column("text")).to_numpy(zero_copy_only=False)

    def numbers(self, column: str) -> np.ndarray:
        """A numeric column, or field of the rows, as float64, [documents]; what is missing is NaN."""
        if column not in self.records.schema.names:
            values = [json.loads(one).get(column) for one in self.records.column("fields").to_pylist()]
            return np.array([float(one) if isinstance(one, int | float) else np.nan for one in values])
        found = self.records.column(column).cast(arrow.float64())
        return found.to_numpy(zero_copy_only=False)

    def with_columns(self, columns: Mapping[str, arrow.Array]) -> Batch:
        """The same documents with these columns added or replaced."""
        arrays = dict(zip(self.records.schema.names, self.records.columns))
        arrays.update(columns)
        return Batch(arrow.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays)))

    def without(self, *columns: str) -> Batch:
        """The same documents without these columns."""
        kept = [name for name in self.records.schema.names if name not in columns]
        return Batch(self.records.select(kept))

    def where(self, mask: np.ndarray) -> Batch:
        """The documents where `mask`, booleans of [documents], is true."""
        return self if mask.all() else Batch(self.records.filter(arrow.array(mask)))


@dataclass
class Outcome:
    """What a step says of a batch: why each document is left out (None: it is not), and what changed."""

    reasons: Sequence[str | None] | None = None
    """`rule: what was found`; the rule is what the funnel counts by. None keeps all."""
    texts: Sequence[str] | None = None
    columns: Mapping[str, arrow.Array] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    """Counts of what was done inside texts, such as addresses masked."""


def batches(table: arrow.Table) -> Iterator[Batch]:
    """The rows of a table in batches small enough for the caches of a processor."""
    if not table.num_rows:
        return
    lengths = np.zeros(table.num_rows, dtype=np.int64)
    for name in ("text", "raw"):
        if name in table.column_names:
            found = compute.fill_null(compute.binary_length(table.column(name)), 0)
            lengths += found.to_numpy()
    group = np.cumsum(lengths) // _CHARACTERS
    edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), table.num_rows]
    for start, end in pairwise(edges):
        for first in range(start, end, _DOCUMENTS):
            rows = table.slice(first, min(_DOCUMENTS, end - first)).combine_chunks()
            yield Batch(rows.to_batches()[0])


def strings(values: Sequence[str | None]) -> arrow.Array:
    """Texts as a column."""
    return arrow.array(values, type=arrow.large_string())
