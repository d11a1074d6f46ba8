"""Push a recipe's results to a shared store and pull them from it, by fingerprint, only what is missing."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.progress import Progress
from trivium.pipeline.lock import locked
from trivium.pipeline.run import prepare
from trivium.pipeline.sharing import Moved, SharedStore
from trivium.recipe import graph

HEADER = ["stage", "", "files", "moved", "entry"]


def push(
    recipe: str | Path,
    url: str,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
) -> list[list[str]]:
    """Copy what is finished here to the store; the rows of a table that says what was copied."""
    prepared, shared = prepare(recipe, runs, overrides), SharedStore(url)
    rows = [HEADER]
    for name in graph.needed(prepared.nodes, only):
        entry = prepared.entry(name)
        with Progress(name) as progress:
            if entry.state != "done":
                moved = Moved(f"not pushed: {entry.state}")
            else:
                progress.say(f"{name}: pushing {entry.folder.name}")
                moved = shared.repair(entry, prepared.nodes[name].fingerprint)
        rows.append(_row(name, moved, entry.folder.name))
    if all(row[1].startswith("not pushed") for row in rows[1:]):
        raise TriviumError(f"Nothing of {prepared.recipe.name} is finished under {runs}; run it first.")
    return rows


def pull(
    recipe: str | Path,
    url: str,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
) -> list[list[str]]:
    """Copy what the store has of a recipe to this machine; the rows of a table that says what was copied."""
    shared = SharedStore(url)
    prepared = prepare(recipe, runs, overrides, shared)
    rows = [HEADER]
    for name in graph.needed(prepared.nodes, only):
        entry, moved = prepared.entry(name), Moved("here before")
        with Progress(name) as progress:
            if entry.state != "done" and shared.manifest(prepared.nodes[name].fingerprint) is None:
                moved = Moved("not in the store")
            elif entry.state != "done":
                progress.say(f"{name}: pulling {entry.folder.name}")
                with locked(entry.folder, progress.say):
                    if entry.state != "done":
                        moved = shared.pull(prepared.store, prepared.nodes[name].fingerprint, entry)
        if entry.state == "done":
            prepared.store.link(prepared.recipe.name, name, entry)
        rows.append(_row(name, moved, entry.folder.name))
    if all(row[1] == "not in the store" for row in rows[1:]):
        raise TriviumError(f"{url} holds no result of {prepared.recipe.name} as it reads now; push it first.")
    return rows


def _row(name: str, moved: Moved, entry: str) -> list[str]:
    amount = f"{moved.bytes / 2**20:.1f} MiB" if moved.files else ""
    return [name, moved.became, str(moved.files or ""), amount, entry]
