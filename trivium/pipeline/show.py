"""Everything kept about one stage, and which documents a step learnt from."""

from pathlib import Path
from typing import Any

import yaml

from trivium.data.preview import previewed
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.pipeline.store import Entry, Store, find
from trivium.stages import stage_of
from trivium.stages.parts.stage import Work

__all__ = ["batch", "documents", "find", "text"]


def text(entry: Entry) -> str:
    """What `stage.yaml` keeps, and what the stage changed on taking over from its parent."""
    parts = [f"# {entry.folder} ({entry.state})", yaml.safe_dump(entry.record, sort_keys=False).rstrip()]
    changes = [row for row in entry.metrics if "change" in row]
    if changes:
        parts.append("changes:")
        parts += [f"  {row['change']}: {row['before']} -> {row['after']}" for row in changes]
    return "\n".join(parts)


def documents(entry: Entry, step: int) -> list[str]:
    """The ids of the documents in the batch of an optimiser step."""
    record = entry.record
    return stage_of(record).documents_of(_work(entry, record), step)


def batch(entry: Entry, step: int, colour: bool) -> str:
    """The packed batch of an optimiser step as text, with what is learned told apart."""
    record = entry.record
    rows, tokenizer = stage_of(record).batch_of(_work(entry, record), step)
    shown = [previewed(row, tokenizer, colour=colour) for row in rows]
    return "\n".join(f"=== row {number} of {len(rows)}\n{row}" for number, row in enumerate(shown, 1))


def _work(entry: Entry, record: dict[str, Any]) -> Work:
    """The work as the stage had it, from what was kept."""
    store = Store(entry.folder.parent.parent)
    inputs = {name: store.product(parent) for name, parent in record["parents"].items()}
    inputs |= {name: Path(place) for name, place in record["outside"].items()}
    log = MetricsLog(entry.folder / "metrics.jsonl")
    return Work(record["stage"], entry.folder, inputs, record["seed"], log, Progress(), resume=True)
