"""What a recipe may say, and one sentence for what it may not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Union, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from trivium.data.sources import Source
from trivium.evals.settings import Settings as Asking
from trivium.evals.settings import TaskSpec
from trivium.evals.task import MODELS, checked_specs, placed, placed_search
from trivium.kit.errors import TriviumError, nearest
from trivium.kit.settings import Settings
from trivium.kit.trackers import Tracker
from trivium.recipe.complaints import sentence
from trivium.recipe.examinations import with_examinations
from trivium.recipe.experiment import FORECAST, PLAIN, Expanded, Experiment, Ladder, expand, forecast_between
from trivium.recipe.outside import check_world, is_elsewhere, locate
from trivium.recipe.read import Written, read
from trivium.recipe.renamed import Renaming
from trivium.stages import is_in_a_file, kind_from_file, kinds
from trivium.stages.parts.stage import Stage, part_of

ASKED = 100
"""How many questions of a task the report asks, unless said otherwise."""


class Report(Settings):
    """Whom the report asks and what: every model, and what fits their data, unless said otherwise."""

    compare: list[str] = []
    """The stages whose models are compared; all that make a model where it is left out."""
    on: list[str | dict[str, Any]] = []
    """The tasks; those that fit the training data where it is left out."""
    asking: Asking = Asking(limit=ASKED)
    """How the tasks are asked."""

    @field_validator("on")
    @classmethod
    def _known_tasks(cls, on: list[TaskSpec]) -> list[str | dict[str, Any]]:
        return checked_specs(on)

    @field_validator("asking", mode="before")
    @classmethod
    def _asking_little(cls, asking: Any) -> Any:
        """What is said of the asking leaves the number of questions as it is."""
        return {"limit": ASKED, **asking} if isinstance(asking, Mapping) else asking


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Recipe(Settings):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    """The name, under which results are linked in the runs folder."""
    seed: int = Field(default=1, ge=0)
    """The seed of every stage that has none of its own."""
    report: Report | None = None
    """What the report asks."""
    experiment: Experiment | None = None
    """Arms, seeds, measures and claims."""
    track: Annotated[
        list[Tracker], BeforeValidator(_listed, json_schema_input_type=Tracker | list[Tracker])
    ] = []
    """Where metrics are sent as they are logged; it says nothing of what a stage is, so it never counts."""

    @model_validator(mode="after")
    def _one_ending(self) -> _Recipe:
        if self.report is not None and self.experiment is not None:
            raise ValueError("an experiment ends in a table of its own; leave `report` or `experiment` out")
        return self


@dataclass(frozen=True)
class Recipe:
    """A valid recipe: its name, its stages in the order written, and where its paths start from."""

    name: str
    seed: int
    stages: Mapping[str, Stage]
    report: Report | None
    written: Written
    experiment: Experiment | None = None
    expanded: Expanded | None = None
    track: Sequence[Tracker] = ()
    notices: Sequence[str] = ()
    """What a person should know of how the recipe is written, such as settings with earlier names."""

    def meant(self, stage: str, written: str) -> str:
        """The stage that a name written in a stage stands for; in an experiment that of its arm and seed."""
        return written if self.expanded is None else self.expanded.meant[stage].get(written, written)

    def waits_for(self, stage: str) -> Sequence[str]:
        """Stages that come before this one although it reads nothing of theirs."""
        return () if self.expanded is None else self.expanded.after.get(stage, ())

    @property
    def base(self) -> Path:
        """The folder relative paths start from."""
        return self.written.path.parent


def load(name: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe and check every key and value in it."""
    kinds()
    renaming = Renaming()
    written = read(name, overrides, renaming.stages)
    written.content["stages"] = _with_kinds_from_files(written.content.get("stages"), written)
    model = _model()
    valid = _valid(model, written, written.content)
    if valid.name == "store":
        raise TriviumError(
            f"{written.place(['name'])} cannot be `store`, a folder of that name holds results."
        )
    valid.stages = _with_parts(valid.stages, written)
    if valid.experiment is None:
        for stage in valid.stages.values():
            stage.seed = valid.seed if stage.seed is None else stage.seed
        _check_compared(valid, written)
        stages, unknown = with_examinations(valid.stages, valid.report, written.place)
        _find_asked(valid, written)
        return Recipe(
            valid.name, valid.seed, stages, valid.report, written,
            track=valid.track, notices=[*renaming.notices(written), *unknown],
        )  # fmt: skip
    expanded, unknown = _expanded(valid, model, written, renaming)
    return Recipe(
        valid.name, valid.seed, expanded.stages, None, written,
        valid.experiment, expanded, valid.track, [*renaming.notices(written), *unknown],
    )  # fmt: skip


