"""How several processes share a stage whose recipe leaves that open: what fits, by the planner's memory."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from trivium.kit.errors import TriviumError
from trivium.kit.processes import world
from trivium.lab.planner.estimate import Estimate, estimate
from trivium.lab.planner.layout import candidates
from trivium.lab.planner.work import Job
from trivium.learn.settings import GROUPS, Parallel
from trivium.pipeline.plan import planned, write_plan


class Chosen(NamedTuple):
    """A layout, and why it is this one."""

    parallel: Parallel
    why: str


def layouts_for(
    recipe: str | Path, runs: str | Path, overrides: Iterable[str] | Mapping[str, Any], only: Iterable[str]
) -> dict[str, Chosen]:
    """A layout for each training of a recipe that does not name one; the plan of all is kept beside them.

    What cannot be planned is left to the training, which divides nothing that half of the memory holds."""
    size = world().size
    node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    try:
        found = planned(recipe, runs, overrides, only, on=f"here:{size}", node=node)
    except TriviumError:
        return {}
    write_plan(found)
    return {one.job.stage: _chosen(one) for one in found.estimates if _is_open(one.job)}


def _is_open(job: Job) -> bool:
    return bool(job.trained_parameters) and job.config is not None and job.parallel is None


def _chosen(best: Estimate) -> Chosen:
    """Whole copies on every process where they fit, since nothing is simpler; else what the plan found."""
    machine, layout = best.machine, best.layout
    whole = replace(best.job, parallel=Parallel(shard=1))
    wholes = [estimate(whole, machine, one) for one in candidates(whole, machine.devices, machine.node)]
    room = f"of {_gib(machine.memory)} a process"
    least = min((one.memory.total for one in wholes), default=best.memory.total)
    if any(one.fits for one in wholes) or not wholes or layout.devices != machine.devices:
        return Chosen(Parallel(shard=1), f"a whole copy needs {_gib(least)} {room}")
    degrees = {name: getattr(layout, name) for name in ("shard", *GROUPS)}
    parallel = Parallel(**degrees)
    why = f"{layout.described()} needs {_gib(best.memory.total)} {room}, a whole copy {_gib(least)}"
    return Chosen(parallel, why if best.fits else f"{why}; nothing fits")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
