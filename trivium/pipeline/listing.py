"""What has run: every recipe and stage with its state, date and cost, and results of earlier settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.pipeline.run import last_row
from trivium.pipeline.store import Entry, Store, size
from trivium.recipe.read import nearest


def results(runs: str | Path, recipe: str | None = None) -> list[dict[str, Any]]:
    """Every result under `runs`, or those of one recipe: the linked ones, then those of earlier settings."""
    store = Store(Path(runs))
    found = list(_found(store))
    names = sorted({str(one["recipe"]) for one in found})
    if recipe is not None:
        if recipe not in names:
            raise TriviumError(f"No recipe `{recipe}` has run under {runs}{nearest(recipe, names) or '.'}")
        found = [one for one in found if one["recipe"] == recipe]
    if not found:
        raise TriviumError(f"Nothing has run under {runs} yet; start with `trivium run`.")
    return found


def _found(store: Store) -> Iterator[dict[str, Any]]:
    linked = {recipe: list(stages.items()) for recipe, stages in store.recipes().items()}
    reached = {entry.folder.name for stages in linked.values() for _, entry in stages}
    earlier: dict[str, list[Entry]] = {}
    for entry in store.entries():
        if entry.folder.name not in reached:
            record = _record(entry)
            if record:
                earlier.setdefault(str(record.get("recipe", "")), []).append(entry)
    for recipe in sorted({*linked, *earlier}):
        for stage, entry in sorted(linked.get(recipe, []), key=_began):
            yield _facts(recipe, f"{recipe}/{stage}", entry, earlier=False)
        for entry in earlier.get(recipe, []):
            yield _facts(recipe, entry.folder.name, entry, earlier=True)


def _record(entry: Entry) -> dict[str, Any]:
    """What the stage says of itself; a damaged record is named by the verbs that use it."""
    try:
        return entry.record
    except DamagedError:
        return {}


def _began(named: tuple[str, Entry]) -> str:
    return str(_record(named[1]).get("started", ""))


def _facts(recipe: str, name: str, entry: Entry, *, earlier: bool) -> dict[str, Any]:
    record = _record(entry)
    summary = record.get("summary") or {}
    last = last_row(entry)
    return {
        "recipe": recipe,
        "name": name,
        "kind": record.get("kind", ""),
        "state": entry.state if record else "damaged",
        "earlier_settings": earlier,
        "started": record.get("started"),
        "seconds": record.get("seconds"),
        "flops": record.get("flops"),
        "tokens": summary.get("tokens", last.get("tokens")),
        "loss": summary.get("loss", last.get("loss")),
        "bytes": size(entry.folder),
        "folder": str(entry.folder),
    }


def table(found: list[dict[str, Any]], *, cost: bool = False) -> list[list[str]]:
    """The results as rows for a terminal; with `cost` what each took, and the sum of every recipe."""
    head = ["result", "kind", "state", "started"]
    rows = [[*head, "time", "FLOPs", "disk"] if cost else [*head, "tokens", "loss"]]
    for recipe in dict.fromkeys(one["recipe"] for one in found):
        some = [one for one in found if one["recipe"] == recipe]
        for one in some:
            state = f"{one['state']}, earlier settings" if one["earlier_settings"] else one["state"]
            rows.append([one["name"], one["kind"], state, _date(one["started"]), *_last(one, cost)])
        if cost:
            rows.append([f"{recipe}: all", "", "", "", *_last(_sum(some), cost)])
    return rows


def _last(one: Mapping[str, Any], cost: bool) -> list[str]:
    if cost:
        seconds, flops = one["seconds"], one["flops"]
        return [
            duration(seconds) if seconds else "",
            short(flops) if flops else "",
            f"{one['bytes'] / 2**20:.1f} MiB",
        ]
    tokens, loss = one["tokens"], one["loss"]
    return [short(tokens) if tokens is not None else "", f"{loss:.3f}" if isinstance(loss, float) else ""]


def _sum(some: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(one[key] or 0 for one in some) for key in ("seconds", "flops", "bytes")}


def _date(started: Any) -> str:
    """The day and minute of a time as `stage.yaml` keeps it."""
    try:
        return datetime.fromisoformat(str(started)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""
