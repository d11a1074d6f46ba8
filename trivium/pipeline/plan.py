"""What a run would do and cost, before it does it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trivium.kit import machine
from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.model.hub import resolve
from trivium.pipeline.run import Run, prepare
from trivium.recipe import graph
from trivium.recipe.outside import locate

# The share of the matrix peak that small models reach on two cores and large ones on a GPU, roughly.
_REACHED = 0.5


def plan(
    recipe: str | Path,
    runs: str | Path = "runs",
    overrides: Iterable[str] | Mapping[str, Any] = (),
    only: Iterable[str] = (),
) -> list[list[str]]:
    """A table: every stage, whether it runs or is reused, the numbers that follow, and what it may cost."""
    going = prepare(recipe, runs, overrides)
    chosen = graph.needed(going.nodes, only)
    derived = {name: _derived(going, name) for name in chosen}
    peak = machine.matmul_peak(0.3)
    rows = [["stage", "kind", "will", "cost", "derived"]]
    total = 0.0
    for name in chosen:
        state = going.entry(name).state
        if state != "done":
            going.nodes[name].stage.check_machine()
        will = {"done": "reuse", "running": "wait", "cut off": "resume", "absent": "run"}[state]
        seconds = derived[name].get("flops", 0) / (peak * _REACHED) if will != "reuse" else 0.0
        total += seconds
        cost = f"about {duration(seconds)}" if seconds else ""
        rows.append([name, going.nodes[name].stage.kind, will, cost, _told(derived[name])])
    rows.append(["all", "", "", f"about {duration(total)}", f"on this machine, {short(peak)}FLOP/s at best"])
    return rows


def _derived(going: Run, name: str) -> dict[str, Any]:
    """The numbers that follow from a stage's settings and its parents', made or only planned."""
    node = going.nodes[name]
    inputs: dict[str, Path | Mapping[str, Any]] = {}
    for written, parent in node.parents.items():
        entry = going.entry(parent.stage)
        inputs[written] = entry.output if entry.state == "done" else _derived(going, parent.stage)
    for written in node.outside:
        place = locate(written, going.recipe.base)
        inputs[written] = resolve(place) if place is not None and place.is_dir() else place or Path(written)
    return node.stage.plan(inputs)


def _told(numbers: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {short(value) if isinstance(value, (int, float)) else value}"
        for name, value in numbers.items()
        if not isinstance(value, Mapping)
    )
