"""Saved states: written whole beside the training, checked when read, named when damaged."""

import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import load_tensors, remove_parts, save_tensors, whole_folder
from trivium.kit.numbers import number
from trivium.kit.seals import read_sealed, write_sealed

TENSORS = "tensors.safetensors"
FACTS = "state.json"


@dataclass(frozen=True)
class State:
    """Everything a training needs to go on: plain facts and named tensors."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def write_state(folder: Path, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one state; the folder appears only once everything in it is on disk."""
    with whole_folder(folder) as beside:
        found = save_tensors(beside / TENSORS, dict(tensors))
        write_sealed(beside / FACTS, {**facts, "checksum": found})


def read_state(folder: Path) -> State:
    """Read a state, or name the file that is damaged."""
    for name in (FACTS, TENSORS):
        if not (folder / name).is_file():
            raise DamagedError(f"{folder / name} is missing.")
    facts = read_sealed(folder / FACTS)
    return State(facts, load_tensors(folder / TENSORS, facts.pop("checksum")))


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


class Checkpoints:
    """The last few states of a training, written by a thread while the training goes on."""

    def __init__(self, folder: Path, keep: int, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.keep = keep
        self.say = say
        self.writing: threading.Thread | None = None
        self.failure: BaseException | None = None
        remove_parts(folder)

    def steps(self) -> list[int]:
        """The steps of the states on disk, oldest first."""
        names = [path.name.removeprefix("step-") for path in self.folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:09d}"

    def latest(self) -> State | None:
        """The newest state that is whole, with a word about every newer one that is not."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                state = read_state(self.path(step))
                if state.facts.get("step", step) != step:
                    raise DamagedError(f"{self.path(step)} holds the state after step {state.facts['step']}.")
                return state
            except DamagedError as error:
                before = "The state before it is used." if step != steps[0] else "No state is left before it."
                self.say(f"{error} {before}")
                shutil.rmtree(self.path(step))
        return None

    def save(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, wait: bool) -> None:
        """Write a state; without `wait` from a copy, in a thread, so that training goes on meanwhile."""
        self.finish()
        if wait:
            self._write(step, facts, tensors)
            return
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self.writing = threading.Thread(target=self._write_quietly, args=(step, facts, copies))
        self.writing.start()

    def finish(self) -> None:
        """Wait for the write under way; what went wrong in it is raised here."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _write_quietly(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        try:
            self._write(step, facts, tensors)
        except BaseException as error:
            self.failure = error

    def _write(self, step: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        if not self.path(step).exists():
            write_state(self.path(step), facts, tensors)
        # Only now that the new state is whole may an old one go.
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))

    def clear(self) -> None:
        """Remove all states: the training is over and its result is saved."""
        self.finish()
        shutil.rmtree(self.folder, ignore_errors=True)
