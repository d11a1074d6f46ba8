"""The log of what happened, one JSON object a line."""

import json
import math
import os
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import sync, write_text

BLOCK = 1 << 16
"""Bytes that are read at a time from the end of a log."""


class MetricsLog:
    """Appends rows to `metrics.jsonl`; a row cut off by a crash is dropped when the log is opened again."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _, whole = _last_row(self.path)
            if whole < self.path.stat().st_size:
                with open(self.path, "r+b") as file:
                    file.truncate(whole)

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers that are not finite become null, as JSON has none."""
        line = json.dumps({key: _plain(value) for key, value in row.items()}, ensure_ascii=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def rows(self) -> list[dict[str, Any]]:
        return read_metrics(self.path)

    def sync(self) -> None:
        """Wait until all rows are on the disk itself."""
        if self.path.exists():
            sync(self.path)

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`, as the run goes on from there; rows are in order of steps."""
        newest, _ = _last_row(self.path) if self.path.exists() else (None, 0)
        if newest is not None and newest.get("step", step + 1) <= step:
            return
        kept = [row for row in read_metrics(self.path) if row.get("step", 0) <= step]
        write_text(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


def _last_row(path: Path) -> tuple[dict[str, Any] | None, int]:
    """The last whole row, None where none can be read, and where the whole rows end in the file.

    Only the end is read, as a run asks for it at every step.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        block = min(size, BLOCK)
        while True:
            file.seek(size - block)
            content = file.read(block)
            end = content.rfind(b"\n") + 1
            start = content[: max(0, end - 1)].rfind(b"\n") + 1
            if start or block == size:
                break
            block = min(size, 2 * block)
    try:
        row = json.loads(content[start:end])
    except ValueError:
        row = None
    return row if isinstance(row, dict) else None, size - block + end


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All whole rows of a metrics log; an empty list where there is none yet."""
    path = Path(path)
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise TriviumError(f"{path}:{number} is not a JSON object; the log is damaged there.") from None
    return rows


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
