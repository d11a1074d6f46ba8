"""What a recipe may say, and one sentence for what it may not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from trivium.kit.errors import TriviumError
from trivium.recipe.complaints import sentence
from trivium.recipe.read import Written, read
from trivium.stages import kinds
from trivium.stages.stage import Stage


class Report(BaseModel):
    """Which stages the report compares, and on which tasks."""

    model_config = ConfigDict(extra="forbid")

    compare: list[str] = []
    on: list[str] = []


class _Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = 1
    report: Report | None = None


@dataclass(frozen=True)
class Recipe:
    """A valid recipe: its name, its stages in the order written, and where its paths start from."""

    name: str
    seed: int
    stages: Mapping[str, Stage]
    report: Report | None
    written: Written

    @property
    def base(self) -> Path:
        """The folder relative paths start from."""
        return self.written.path.parent


def load(name: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """Read a recipe and check every key and value in it."""
    written = read(name, overrides)
    model = _model()
    try:
        valid: Any = model.model_validate(written.content)
    except ValidationError as error:
        raise TriviumError(sentence(error, model, written)) from None
    if valid.name == "store":
        raise TriviumError(
            f"{written.place(['name'])} cannot be `store`, a folder of that name holds results."
        )
    for stage in valid.stages.values():
        stage.seed = valid.seed if stage.seed is None else stage.seed
    return Recipe(valid.name, valid.seed, valid.stages, valid.report, written)


def json_schema() -> dict[str, Any]:
    """The JSON schema of recipes, from which editors complete and check."""
    schema = _model().model_json_schema(by_alias=True)
    schema["title"] = "A Trivium recipe"
    schema["properties"]["extends"] = {"type": "string", "description": "A recipe this one is laid over."}
    schema["required"] = ["stages"]
    return schema


def _model() -> type[BaseModel]:
    """The recipe's model: its `stages` are the union of all known kinds, told apart by `kind`."""
    known = tuple(kinds().values())
    union = Annotated[Union[known], Field(discriminator="kind")] if len(known) > 1 else known[0]  # noqa: UP007
    named = dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], union]  # type: ignore[valid-type]
    return create_model("Recipe", __base__=_Recipe, stages=(named, Field(min_length=1)))
