"""The store: a folder for every result, named by what it is made of, and links to it from each recipe."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum, read_json, write_json, write_text
from trivium.kit.metrics import read_metrics
from trivium.pipeline.lock import holder
from trivium.recipe.graph import Node
from trivium.stages.stage import FOLDERS

VERIFIED = ("model", "reward", "tokenizer")


@dataclass(frozen=True)
class Entry:
    """One result in the store, whole or on its way."""

    folder: Path

    @property
    def state(self) -> str:
        """`done`, `running`, `cut off` (the next run goes on from there) or `absent`."""
        if (self.folder / "COMPLETE").is_file():
            return "done"
        if holder(self.folder) is not None:
            return "running"
        return "cut off" if (self.folder / "stage.yaml").is_file() else "absent"

    @property
    def record(self) -> dict[str, Any]:
        """What `stage.yaml` says: settings, parents, versions, machine, and the summary once there is one."""
        path = self.folder / "stage.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All rows of its metrics log."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def output(self) -> Path:
        """The folder of what the stage made."""
        produces = self.record["produces"]
        return self.folder / FOLDERS.get(produces, produces)

    def note(self, record: dict[str, Any]) -> None:
        """Write `stage.yaml`."""
        text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=100)
        write_text(self.folder / "stage.yaml", text)

    def complete(self) -> None:
        """Seal the result with the checksums of its files; nothing is written after this."""
        files = [path for path in sorted(self.output.rglob("*")) if path.is_file()]
        if not files:
            raise AssertionError(f"{self.folder.name} says it is done but left {self.output.name}/ empty")
        sums = {path.relative_to(self.folder).as_posix(): checksum(path) for path in files}
        write_json(self.folder / "COMPLETE", {"files": sums})

    def verify(self) -> None:
        """Name a file that is not what was written; shards are verified where they are opened."""
        if self.record["produces"] not in VERIFIED:
            return
        for name, expected in read_json(self.folder / "COMPLETE")["files"].items():
            path = self.folder / name
            if not path.is_file() or checksum(path) != expected:
                raise TriviumError(
                    f"{path} is damaged or missing; delete {self.folder} and run again to make it anew."
                )


@dataclass(frozen=True)
class Store:
    """All results under one `runs` folder."""

    runs: Path

    def entry(self, node: Node) -> Entry:
        """Where a stage's result is or will be; another recipe's name for the same thing is honoured."""
        named = self.folder / node.entry
        if not named.exists():
            for other in self.folder.glob(f"*-{node.fingerprint}"):
                return Entry(other)
        return Entry(named)

    @property
    def folder(self) -> Path:
        """The folder that holds the entries."""
        return self.runs / "store"

    def entries(self) -> Iterator[Entry]:
        """Every entry, by name."""
        for folder in sorted(self.folder.glob("*-*")):
            if folder.is_dir() and not folder.name.startswith("."):
                yield Entry(folder)

    def recipes(self) -> dict[str, dict[str, Entry]]:
        """For every recipe that has run here, the entries its stages are linked to."""
        found: dict[str, dict[str, Entry]] = {}
        for folder in sorted(self.runs.glob("*/")) if self.runs.is_dir() else []:
            links = [link for link in sorted(folder.iterdir()) if link.is_symlink()]
            if folder.name != "store" and links:
                found[folder.name] = {link.name: Entry(link.resolve()) for link in links if link.exists()}
        return found

    def link(self, recipe: str, stage: str, entry: Entry) -> Path:
        """Let runs/<recipe>/<stage> lead to an entry, in one step."""
        place = self.runs / recipe / stage
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_symlink():
            raise TriviumError(f"{place} is a folder of somebody's, not a link; move it away.")
        beside = place.with_name(f".{stage}.{uuid.uuid4().hex[:8]}")
        os.symlink(Path("..") / "store" / entry.folder.name, beside)
        os.replace(beside, place)
        return place

    def unreached(self) -> list[Entry]:
        """The entries no recipe's link leads to, neither directly nor as a parent, and nobody works on."""
        reached: set[str] = set()
        waiting = [entry for stages in self.recipes().values() for entry in stages.values()]
        while waiting:
            entry = waiting.pop()
            if entry.folder.name not in reached:
                reached.add(entry.folder.name)
                parents = (entry.record.get("parents") or {}).values()
                waiting += [Entry(self.folder / parent.partition("@")[0]) for parent in parents]
        return [
            entry for entry in self.entries() if entry.folder.name not in reached and entry.state != "running"
        ]

    def remove(self, entry: Entry) -> None:
        """Take an entry away; under another name first, so that half of it is never found."""
        gone = entry.folder.with_name(f".{entry.folder.name}.gone")
        os.rename(entry.folder, gone)
        shutil.rmtree(gone)


def size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def now() -> str:
    """The time as it stands in `stage.yaml`."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
