"""What a run would do and cost, and what it would refuse, before minutes are spent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trivium.kit import trackers
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.model.gguf.read import is_gguf
from trivium.model.hub import resolve
from trivium.pipeline import costs
from trivium.pipeline.checks import PREFERENCES, PROMPTED, Checked, check, check_disk, is_online
from trivium.pipeline.run import Run, prepare
from trivium.recipe import graph
from trivium.recipe.outside import locate

PACKED = ("pretrain", "midtrain", "sft", "distill")
VOCABULARY = 4096


@dataclass
class Planned:
    """A table of every stage, the numbers each will run with, and what a person should know."""

    rows: list[list[str]]
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    going: Run | None = None


def plan(
    recipe: str | Path,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
) -> list[list[str]]:
    """A table: every stage, whether it runs or is reused, what it may cost, and the numbers that follow."""
    return planned(recipe, runs, overrides, only).rows


def planned(
    recipe: str | Path,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
) -> Planned:
    """The plan; what a stage would refuse when its turn comes is refused here."""
    going = prepare(recipe, runs, overrides)
    chosen = graph.needed(going.nodes, only)
    trackers.check(going.recipe.track)
    checked = Checked()
    derived: dict[str, dict[str, Any]] = {}
    for name in chosen:
        derived[name] = _numbers(going, name, derived, checked)
    check_disk(going, derived)
    speed = costs.Speed(going)
    rows = [["stage", "kind", "will", "cost", "derived"]]
    total = 0.0
    for name in chosen:
        kind, will = going.nodes[name].stage.kind, _will(going, name)
        numbers = derived[name]
        seconds = 0.0
        if will != "reuse":
            read = sum(sum(one.characters) / max(1, len(one.rows)) * (one.documents or 0)
                       for one in checked.sources.get(name, {}).values())  # fmt: skip
            seconds = read / costs.READ_PER_SECOND
            seconds += speed.seconds(kind, numbers["flops"]) if numbers.get("flops") else 0.0
        total += seconds
        # Whatever is computed costs something: on a fast machine the least is shown, not nothing.
        cost = f"about {duration(max(seconds, 0.1))}" if seconds else ""
        rows.append([name, kind, will, cost, costs.told(numbers)])
    rows.append(
        ["all", "", "", f"about {duration(total)}", f"on this machine, {short(speed.peak)}FLOP/s at best"]
    )
    return Planned(rows, derived, checked.notes, going)


def _will(going: Run, name: str) -> str:
    state = going.entry(name).state
    return {"done": "reuse", "running": "wait", "cut off": "resume", "absent": "run"}[state]


def _numbers(
    going: Run, name: str, derived: Mapping[str, dict[str, Any]], checked: Checked
) -> dict[str, Any]:
    """The numbers that follow from a stage's settings, its parents and the first rows of its data."""
    node = going.nodes[name]
    stage: Any = node.stage
    numbers = {**costs.inherited(going, name, derived), **stage.plan(_inputs(going, name, derived))}
    everything = {**derived, name: numbers}
    if _will(going, name) != "reuse":
        stage.check_machine()
        check(going, name, everything, checked)
    known = costs.amounts(going, name, checked, everything, int(numbers.get("vocabulary", VOCABULARY)))
    if stage.kind == "corpus":
        numbers |= costs.corpus_numbers(going, name, known)
    if _will(going, name) == "reuse":
        return numbers
    if stage.kind in PACKED:
        before = numbers.get("tokens")
        numbers |= costs.training_numbers(going, name, known, numbers)
        if numbers.get("tokens") and "parameters" in numbers:
            own = (
                numbers["flops"] / before if numbers.get("flops") and before else 6.0 * numbers["parameters"]
            )
            numbers["flops"] = own * numbers["tokens"]
        costs.check_repeats(name, stage, numbers.get("epochs", {}))
    elif is_online(stage):
        problems = sum(looked.documents or 0 for looked in checked.sources.get(name, {}).values())
        length = float(np.concatenate([sizes for _, sizes in known.values()]).mean()) if known else 0.0
        numbers |= costs.online_numbers(stage, numbers, problems, length)
    elif stage.kind in PREFERENCES and known:
        pairs = sum(
            (looked.documents or 0) * (1 - stage.data[source].validation)
            for source, looked in checked.sources.get(name, {}).items()
            if source in stage.data
        )
        length = float(np.concatenate([sizes for _, sizes in known.values()]).mean())
        numbers |= costs.pair_numbers(stage, numbers, pairs, length)
    elif stage.kind in PROMPTED:
        problems = sum(looked.documents or 0 for looked in checked.sources.get(name, {}).values())
        length = float(np.concatenate([sizes for _, sizes in known.values()]).mean()) if known else 0.0
        numbers |= costs.policy_numbers(stage, numbers, problems, length)
    elif stage.kind == "synthesize":
        rows = sum(looked.documents or 0 for looked in checked.sources.get(name, {}).values())
        length = float(np.concatenate([sizes for _, sizes in known.values()]).mean()) if known else 0.0
        numbers |= costs.synthesis_numbers(stage, numbers, rows, length)
    _note_held_out(going, name, numbers, derived, checked)
    return numbers


def _note_held_out(
    going: Run, name: str, numbers: dict[str, Any], derived: Mapping[str, dict[str, Any]], checked: Checked
) -> None:
    """Say where nothing is held out, and refuse to measure on nothing."""
    node = going.nodes[name]
    stage: Any = node.stage
    counts: list[int | None] = []
    for source, looked in checked.sources.get(name, {}).items():
        portion = stage.data.get(source) if isinstance(getattr(stage, "data", None), dict) else None
        if stage.kind == "corpus":
            share = stage.validation
        elif portion is not None and stage.kind in (*PACKED, *PREFERENCES) and not is_online(stage):
            share = portion.validation
        else:
            continue
        counts.append(looked.held_out(share))
        if counts[-1] == 0 and share > 0:
            checked.notes.append(
                f"{name}: `validation: {share:g}` holds out none of the {looked.documents} documents of "
                f"{source}, so there is no validation loss; a share of "
                f"{min(0.5, max(0.1, 3 / len(looked.rows))):.2g} would hold some out"
            )
    for parent in node.parents.values():
        held = derived.get(parent.stage, {}).get("held out")
        if held is not None:
            counts.append(held)
    if stage.kind == "corpus" and counts:
        numbers["held out"] = None if None in counts else sum(count or 0 for count in counts)
    wants = "validation" in stage.model_fields_set and stage.kind in PACKED
    if wants and counts and all(count == 0 for count in counts):
        raise TriviumError(
            f"{name}: `validation` is asked for and nothing is held out of its data; hold out a larger share "
            "where the data is named, as in `validation: 0.1`."
        )


def _inputs(
    going: Run, name: str, derived: Mapping[str, dict[str, Any]]
) -> dict[str, Path | Mapping[str, Any]]:
    """For every thing a stage names its folder, or the planned numbers of what is not made yet."""
    node = going.nodes[name]
    inputs: dict[str, Path | Mapping[str, Any]] = {}
    for written, parent in node.parents.items():
        entry = going.entry(parent.stage)
        inputs[written] = entry.output if entry.state == "done" else derived[parent.stage]
    for written in node.outside:
        place = locate(written, going.recipe.base)
        is_model = place is not None and (place.is_dir() or is_gguf(place))
        inputs[written] = resolve(place) if place is not None and is_model else place or Path(written)
    return inputs