def _with_kinds_from_files(stages: Any, written: Written) -> Any:
    """The stages, each `kind: file.py:Class` replaced by the kind that the class names."""
    if not isinstance(stages, Mapping):
        return stages
    found = dict(stages)
    for name, stage in stages.items():
        if isinstance(stage, Mapping) and is_in_a_file(stage.get("kind")):
            try:
                kind = kind_from_file(stage["kind"], written.path.parent)
            except TriviumError as error:
                raise TriviumError(f"{written.place(['stages', str(name), 'kind'])}: {error}") from None
            found[name] = {**stage, "kind": get_args(kind.model_fields["kind"].annotation)[0]}
    return found


def _with_parts(stages: Mapping[str, Stage], written: Written) -> dict[str, Stage]:
    """The stages, each after those it is made of."""
    found: dict[str, Stage] = {}
    for name, stage in stages.items():
        try:
            found |= {part_of(name, part): one for part, one in stage.parts(name).items()}
        except TriviumError as error:
            raise TriviumError(f"{written.place(['stages', name])}: {error}") from None
        found[name] = stage
    return found


def _valid(model: type[BaseModel], written: Written, content: Mapping[str, Any]) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise TriviumError(sentence(error, model, written)) from None


def _check_compared(valid: Any, written: Written) -> None:
    """What the report asks has to be a stage of the recipe that makes a model."""
    able = [name for name, stage in valid.stages.items() if stage.produces == "model"]
    for number, name in enumerate(valid.report.compare if valid.report else []):
        if name not in able:
            hint = nearest(name, able) or f"; these do: {', '.join(able)}."
            place = written.place(["report", "compare", str(number)])
            raise TriviumError(f"{place}: `{name}` is no stage that makes a model{hint}")


def _find_asked(valid: Any, written: Written) -> None:
    """The files that the report's tasks read, seen from the recipe's folder, have to be there."""

    def found(setting: Sequence[str], option: str, name: str) -> str:
        if option in MODELS and name in valid.stages:
            return name
        at = locate(name, written.path.parent)
        place = written.place(["report", *setting])
        try:
            check_world(name, Source(path=name))
        except TriviumError as error:
            raise TriviumError(f"{place}: {error}") from None
        if at is None and not is_elsewhere(name):
            raise TriviumError(f"{place}: there is no `{name}`; write a path seen from the recipe.")
        return name if at is None else str(at)

    if valid.report is not None:
        specs = enumerate(valid.report.on)
        valid.report.on = [placed(spec, partial(found, ["on", str(number)])) for number, spec in specs]
        valid.report.asking = placed_search(valid.report.asking, partial(found, ["asking"]))


