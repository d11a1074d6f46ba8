"""How the report of a recipe asks its models, so that every verb asks them in the same way."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.evals.settings import Settings, TaskSpec, named
from trivium.evals.task import ALSO_CALLED
from trivium.kit.files import read_object, write_json
from trivium.kit.seals import read_record

NOTE = "asked.json"
"""Where a recipe's folder keeps how its report asks."""


@dataclass(frozen=True)
class Asked:
    """What the report of a recipe asks, and how."""

    recipe: str
    on: list[TaskSpec]
    asking: Settings

    def as_the_report_asks(self, spec: TaskSpec, without: Collection[str] = ()) -> TaskSpec:
        """A task named without options, with those that the report gives it; any other as it is written.

        `without` names options of the report that are not taken over.
        """
        name, options = named(spec)
        if options:
            return spec
        name = ALSO_CALLED.get(name, name)
        found = next((one for one in self.on if self._is(one, name)), spec)
        if isinstance(found, Mapping):
            return {option: value for option, value in found.items() if option not in without}
        return found

    def otherwise(self, spec: TaskSpec) -> TaskSpec | None:
        """What the report asks instead, where a task is written with options of its own."""
        name, options = named(spec)
        found = next((one for one in self.on if self._is(one, ALSO_CALLED.get(name, name))), None)
        return found if options and found is not None and named(found)[1] != options else None

    @staticmethod
    def _is(spec: TaskSpec, name: str) -> bool:
        task = named(spec)[0]
        return ALSO_CALLED.get(task, task) == name


def note(folder: Path, on: Sequence[TaskSpec], asking: Settings) -> None:
    """Keep beside a recipe's results how its report asks."""
    tasks = [one if isinstance(one, str) else dict(one) for one in on]
    write_json(folder / NOTE, {"on": tasks, "asking": asking.model_dump(mode="json")})


def asked_of(stages: Iterable[Path], runs: Path) -> Asked | None:
    """How the report asks of the recipe that made all of these stages; None where there is no such recipe."""
    recipes = {_recipe(folder) for folder in stages}
    if len(recipes) != 1:
        return None
    recipe = recipes.pop()
    place = runs / str(recipe) / NOTE
    if recipe is None or not place.is_file():
        return None
    content = read_object(place)
    return Asked(recipe, list(content.get("on", [])), Settings.model_validate(content.get("asking", {})))


def _recipe(stage: Path) -> str | None:
    record: Mapping[str, Any] = read_record(stage)
    return record.get("recipe")


def written(spec: TaskSpec) -> str:
    """A task as the command line writes it: `sums?steps_low=2&samples=4`."""
    name, options = named(spec)
    listed = "&".join(f"{key}={_plain(value)}" for key, value in options.items())
    return f"{name}?{listed}" if listed else name


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
