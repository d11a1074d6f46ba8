"""What has run: every recipe and stage with its state, date and cost, and results of earlier settings."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from trivium.kit.code import package_code
from trivium.kit.errors import DamagedError, TriviumError, nearest
from trivium.kit.files import read_json
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.kit.seals import COMPLETE, read_sealed, write_sealed
from trivium.pipeline.store import Entry, Store, last_row, size

INDEX = "index.json"
"""What is known of finished results, so that a list of many is quick; made again where it is missing."""
_KIND_OF_INDEX = 1


def results(
    runs: str | Path, recipe: str | None = None, *, price: float | None = None
) -> list[dict[str, Any]]:
    """Every result under `runs`, or those of one recipe: the linked ones, then those of earlier settings.

    `price` is what an hour of one process (a GPU, or the machine) costs.
    """
    store = Store(Path(runs))
    found = list(_found(store, price))
    names = sorted({str(one["recipe"]) for one in found})
    if recipe is not None:
        if recipe not in names:
            raise TriviumError(f"No recipe `{recipe}` has run under {runs}{nearest(recipe, names) or '.'}")
        found = [one for one in found if one["recipe"] == recipe]
    if not found:
        raise TriviumError(f"Nothing has run under {runs} yet; start with `trivium run`.")
    return found


def _found(store: Store, price: float | None) -> Iterator[dict[str, Any]]:
    linked = {recipe: list(stages.items()) for recipe, stages in store.recipes().items()}
    reached = {entry.folder.name for stages in linked.values() for _, entry in stages}
    known = Index(store)
    facts = {entry.folder.name: known.facts(entry) for entry in store.entries()}
    known.keep()
    earlier: dict[str, list[str]] = {}
    for name, one in facts.items():
        if name not in reached and one["state"] != "damaged":
            earlier.setdefault(str(one["made_by"]), []).append(name)

    def row(recipe: str, shown: str, entry: str, is_earlier: bool) -> dict[str, Any]:
        one = facts[entry]
        cost = None
        if price is not None and one["seconds"] is not None:
            cost = round(one["seconds"] / 3600 * price * (one["processes"] or 1), 6)
        row = {"recipe": recipe, "name": shown, **one, "earlier_settings": is_earlier, "cost": cost}
        return {
            **row,
            "bases": _bases(entry, facts),
            "code_changed": one["code"] not in (None, package_code()),
        }

    for recipe in sorted({*linked, *earlier}):
        stages = [(stage, entry.folder.name) for stage, entry in linked.get(recipe, [])]
        stages = [(stage, entry) for stage, entry in stages if entry in facts]
        for stage, entry in sorted(stages, key=lambda one: str(facts[one[1]]["started"] or "")):
            yield row(recipe, f"{recipe}/{stage}", entry, False)
        for entry in earlier.get(recipe, []):
            yield row(recipe, entry, entry, True)


class Index:
    """The facts of finished results, which do not change, kept in one file."""

    def __init__(self, store: Store) -> None:
        self._path = store.folder / INDEX
        self._known: dict[str, Any] = {}
        self._used: dict[str, Any] = {}
        # What is damaged or of another version is no loss: it is found out again.
        with suppress(DamagedError):
            content = read_sealed(self._path) if self._path.is_file() else {}
            self._known = content["results"] if content.get("kind") == _KIND_OF_INDEX else {}

    def facts(self, entry: Entry) -> dict[str, Any]:
        """What is known of an entry, read from its folder unless it was finished when it was last read."""
        try:
            complete = (entry.folder / COMPLETE).stat()
        except FileNotFoundError:
            return _facts(entry)
        key = [complete.st_mtime_ns, complete.st_size]
        known = self._known.get(entry.folder.name)
        if known is None or known["key"] != key:
            known = {"key": key, "facts": _facts(entry)}
        self._used[entry.folder.name] = known
        return {**known["facts"], "folder": str(entry.folder)}

    def keep(self) -> None:
        if self._used != self._known:
            with suppress(TriviumError):
                write_sealed(self._path, {"kind": _KIND_OF_INDEX, "results": self._used})


def _facts(entry: Entry) -> dict[str, Any]:
    try:
        record = entry.record
    except DamagedError:
        record = {}
    summary, machine = record.get("summary") or {}, record.get("machine") or {}
    last = last_row(entry)
    return {
        "entry": entry.folder.name,
        "stage": record.get("stage"),
        "made_by": record.get("recipe", ""),
        "kind": record.get("kind", ""),
        "produces": record.get("produces"),
        "state": entry.state if record else "damaged",
        "started": record.get("started"),
        "seconds": record.get("seconds"),
        "flops": record.get("flops"),
        "processes": record.get("processes"),
        "device": machine.get("device_name"),
        "tokens": summary.get("tokens", last.get("tokens")),
        "loss": summary.get("loss", last.get("loss")),
        "bytes": size(entry.folder),
        "parents": [str(parent).partition("@")[0] for parent in (record.get("parents") or {}).values()],
        "code": (record.get("versions") or {}).get("code"),
        "folder": str(entry.folder),
    }


def _bases(entry: str, facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The models that a result descends from and that descend from none themselves."""
    found, waiting, seen = [], [entry], set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in facts:
            continue
        seen.add(name)
        models = [one for one in facts[name]["parents"] if facts.get(one, {}).get("produces") == "model"]
        if not models and name != entry:
            found.append(name)
        waiting += models
    return sorted(found)