def _expanded(
    valid: Any, model: type[BaseModel], written: Written, renaming: Renaming
) -> tuple[Expanded, list[str]]:
    """The stages of every arm and seed, and notices; what is wrong in an arm is said of that arm."""
    arms: dict[str, Mapping[str, Stage]] = {PLAIN: valid.stages}
    experiment: Experiment = valid.experiment
    climbs = None if experiment.ladder is None else _climbing(experiment.ladder, valid.stages, written)
    if experiment.ladder is not None and climbs is not None:
        experiment.ladder.stage = climbs
        experiment.arms = dict(experiment.ladder.arms(climbs))
    for arm in experiment.arms:
        try:
            content = experiment.arm(arm, written.content)
            content["stages"] = renaming.stages(content["stages"], laid_over=True)
            content["stages"] = _with_kinds_from_files(content["stages"], written)
            arms[arm] = _with_parts(_valid(model, written, content).stages, written)
        except TriviumError as error:
            raise TriviumError(f"In the arm `{arm}`, {error}") from None
    for claim in experiment.claims:
        measure = experiment.measure[claim.on]
        for arm in filter(None, (claim.arm, claim.against, claim.control)):
            for stage in filter(None, (measure.stage, measure.since)):
                if stage not in arms[arm]:
                    place = written.place(["experiment", "measure", claim.on])
                    raise TriviumError(
                        f"{place}: the arm `{arm}` has no stage `{stage}`"
                        f"{nearest(stage, arms[arm]) or '; measure one it has.'}"
                    )
    unknown: dict[str, None] = {}

    def finished(stages: Mapping[str, Stage]) -> Mapping[str, Stage]:
        done, notices = with_examinations(stages, None, written.place)
        unknown.update(dict.fromkeys(notices))
        return done

    found = expand(arms, experiment.numbers(valid.seed), finished)
    if experiment.ladder is not None and climbs is not None:
        make = partial(Stage.kinds["forecast"], kind="forecast", seed=valid.seed)
        found = forecast_between(found, experiment.ladder, climbs, make)
    return found, list(unknown)


def _climbing(ladder: Ladder, stages: Mapping[str, Stage], written: Written) -> str:
    """The stage that a ladder trains in every size."""
    place = written.place(["experiment", "ladder"])
    if FORECAST in stages:
        raise TriviumError(f"{place}: a ladder adds a stage `{FORECAST}`; call the recipe's own otherwise.")
    try:
        return ladder.named(stages)
    except TriviumError as error:
        raise TriviumError(f"{place}: {error}") from None


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, from which editors complete and check.

    Kinds in files are in it once a recipe that names them was loaded; of others any setting is right.
    """
    schema = _model().model_json_schema(by_alias=True)
    # A kind of a file is written `file.py:Class` in a recipe, from whatever folder.
    written = {name: _ending(kind.file) for name, kind in kinds().items() if kind.file is not None}
    for one in schema["$defs"].values():
        kind = one.get("properties", {}).get("kind", {}).get("const")
        if kind in written:
            one["properties"]["kind"] = {"type": "string", "pattern": written[kind]}
    other: dict[str, Any] = {"type": "string", "pattern": r"\.py:\w+$"}
    if written:
        other["not"] = {"anyOf": [{"pattern": at} for at in written.values()]}
    [stage] = schema["properties"]["stages"]["patternProperties"].values()
    stage["oneOf"].append({"type": "object", "properties": {"kind": other}, "required": ["kind"]})
    schema["title"] = "A Trivium recipe"
    schema["properties"]["extends"] = {"type": "string", "description": "A recipe this one is laid over."}
    schema["required"] = ["stages"]
    return schema


def _ending(place: str) -> str:
    """The pattern of what names the class at that place from any folder."""
    return f"(^|/){re.escape(Path(place).name)}$"


def _model() -> type[BaseModel]:
    """The recipe's model: its `stages` are the union of all known kinds, told apart by `kind`."""
    return _model_of(tuple(kinds().values()))


@lru_cache(maxsize=4)
def _model_of(known: tuple[type[Stage], ...]) -> type[BaseModel]:
    union = Annotated[Union[known], Field(discriminator="kind")] if len(known) > 1 else known[0]  # noqa: UP007
    named = dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], union]  # type: ignore[valid-type]
    return create_model("Recipe", __base__=_Recipe, stages=(named, Field(min_length=1)))
