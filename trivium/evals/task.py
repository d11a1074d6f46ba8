"""What a task is, and the shelf of tasks by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from trivium.evals.asking import Subject
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.statistics import Interval
from trivium.kit.errors import TriviumError


@dataclass
class Found:
    """What a task hands over: its items, and numbers that are no mean over them."""

    records: list[Record]
    whole: Mapping[str, Interval] = field(default_factory=dict)
    style: str | None = None
    """How it asked, where that is not how the model is asked elsewhere."""


Run = Callable[..., Found]


@dataclass(frozen=True)
class Task:
    """One skill: a sentence on what it measures, its headline numbers, and the function that asks."""

    name: str
    description: str
    headline: tuple[str, ...]
    run: Run

    def __call__(self, subject: Subject, settings: Settings, dials: Mapping[str, Any]) -> Found:
        """Ask; a dial the task does not have is an error that names those it has."""
        known = list(inspect.signature(self.run).parameters.values())[2:]
        named = [one for one in known if one.kind is not inspect.Parameter.VAR_KEYWORD]
        if len(named) == len(known):
            names = [one.name for one in named]
            for dial in dials:
                if dial not in names:
                    has = f"it has {', '.join(names)}" if names else "it has none of its own"
                    raise TriviumError(f"The task {self.name} has no dial '{dial}'; {has}.")
        for one in named:
            if one.default is one.empty and one.name not in dials:
                raise TriviumError(f"The task {self.name} needs `{one.name}`: {self.name}?{one.name}=...")
        return self.run(subject, settings, **dials)


_PLACES = {
    "bits": "bits:BITS",
    "facts": "knowledge:FACTS",
    "craft": "knowledge:CRAFT",
    "tongue": "knowledge:TONGUE",
    "calibration": "knowledge:CALIBRATION",
    "sums": "reasoning:SUMS",
    "sql": "reasoning:SQL",
    "instructions": "manners:INSTRUCTIONS",
    "format": "manners:FORMAT",
    "ending": "manners:ENDING",
    "flattery": "flattery:FLATTERY",
    "passkey": "passkey:PASSKEY",
    "positions": "context:POSITIONS",
    "forgetting": "bits:FORGETTING",
    "gsm8k": "published:GSM8K",
    "svamp": "published:SVAMP",
    "humaneval": "published:HUMANEVAL",
    "own": "published:OWN",
}
ALSO_CALLED = {"math": "sums", "ledger": "sql", "chronicle": "passkey", "chat": "instructions"}


def task_names() -> list[str]:
    """Every task there is."""
    return list(_PLACES)


def task(name: str) -> Task:
    """The task of this name."""
    place = _PLACES.get(ALSO_CALLED.get(name, name))
    if place is None:
        raise TriviumError(f"There is no task called '{name}'; there are {', '.join(_PLACES)}.")
    module, attribute = place.split(":")
    found: Task = getattr(import_module(f"trivium.evals.{module}"), attribute)
    return found
