"""The store: a folder for every result, named by what it is made of, and links to it from each recipe."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import safe_open

from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import remove_parts, write_json, write_text
from trivium.kit.metrics import read_metrics
from trivium.kit.seals import COMPLETE, RECORD, compare, read_record, read_seal, seal_folder
from trivium.model.named import find_stage
from trivium.pipeline.lease import LEASE
from trivium.pipeline.lock import holder, locked
from trivium.stages.parts.stage import FOLDERS, HANDOVER, MOMENTS

if TYPE_CHECKING:
    from trivium.recipe.graph import Node

KEPT = "kept"
# The same safe writer in C, where PyYAML was built with it: four times as fast.
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
WORKING = ("checkpoints", "reference")
"""What a stage needs while it runs and no longer."""


@dataclass(frozen=True)
class Entry:
    """One result in the store, whole or on its way."""

    folder: Path

    @property
    def state(self) -> str:
        """`done`, `running`, `cut off` (the next run goes on from there) or `absent`."""
        if (self.folder / COMPLETE).is_file():
            return "done"
        if holder(self.folder) is not None:
            return "running"
        return "cut off" if (self.folder / RECORD).is_file() else "absent"

    @property
    def record(self) -> dict[str, Any]:
        """What `stage.yaml` says: settings, parents, versions, machine, and the summary once there is one."""
        return read_record(self.folder) if (self.folder / RECORD).is_file() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def output(self) -> Path:
        """The folder of what the stage made."""
        produces = self.record["produces"]
        return self.folder / FOLDERS.get(produces, produces)

    def note(self, record: dict[str, Any]) -> None:
        text = yaml.dump(record, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=100)
        write_text(self.folder / RECORD, text)

    def complete(self) -> None:
        """Seal all that the stage leaves behind with one checksum, then remove its saved states."""
        remove_parts(self.folder)
        self.expose()
        files = [path for path in self.folder.rglob("*") if self._is_left(path)]
        made = self.output
        product = [path for path in files if made in path.parents]
        if not product:
            raise AssertionError(f"{self.folder.name} says it is done but left {made.name}/ empty")
        beside = [self.folder / name for name in (MOMENTS, HANDOVER)]
        kept = [path for path in files if self.folder / KEPT in path.parents]
        seal_folder(self.folder, files, {*product, *kept, *(path for path in beside if path in files)})
        self.tidy()

    def expose(self) -> None:
        """Link a model's or tokenizer's files beside `stage.yaml`, so that the stage's folder itself opens.

        An index that names the weights keeps readers which take every safetensors file from the moments.
        """
        made = self.output
        if self.record["produces"] not in ("model", "reward", "tokenizer") or not made.is_dir():
            return
        # Where results are only looked at, torch is not imported.
        from trivium.model.folder import INDEX_FILE, SINGLE_FILE

        for path in sorted(made.iterdir()):
            link = self.folder / path.name
            if path.is_file() and not path.name.startswith(".") and not link.exists():
                link.unlink(missing_ok=True)
                os.symlink(path.relative_to(self.folder), link)
        weights, index = made / SINGLE_FILE, self.folder / INDEX_FILE
        if weights.is_file() and not index.exists():
            with safe_open(weights, framework="np") as file:
                names = sorted(file.keys())
            content = {"metadata": {"total_size": weights.stat().st_size}}
            write_json(index, {**content, "weight_map": dict.fromkeys(names, SINGLE_FILE)})

    def tidy(self) -> None:
        """Remove what only a stage at work needs; a process that ended while it did so left some of it."""
        for name in WORKING:
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def _is_left(self, path: Path) -> bool:
        """Whether a file outlives the work on the stage."""
        if not path.is_file() or path.is_symlink():
            return False
        parts = path.relative_to(self.folder).parts
        hidden = any(part.startswith(".") for part in parts)
        is_left = parts[0] not in (*WORKING, COMPLETE, "LOCK") and not parts[0].startswith(LEASE)
        return not hidden and is_left

    def verify(self, product: Path | None = None) -> None:
        """Name a file of a finished stage that is not what was written.

        Sizes of all files, the content of the records, and that of `product` if another stage starts from it;
        optimiser moments and shards are compared where they are read, since that takes long.
        """
        seal = read_seal(self.folder)
        for name, size in seal["sizes"].items():
            path = self.folder / name
            if path.is_file() and path.stat().st_size != size:
                compare(self.folder, seal, name)
        wanted = "" if product is None else product.relative_to(self.folder).as_posix()
        in_shards = self.record["produces"] == "shards"
        for name in seal["files"]:
            above, _, last = name.rpartition("/")
            is_record = not above and last != MOMENTS
            is_used = bool(wanted) and f"{name}/".startswith(f"{wanted}/")
            shards = in_shards and not last.endswith(".json")
            if is_record or (is_used and not shards):
                compare(self.folder, seal, name)


@dataclass(frozen=True)
class Store:
    """All results under one `runs` folder."""

    runs: Path

    def entry(self, node: Node) -> Entry:
        """Where a stage's result is or will be; another recipe's name for the same thing is honoured."""
        return self.named(node.entry)

    def named(self, name: str) -> Entry:
        """The entry `base-0123abcd`, whatever the recipe that made it calls the stage."""
        if not (self.folder / name).exists():
            for other in self.folder.glob(f"*-{name.rpartition('-')[2]}"):
                return Entry(other)
        return Entry(self.folder / name)

    def product(self, recorded: str) -> Path:
        """The folder behind `base-0123abcd`, or behind a checkpoint kept, `base-0123abcd@tokens=2000000`."""
        # What reads data and models takes longer to import than all else here.
        from trivium.stages.parts.inheritance import kept_model

        name, _, checkpoint = recorded.partition("@")
        entry = self.named(name)
        return kept_model(entry.folder, checkpoint) if checkpoint else entry.output

    def line(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """These entries and all that they were made from, each once, the nearest first."""
        waiting, seen = list(entries), set()
        while waiting:
            entry = waiting.pop(0)
            if entry.folder.name not in seen:
                seen.add(entry.folder.name)
                yield entry
                parents = (entry.record.get("parents") or {}).values()
                waiting += [self.named(str(parent).partition("@")[0]) for parent in parents]

    @property
    def folder(self) -> Path:
        return self.runs / "store"

    def entries(self) -> Iterator[Entry]:
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
            raise TriviumError(f"{place} is a folder, not a link; move it away.")
        target = Path("..") / "store" / entry.folder.name
        if place.is_symlink() and os.readlink(place) == str(target):
            # Its time says since when this recipe uses the result.
            return place
        beside = place.with_name(f".{stage}.{uuid.uuid4().hex[:8]}")
        os.symlink(target, beside)
        os.replace(beside, place)
        return place

    def unreached(self) -> list[Entry]:
        """The entries no recipe's link leads to, neither directly nor as a parent, and nobody works on."""
        linked = (entry for stages in self.recipes().values() for entry in stages.values())
        reached = {entry.folder.name for entry in self.line(linked)}
        return [
            entry for entry in self.entries() if entry.folder.name not in reached and entry.state != "running"
        ]

    def remove(self, entry: Entry) -> None:
        """Take an entry away; under another name first, so that half of it is never found."""
        with locked(entry.folder, lambda _: None, wait=False):
            gone = entry.folder.with_name(f".{entry.folder.name}.{uuid.uuid4().hex[:8]}.gone")
            os.rename(entry.folder, gone)
        shutil.rmtree(gone)


def size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def now() -> str:
    """The time as it stands in `stage.yaml`."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def last_row(entry: Entry) -> dict[str, Any]:
    """The newest row of the log that counts tokens, or nothing."""
    return next((row for row in reversed(entry.metrics) if "tokens" in row), {})


def find(runs: str | Path, name: str) -> Entry:
    """The entry of `base`, `laptop/base` or a folder; the latest where several recipes have that stage."""
    place = find_stage(name, runs)
    if place is None:
        recipes = Store(Path(runs)).recipes()
        above = "/" in str(name)
        known = {f"{recipe}/{stage}" if above else stage for recipe in recipes for stage in recipes[recipe]}
        remedy = "`trivium ls` lists what has." if known else "start with `trivium run`."
        hint = nearest(str(name), known) or f"; {remedy}"
        raise TriviumError(f"No stage `{name}` has run under {runs}{hint}")
    return Entry(place)
