"""What this machine was measured to do: by `doctor`, and by every stage that ended here.

`runs/store/machine.json` holds it, by device: the numbers of `doctor`, and for each kind of stage the last
results with their FLOPs, seconds, size of model and peak memory, and what the formula had said where they
were planned. A plan for `here` starts from them: what stages of a kind took of what the formula said corrects
it for the next. FLOP/s would not do: generation decides the time of some kinds, attention that of others.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from trivium.kit import machine as hardware
from trivium.kit.files import read_object, write_json
from trivium.lab.planner.catalogue import Machine, this_machine
from trivium.pipeline.store import Store

FILE = "machine.json"
FORMULA = 3
"""Raised when the planner's formula of time changes: what an earlier one said corrects no plan."""
KEPT = 12
"""Results kept of a kind."""
NEAREST = 3
"""Of how many results, those nearest in size, the median is taken."""


def device_of(record: Mapping[str, Any]) -> str:
    """Which device a record is about; another number of cores is another machine."""
    return f"{record['device_name']}, {record['cores']} cores, {record['device']}"


def known(store: Path) -> dict[str, Any]:
    """Everything in the file, by device."""
    path = store / FILE
    return dict(read_object(path)) if path.is_file() else {}


def of_this(store: Path) -> dict[str, Any]:
    """What is known of this machine."""
    here = hardware.describe()
    found: dict[str, Any] = known(store).get(device_of(vars(here)), {})
    return found


def note(store: Path, record: Mapping[str, Any], plan: Path | None = None) -> None:
    """Keep what a stage that ended took, if it computed anything, and what the recipe's plan had said."""
    if not record.get("seconds") or not record.get("machine"):
        return
    parameters = (record.get("summary") or {}).get("parameters") or record.get("planned_parameters")
    result = {
        "flops": record.get("flops") or 0.0, "seconds": record["seconds"], "parameters": parameters,
        "peak_memory": record.get("peak_memory"), "stage": record["stage"], "started": record.get("started"),
        "formula_seconds": _formula(record, plan), "formula": FORMULA,
    }  # fmt: skip
    everything = known(store)
    mine = everything.setdefault(device_of(record["machine"]), {})
    kind = mine.setdefault("stages", {}).setdefault(record["kind"], [])
    others = [one for one in kind if one["started"] != result["started"]]
    kind[:] = [*others[-(KEPT - 1) :], result]
    write_json(store / FILE, everything)


def keep(store: Path, numbers: Mapping[str, Any]) -> None:
    """Keep what `doctor` measured."""
    everything = known(store)
    device = device_of(vars(hardware.describe()))
    everything[device] = {**everything.get(device, {}), **numbers}
    store.mkdir(parents=True, exist_ok=True)
    write_json(store / FILE, everything)


def _formula(record: Mapping[str, Any], plan: Path | None) -> float | None:
    """What the formula said of this very result, if it was planned before it was made whole."""
    if plan is None or not plan.is_file():
        return None
    planned = read_object(plan).get(record["stage"], {})
    same = str(planned.get("entry", "")).endswith(f"-{record['fingerprint']}")
    seconds = planned.get("formula_seconds") if same else None
    return float(seconds) if seconds else None


def corrections(stages: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, float]:
    """By kind: the median over the results whose models are nearest in size to what is planned."""
    found = {}
    for kind, results in stages.items():
        rated = [one for one in results if one.get("formula_seconds") and one.get("formula") == FORMULA]
        if not rated:
            continue
        rated.reverse()
        size = sizes.get(kind)
        if size:
            rated.sort(key=lambda one: abs(math.log10((one["parameters"] or size) / size)))
        found[kind] = median(one["seconds"] / one["formula_seconds"] for one in rated[:NEAREST])
    return found


def here(store: Store, sizes: Mapping[str, int]) -> Machine:
    """This machine as far as it is known, for stages whose models have these sizes."""
    _learn_from(store)
    mine = of_this(store.folder)
    return this_machine({**mine, "corrections": corrections(mine.get("stages", {}), sizes)})


def _learn_from(store: Store) -> None:
    """Take over results that an earlier version left without a note."""
    if (store.folder / FILE).is_file():
        return
    for entry in sorted(store.entries(), key=lambda one: one.folder.name):
        if entry.state == "done":
            note(store.folder, entry.record)
