"""Saved states: written whole beside the training, checked when read, named when damaged.

    step-000000040/state.json           plain facts, checksums of the files beside it, a seal over all of this
                   tensors.safetensors  all tensors; of a divided model tensors-00001-of-00008.safetensors ...

Of a divided model each process writes its own parts, and the folder takes its name when all have.
"""

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import part_of, remove_parts, save_tensors, whole_folder
from trivium.kit.numbers import number
from trivium.kit.processes import all_reduce_sum, broadcast, everyone, world
from trivium.kit.seals import read_sealed, write_sealed
from trivium.learn.holders import is_divided
from trivium.learn.pieces import SavedTensors, check_parts, file_of, offsets_of, own_parts, write_parts

TENSORS = "tensors.safetensors"
FACTS = "state.json"


@dataclass(frozen=True)
class State:
    """Everything a training needs to go on: plain facts and named tensors."""

    facts: dict[str, Any]
    tensors: SavedTensors


def write_state(folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one state; the folder appears only once everything in it is on disk."""
    with whole_folder(folder) as beside:
        found = save_tensors(beside / TENSORS, dict(tensors))
        write_sealed(beside / FACTS, {**facts, "checksum": found})


def read_state(folder: Path) -> State:
    """Read a state, or name the damaged file; each of several processes compares its share of the files."""
    if not (folder / FACTS).is_file():
        raise DamagedError(f"{folder / FACTS} is missing.")
    facts = read_sealed(folder / FACTS)
    sums = facts.pop("checksums", None) or {TENSORS: facts.pop("checksum")}
    for name in sums:
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing.")
    here = world()
    for name in sorted(sums)[here.rank :: here.size]:
        check_parts(folder / name, sums[name])
    return State(facts, SavedTensors([folder / name for name in sorted(sums)]))


def place_of(place: str | int) -> tuple[str, int] | None:
    """`tokens=2M`, `step=1200` or a bare number of steps, as a unit and an amount; None for all else."""
    unit, _, amount = place.rpartition("=") if isinstance(place, str) else ("step", "", place)
    goal = number(amount)
    if (unit or "step") not in ("tokens", "step") or not isinstance(goal, int):
        return None
    return unit or "step", goal


def kept_place(place: str | int) -> tuple[str, int]:
    """A place whose model is kept, as a unit and an amount."""
    found = place_of(place)
    if found is None:
        raise TriviumError(f"checkpoint.at: '{place}' names no place; write tokens=2M or step=1200")
    return found


def _started(write: Callable[[], str]) -> Future[str]:
    """The write, begun in a thread of its own, for which the process waits before it ends."""
    thread = ThreadPoolExecutor(1)
    future = thread.submit(write)
    thread.shutdown(wait=False)
    return future


def _said(failure: BaseException | None) -> str:
    """What went wrong, for the other processes."""
    return "" if failure is None else str(failure) or type(failure).__name__


class Checkpoints:
    """The last few states of a training, written by a thread while the training goes on.

    Where there are several processes, all of them call each method together.
    """

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.keep = keep
        self.say = say
        self.writing: Future[str] | None = None
        self.complete: Callable[[list[str]], None] | None = None
        """Makes a state of what all processes wrote, where one of them cannot write it alone."""
        remove_parts(folder)

    def steps(self) -> list[int]:
        """The steps of the states on disk, oldest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def latest(self) -> State | None:
        """The newest state that is whole, with a word about every newer one that is not."""
        steps = broadcast(self.steps())
        for step in reversed(steps):
            state, damage = None, ""
            try:
                state = read_state(self.path(step))
                if state.facts.get("step", step) != step:
                    raise DamagedError(f"{self.path(step)} holds the state after step {state.facts['step']}.")
            except DamagedError as error:
                damage = str(error)
            if not (damages := [one for one in everyone(damage) if one]):
                return state
            before = "The state before it is used." if step != steps[0] else "No state is left before it."
            if world().leads:
                self.say(f"{damages[0]} {before}")
                shutil.rmtree(self.path(step))
        return None

    def save(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, wait: bool) -> None:
        """Write a state; without `wait` from a copy, in a thread, so that training goes on meanwhile."""
        self.finish()
        here, parts = world(), own_parts(tensors)
        # Every process writes a file where the first has not all there is.
        has_parts = any(is_divided(one) for one in tensors.values()) or bool(parts and not here.leads)
        several = any(everyone(has_parts))
        offsets = offsets_of(tensors, parts)
        if not wait:
            parts = {name: part.to("cpu", copy=True) for name, part in parts.items()}
        if several:
            mine = part_of(self.path(step)) / file_of(here.rank, here.size)
            self.complete = partial(self._complete, step, facts)
            self.writing = _started(partial(write_parts, mine, parts, offsets))
        else:
            self.complete, self.writing = None, _started(partial(self._write, step, facts, parts))
        if wait:
            self.finish()

    def settle(self) -> None:
        """Finish the write under way if every process has written its parts; otherwise training goes on."""
        if self.writing is not None and not all_reduce_sum(float(not self.writing.done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the write under way; what went wrong in it, in whichever process, is raised in all."""
        writing, self.writing = self.writing, None
        if writing is None:
            return
        failure = writing.exception()
        checksum = "" if failure is not None else writing.result()
        sums, failures = zip(*everyone((checksum, _said(failure))), strict=True)
        if self.complete is not None and not any(failures):
            # What is left is the first process's work, and may fail as well.
            if world().leads:
                try:
                    self.complete(list(sums))
                except BaseException as error:
                    failure = error
            failures = tuple(everyone(_said(failure)))
        if failure is not None:
            raise failure
        if any(failures):
            raise TriviumError(next(filter(None, failures)))

    def _write(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
        """Write a state that the first process has whole."""
        if world().leads:
            if not self.path(step).exists():
                write_state(self.path(step), facts, tensors)
            self._remove_old()
        return ""

    def _complete(self, step: int, facts: Mapping[str, Any], sums: list[str]) -> None:
        """Make a state of the files that all processes have written."""
        names = {file_of(rank, len(sums)): one for rank, one in enumerate(sums)}
        with whole_folder(self.path(step), part_of(self.path(step))) as beside:
            write_sealed(beside / FACTS, {**facts, "checksums": names})
        self._remove_old()

    def _remove_old(self) -> None:
        """Only now that a new state is whole may an old one go."""
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))

    def clear(self) -> None:
        """Remove all states: the training is over and its result is saved."""
        self.finish()
        shutil.rmtree(self.folder, ignore_errors=True)
