"""Why a stage would run again, field by field; and accepting its earlier result when only code changed."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from trivium import __version__
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.machine import device_class
from trivium.pipeline.accepted import note
from trivium.pipeline.run import Run, prepare
from trivium.pipeline.store import Entry, now
from trivium.recipe.graph import needed

SHOWN = 60


def reasons(prepared: Run, name: str) -> list[str]:
    """One line for every difference between a stage as it reads now and the result it had before."""
    node, entry = prepared.nodes[name], prepared.entry(name)
    if entry.state == "done":
        return ["done before"]
    if entry.state in ("running", "cut off"):
        return [f"{entry.state}; the run goes on from there"]
    before = earlier(prepared, name)
    if before is None:
        return ["has not run yet"]
    try:
        found = [sentence for _, sentence in differences(prepared, name, before)]
    except DamagedError as error:
        return [str(error)]
    return found or [f"another fingerprint: {before.folder.name} -> {node.entry}"]


Difference = tuple[Literal["setting", "new setting", "parent", "data", "code", "device"], str]


def differences(prepared: Run, name: str, before: Entry) -> list[Difference]:
    """Everything in which a stage as it reads now differs from an earlier result of it."""
    node, record = prepared.nodes[name], before.record
    settings = record.get("settings") or {}
    found: list[Difference] = []
    for key, sentence in _changed(settings, node.stage.settings(), node.stage.unaffecting):
        found.append(("setting" if key.partition(".")[0] in settings else "new setting", sentence))
    for written, parent in node.parents.items():
        was = str((record.get("parents") or {}).get(written, "")).partition("@")[0]
        now = prepared.entry(parent.stage).folder.name
        if was and was != now:
            found.append(("parent", f"{written} is another result: {was} -> {now}"))
    for written, fingerprint in node.outside.items():
        content = (record.get("data") or {}).get(written)
        if content is not None and content != fingerprint:
            found.append(("data", f"the content of {written} changed"))
    version = (record.get("versions") or {}).get("stage")
    if version != node.stage.version:
        found.append(("code", f"the stage's own version: {version} -> {node.stage.version}"))
    code = record.get("code")
    if node.stage.code is not None and code is not None and code != node.stage.code:
        found.append(("code", f"the code of {node.stage.file} changed"))
    device = str((record.get("machine") or {}).get("device", "")).partition(":")[0]
    if node.stage.computes and device and device != device_class():
        found.append(("device", f"the device: {device} -> {device_class()}"))
    return found


def earlier(prepared: Run, name: str) -> Entry | None:
    """The result that the recipe's link leads to."""
    link = prepared.store.runs / prepared.recipe.name / name
    return Entry(link.resolve()) if link.exists() else None


def _changed(
    before: Any, now: Any, unaffecting: frozenset[str], place: str = ""
) -> Iterator[tuple[str, str]]:
    """The settings that differ, each with a sentence; what cannot change the result is left out."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in dict.fromkeys([*before, *now]):
            if not place and key in unaffecting:
                continue
            inside = f"{place}.{key}" if place else str(key)
            yield from _changed(before.get(key), now.get(key), frozenset(), inside)
    elif before != now:
        yield place, f"{place}: {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def accept(
    recipe: str | Path,
    stage: str,
    because: str,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
) -> str:
    """Let the result that a stage had before a change of code stand for it; a sentence that says so."""
    prepared = prepare(recipe, runs, overrides)
    needed(prepared.nodes, [stage])
    node, entry = prepared.nodes[stage], prepared.entry(stage)
    if entry.state == "done":
        return f"{stage} is done as it reads now ({entry.folder.name}); there is nothing to accept."
    if entry.state == "running":
        raise TriviumError(f"{stage} is being made; stop that run, or wait for it.")
    before = earlier(prepared, stage)
    if before is None or before.state != "done":
        raise TriviumError(
            f"{stage} has no finished result of {prepared.recipe.name} under {runs} to accept; run it."
        )
    before.verify(before.output)
    found = differences(prepared, stage, before)
    other = [sentence for what, sentence in found if what not in ("code", "new setting")]
    if other:
        raise TriviumError(
            f"{stage} differs from {before.folder.name} in more than code ({'; '.join(other)}); only a change"
            " of code can be accepted."
        )
    facts = {
        "stage": stage,
        "when": now(),
        "differences": [sentence for _, sentence in found],
        "versions": {
            "before": before.record.get("versions") or {},
            "now": {"trivium": __version__, "stage": node.stage.version},
        },
    }
    note(prepared.store.folder, node.fingerprint, before.folder.name, because, facts)
    return f"{stage}: {before.folder.name} stands for {node.entry} from now on."