def table(found: list[dict[str, Any]], *, cost: bool = False) -> list[list[str]]:
    """The results as rows for a terminal; with `cost` what each took, and the sum of every recipe."""
    head = ["result", "kind", "state", "started"]
    money = any(one["cost"] is not None for one in found)
    rows = [[*head, *(COST if money else COST[:-1])] if cost else [*head, "tokens", "loss", "base"]]
    names = {one["entry"]: one["name"] for one in found}
    for recipe in dict.fromkeys(one["recipe"] for one in found):
        some = [one for one in found if one["recipe"] == recipe]
        for one in some:
            state = f"{one['state']}, earlier settings" if one["earlier_settings"] else one["state"]
            rows.append([one["name"], one["kind"], state, date(one["started"])])
            rows[-1] += costs(one)[: None if money else -1] if cost else _result(one, names)
        if cost:
            rows.append([f"{recipe}: all", "", "", "", *costs(total(some))[: None if money else -1]])
    return rows


COST = ["time", "FLOPs", "disk", "money"]


def _result(one: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    tokens, loss = one["tokens"], one["loss"]
    return [
        short(tokens) if tokens is not None else "",
        f"{loss:.3f}" if isinstance(loss, float) else "",
        ", ".join(names.get(base, base) for base in one["bases"]),
    ]


def costs(one: Mapping[str, Any]) -> list[str]:
    """Time, FLOPs, disk and money for people, under the headings `COST`."""
    return [
        duration(one["seconds"]) if one["seconds"] else "",
        short(one["flops"]) if one["flops"] else "",
        f"{one['bytes'] / 2**20:.1f} MiB",
        f"{one['cost']:.2f}" if one["cost"] is not None else "",
    ]


def total(some: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums of what several results cost; one that several recipes share counts once."""
    each = {one["entry"]: one for one in some}.values()
    found: dict[str, Any] = {key: sum(one[key] or 0 for one in each) for key in ("seconds", "flops", "bytes")}
    money = [one["cost"] for one in each if one["cost"] is not None]
    return {**found, "cost": sum(money) if money else None}


def date(started: Any) -> str:
    """The day and minute of a time as `stage.yaml` keeps it."""
    try:
        return datetime.fromisoformat(str(started)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return ""


def verdicts(runs: Path, recipe: str) -> list[dict[str, Any]]:
    """What an experiment found of each of its claims."""
    path = runs / recipe / "experiment.json"
    try:
        claims = read_json(path)["claims"] if path.is_file() else []
        return [{"says": str(claim["says"]), "verdict": str(claim["verdict"])} for claim in claims]
    except (DamagedError, KeyError, TypeError):
        return []
