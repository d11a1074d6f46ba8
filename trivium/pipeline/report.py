"""The page that ends a recipe: what its stages cost and, where the recipe asks for it, what they taught."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.evals.settings import Settings
from trivium.evals.task import MODELS, placed, placed_search
from trivium.kit.progress import Progress
from trivium.lab.asked import note
from trivium.lab.compare import compare, summary_table
from trivium.lab.gather import Seen, world_sources
from trivium.lab.own_data import OWN_LIMIT, own_tasks
from trivium.stages.parts.stage import PART

if TYPE_CHECKING:
    from trivium.pipeline.run import Run


def _made(prepared: Run, option: str, name: str) -> str:
    """Where the thing that a task names lies: a reward model may be a stage of the recipe."""
    is_stage = option in MODELS and name in prepared.nodes
    return str(prepared.entry(name).output.absolute()) if is_stage else name


def report(prepared: Run) -> tuple[Path, list[list[str]]]:
    """Write `report.html` beside the recipe's stages; returns its place and a table for a terminal."""
    recipe, place = prepared.recipe, prepared.store.runs / prepared.recipe.name
    stages = [Seen(name, prepared.entry(name).folder) for name in prepared.nodes]
    names: list[str] = []
    on, asking = [], None
    if recipe.report is not None:
        chosen = recipe.report.compare or [
            stage.name for stage in stages if stage.model is not None and PART not in stage.name
        ]
        names = [f"{recipe.name}/{name}" for name in chosen]
        place_of = partial(_made, prepared)
        on = [placed(spec, place_of) for spec in recipe.report.on]
        asking = placed_search(recipe.report.asking, place_of)
    elif not world_sources(stages) and own_tasks(stages):
        # nothing was asked for: what the person's own data can say is said, of every model
        names = [
            f"{recipe.name}/{one.name}" for one in stages if one.model is not None and PART not in one.name
        ]
        asking = Settings(limit=OWN_LIMIT)
    with Progress("report") as progress:
        found = compare(
            names, runs=prepared.store.runs, to=place / "report.html", on=on, settings=asking,
            title=recipe.name, stages=stages, say=progress.say,
        )  # fmt: skip
    if names:
        asked = found["collected"]
        note(place, asked["on"], Settings.model_validate(asked["asking"]))
    return place / "report.html", summary_table(found) if names else []
