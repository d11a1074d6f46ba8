"""The whole line of a result: data and checksums, code, machine, ancestors, who reuses it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.kit.code import package_code
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import checksum
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.kit.seals import COMPLETE, RECORD, read_seal
from trivium.kit.table import hanging
from trivium.pipeline.accepted import acceptances
from trivium.pipeline.store import Entry, Store, find

if TYPE_CHECKING:
    from trivium.recipe.outside import Checksums

SHOWN_FILES = 5
_MACHINE = ("device_name", "device", "cores", "threads", "torch", "kernels", "system")


def line(runs: str | Path, stage: str) -> dict[str, Any]:
    """Everything that a result came from, the result itself first, then its ancestors, nearest first."""
    # Of data that lies on this machine; what reads it takes longer to import than all else here.
    from trivium.recipe.outside import Checksums

    entry = find(runs, stage)
    store = Store(entry.folder.parent.parent if entry.folder.parent.name == "store" else Path(runs))
    uses = _uses(store)
    accepted = acceptances(store.folder)
    checksums = Checksums(store.folder / "checksums.json")
    found: dict[str, dict[str, Any]] = {}
    waiting = [entry]
    while waiting:
        one = waiting.pop(0)
        if one.folder.name in found:
            continue
        facts = _facts(one, uses, accepted, checksums)
        found[one.folder.name] = facts
        waiting += [store.named(parent.partition("@")[0]) for parent in facts["parents"].values()]
    checksums.keep()
    result, *ancestors = found.values()
    return {**result, "ancestors": ancestors}


def _uses(store: Store) -> dict[str, list[dict[str, str]]]:
    """For every entry the recipes that lead to it, and since when."""
    found: dict[str, list[dict[str, str]]] = {}
    for recipe, stages in store.recipes().items():
        for stage, entry in stages.items():
            since = (store.runs / recipe / stage).lstat().st_mtime
            when = datetime.fromtimestamp(since).astimezone().isoformat(timespec="seconds")
            found.setdefault(entry.folder.name, []).append({"recipe": recipe, "stage": stage, "since": when})
    return found


def _facts(
    entry: Entry,
    uses: Mapping[str, list[dict[str, str]]],
    accepted: Mapping[str, Mapping[str, Any]],
    checksums: Checksums,
) -> dict[str, Any]:
    if not (entry.folder / RECORD).is_file():
        return {"entry": entry.folder.name, "state": "absent", "parents": {}}
    try:
        record = entry.record
    except DamagedError as error:
        return {"entry": entry.folder.name, "state": "damaged", "why": str(error), "parents": {}}
    versions, machine = record.get("versions") or {}, record.get("machine") or {}
    name = entry.folder.name
    others = [one for one in uses.get(name, []) if one["recipe"] != record.get("recipe")]
    return {
        "entry": name,
        "stage": record.get("stage"),
        "recipe": record.get("recipe"),
        "kind": record.get("kind"),
        "state": entry.state,
        "fingerprint": record.get("fingerprint"),
        "result": read_seal(entry.folder).get("result") if (entry.folder / COMPLETE).is_file() else None,
        "folder": str(entry.folder),
        "seed": record.get("seed"),
        "started": record.get("started"),
        "seconds": record.get("seconds"),
        "flops": record.get("flops"),
        "versions": versions,
        "changed": _changed(record, versions),
        "machine": {key: machine[key] for key in _MACHINE if key in machine},
        "processes": record.get("processes"),
        "moved": record.get("moved") or [],
        "data": [_data(written, record, checksums) for written in record.get("outside") or {}],
        "parents": dict(record.get("parents") or {}),
        "reused_by": others,
        "accepted": [
            {"fingerprint": new, **said} for new, said in accepted.items() if said.get("entry") == name
        ],
    }


def _changed(record: Mapping[str, Any], versions: Mapping[str, Any]) -> list[str]:
    """What of the code that made a result is different now."""
    found = []
    code = versions.get("code")
    if isinstance(code, Mapping):
        now = package_code()
        parts = [part for part in dict.fromkeys([*code, *now]) if code.get(part) != now.get(part)]
        found += [f"trivium.{part}" for part in parts]
    own, _, _ = str(record.get("kind_from", "")).rpartition(":")
    if own:
        now_there = checksum(own) if Path(own).is_file() else None
        if record.get("code") not in (None, now_there):
            found.append(own)
    return found


def _data(written: str, record: Mapping[str, Any], checksums: Checksums) -> dict[str, Any]:
    """One thing from outside the recipe: where it lay, its checksum then, and whether it is the same now."""
    place = str(record["outside"][written])
    then = (record.get("data") or {}).get(written)
    found: dict[str, Any] = {"written": written, "place": place, "fingerprint": then}
    repository, at, revision = place.partition("@")
    if at and repository.count("/") == 1 and not Path(place).exists():
        return {**found, "revision": revision}
    if written.startswith("world:"):
        return found
    from trivium.recipe.outside import content_fingerprint, files_behind, locate

    path = locate(place, Path())
    if path is None:
        return {**found, "state": "not there any more"} if Path(place).is_absolute() else found
    try:
        files = [{"path": str(file), "checksum": checksums.of(file)} for file in files_behind(path)]
        same = content_fingerprint(place, Path(), checksums) == then
    except (TriviumError, OSError) as error:
        return {**found, "state": f"cannot be read ({error})"}
    return {**found, "files": files, "state": "unchanged" if same else "changed since"}


def text(found: Mapping[str, Any]) -> str:
    """The same for a terminal."""
    parts = _lines(found)
    for ancestor in found["ancestors"]:
        parts += ["", *_lines(ancestor)]
    return "\n".join(hanging(part, 12) for part in parts)


def _lines(one: Mapping[str, Any]) -> list[str]:
    head = f"{one['entry']} ({one['state']})"
    if "stage" not in one:
        return [head, *([f"  {one['why']}"] if "why" in one else [])]
    cost = [duration(one["seconds"])] if one["seconds"] else []
    cost += [f"{short(one['flops'])} FLOPs"] if one["flops"] else []
    versions, machine = one["versions"], one["machine"]
    code = f"trivium {versions.get('trivium')}, {one['kind']} version {versions.get('stage')}"
    changed = f"; changed since: {', '.join(one['changed'])}" if one["changed"] else ""
    where = [str(machine[key]) for key in ("device_name", "kernels") if machine.get(key)]
    made = f"{one['started']} by {one['recipe']}/{one['stage']}"
    lines = [
        head,
        f"  made      {', '.join([made, *cost])}",
        f"  code      {code}{changed}",
        f"  machine   {', '.join(where)}",
    ]
    lines += [f"  resumed   {sentence}" for sentence in one["moved"]]
    for data in one["data"]:
        lines += _data_lines(data)
    lines += [f"  from      {written}: {entry}" for written, entry in one["parents"].items()]
    for use in one["reused_by"]:
        lines.append(f"  reused    by {use['recipe']}/{use['stage']} since {use['since']}")
    for said in one["accepted"]:
        lines.append(
            f"  accepted  for {said['fingerprint']} by {said['by']} on {said['when']}: {said['because']}"
        )
    return lines


def _data_lines(data: Mapping[str, Any]) -> list[str]:
    after = f"commit {data['revision']}" if "revision" in data else f"fingerprint {data['fingerprint']}"
    state = f" ({data['state']})" if data.get("state", "unchanged") != "unchanged" else ""
    lines = [f"  data      {data['written']}: {after}{state}"]
    files = data.get("files", [])
    lines += [f"            {file['path']} {file['checksum']}" for file in files[:SHOWN_FILES]]
    if len(files) > SHOWN_FILES:
        lines.append(f"            and {len(files) - SHOWN_FILES} more (--json names all)")
    return lines
