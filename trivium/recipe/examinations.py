"""`decontaminate: {against: recipe}`: everything that the recipe itself measures on, by name."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from trivium.curate.steps.decontaminate import RECIPE, Decontaminate
from trivium.evals.examined import examined
from trivium.kit.errors import TriviumError
from trivium.stages.parts.stage import Stage


def with_examinations(
    stages: Mapping[str, Stage], report: Any, place: Callable[[list[str]], str]
) -> tuple[dict[str, Stage], list[str]]:
    """The stages with `against: recipe` replaced by what it means; and what cannot be searched for.

    What is made of a text that is decontaminated in this way is left out, since it comes later.
    """
    if RECIPE in stages or not any(_asking(stage) for stage in stages.values()):
        return dict(stages), []
    parents = {name: _named(stage) & stages.keys() for name, stage in stages.items()}

    @cache
    def later(name: str) -> bool:
        """Whether a stage is made of what `against: recipe` has cleaned, or cleans it."""
        above, waiting = {name}, [name]
        while waiting:
            for parent in parents[waiting.pop()] - above:
                above.add(parent)
                waiting.append(parent)
        return any(_asking(stages[one]) for one in above)

    known = [found for stage in stages.values() if (found := stage.examines()) is not None]
    if report is not None:
        known.append(examined(report.on, report.asking))
    sets: dict[str, dict[str, Any]] = {}
    for one in (one for some in known for one in some.sets):
        made = one.path in stages
        if not made or (stages[one.path].produces == "data" and not later(one.path)):
            sets.setdefault(repr(one), one.model_dump(mode="json", by_alias=True))
    notices = {
        f"`against: recipe` cannot search for the questions of `{task}`; name a file of them beside it."
        for some in known
        for task in some.unknown
    }
    replaced: dict[str, Stage] = {}
    for name, stage in stages.items():
        if steps := _asking(stage):
            if not sets:
                where = place(["stages", name, "steps", str(steps[0])])
                raise TriviumError(
                    f"{where}: `against: recipe` is what the recipe "
                    "measures on, and nothing of that is there before this stage: add an `evaluate` stage or "
                    "`report: {on: [...]}`, or name files in `against`."
                )
            replaced[name] = _replaced(stage, steps, [sets[key] for key in sorted(sets)])
    return {**stages, **replaced}, sorted(notices)


def _asking(stage: Stage) -> list[int]:
    """The places of the steps of a stage that say `against: recipe`."""
    steps = getattr(stage, "steps", None)
    return [
        place
        for place, step in enumerate(steps if isinstance(steps, list) else [])
        if isinstance(step, Mapping) and RECIPE in step.get(Decontaminate.name, {}).get("against", [])
    ]


def _replaced(stage: Stage, places: list[int], sets: list[dict[str, Any]]) -> Stage:
    steps: list[Any] = list(vars(stage)["steps"])
    for place in places:
        said = steps[place][Decontaminate.name]
        against = [one for one in said["against"] if one != RECIPE] + sets
        steps[place] = {Decontaminate.name: {**said, "against": against}}
    return stage.model_copy(update={"steps": steps})


def _named(stage: Stage) -> set[str]:
    try:
        return {one.name.partition("@")[0] for one in stage.references()}
    except TriviumError:
        # The graph says so with its place.
        return set()
