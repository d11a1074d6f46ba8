"""A curation small enough for a test, and what it left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from trivium.curate.batch import Batch
from trivium.curate.curation import Curation
from trivium.curate.step import Step, parse_steps
from trivium.data.sources import Source

Rows = list[dict[str, Any]]


def curation(folder: Path, data: Sequence[str | Source], steps: Any, **settings: Any) -> Curation:
    """A curation of these sources whose work and results lie in a folder."""
    sources = [Source(path=one) if isinstance(one, str) else one for one in data]
    return Curation(
        steps=parse_steps(steps), sources=[(Path(one.path).name, one) for one in sources],
        scratch=folder / "checkpoints", kept=folder / "data", dropped=folder / "dropped",
        funnel=folder / "funnel.json", **settings,
    )  # fmt: skip


def rows(folder: Path) -> Rows:
    """All documents in a folder of parquet files."""
    return [row for path in sorted(folder.glob("*.parquet")) for row in parquet.read_table(path).to_pylist()]


def curated(folder: Path, data: Sequence[str | Source], steps: Any, **settings: Any) -> tuple[Rows, Rows]:
    """The documents that are kept and those that are dropped."""
    curation(folder, data, steps, **settings).run()
    return rows(folder / "data"), rows(folder / "dropped")


def write_lines(path: Path, documents: Sequence[str | dict[str, Any]]) -> str:
    """A JSONL file of texts or rows."""
    lines = [{"text": one} if isinstance(one, str) else one for one in documents]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


def batch_of(texts: Sequence[str], **columns: Any) -> Batch:
    """Texts as a step is given them."""
    content = {
        "id": [f"d{number}" for number in range(len(texts))],
        "source": ["s"] * len(texts),
        "text": arrow.array(texts, arrow.large_string()),
        "fields": ["{}"] * len(texts),
        **columns,
    }
    return Batch(arrow.RecordBatch.from_pydict(content))


def reasons(step: Any, texts: Sequence[str]) -> list[str | None]:
    """Why one step leaves texts out, by rule."""
    (parsed,) = parse_steps([step])
    assert isinstance(parsed, Step)
    found = parsed.run(batch_of(texts)).reasons or [None] * len(texts)
    return [None if reason is None else reason.partition(":")[0] for reason in found]
