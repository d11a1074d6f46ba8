"""The evaluate stage: tasks with known truth, asked of a model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from trivium.evals.command import evaluate_folder
from trivium.evals.evaluate import compare
from trivium.evals.results import Results, as_json
from trivium.evals.settings import Settings, TaskSpec, read_spec
from trivium.evals.task import task
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_json
from trivium.model.hub import resolve
from trivium.stages.stage import Product, Reference, Stage, Work


class Evaluate(Stage):
    """Ask the model of a stage the tasks listed in `on`, and compare it with the report of another."""

    kind: Literal["evaluate"]
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "report"

    start: str = Field(alias="from")
    on: list[str | dict[str, Any]] = Field(min_length=1)
    """The tasks: `facts`, `sums?steps_high=6&samples=8`, or `{task: own, data: mine.jsonl, scorer: math}`."""
    against: str | None = None
    """Another evaluate stage with the same tasks: its answers are compared with these one by one."""
    asking: Settings = Settings()

    @field_validator("on")
    @classmethod
    def _known_tasks(cls, on: list[TaskSpec]) -> list[TaskSpec]:
        for spec in on:
            try:
                task(read_spec(spec, Settings())[1])
            except TriviumError as error:
                raise ValueError(str(error)) from None
        return on

    def references(self) -> list[Reference]:
        """The model, and the report to compare with."""
        found = [Reference("from", self.start, ("model",))]
        if self.against is not None:
            found.append(Reference("against", self.against, ("report",)))
        return found

    def run(self, work: Work) -> dict[str, Any]:
        """Ask, write the numbers and every answer, and compare."""
        asking = self.asking
        if self.seed is not None and "seed" not in asking.model_fields_set:
            asking = asking.model_copy(update={"seed": self.seed})
        folder = resolve(work.path(self.start))
        results = evaluate_folder(folder, self.on, asking, name=self.start, say=work.say)
        compared = []
        if self.against is not None:
            before = Results.load(work.path(self.against) / "results.json")
            compared = [one.as_json() for one in compare(before, results)]
        with whole_folder(work.output("report")) as report:
            results.save(report / "results.json")
            if compared:
                write_json(report / "compared.json", compared)
        headlines: dict[str, Any] = {}
        for label, one in results.tasks.items():
            measures = one.measures()
            for name in [*one.headline, *one.whole]:
                if name in measures:
                    headlines[f"{label}: {name}"] = as_json(measures[name])
        return headlines
