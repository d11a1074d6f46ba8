"""The evaluate stage: tasks with known truth, asked of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from trivium.curate.examination import Examined
from trivium.data.sources import Source
from trivium.data.split import HELD_OUT
from trivium.evals.evaluate import chain_table, compare, evaluate_folder
from trivium.evals.examined import examined
from trivium.evals.results import Results, as_json
from trivium.evals.settings import Settings, TaskSpec
from trivium.evals.task import (
    FILES,
    MODELS,
    checked_specs,
    outside,
    placed,
    placed_search,
    ready_for,
    scorer_files,
)
from trivium.generate.engines import EngineChoice, EngineSettings
from trivium.kit.files import whole_folder, write_json
from trivium.kit.table import PIPED, table
from trivium.model.hub import resolve
from trivium.stages.parts.stage import Product, Reference, Stage, Work

NAMED: dict[str, tuple[Product, ...]] = {
    "data": ("data", "source"), "examples": ("source",), "model": ("reward",),
    "source": ("source",), "sources": ("source",), "search.scorer": ("reward",),
}  # fmt: skip
"""The options that name something outside the task, and what it has to be."""


def _listed(value: Any) -> Any:
    """One report is a list of one."""
    return [value] if isinstance(value, str) else value


class Evaluate(Stage):
    """Ask the model of a stage the tasks listed in `on`, and compare it with the reports of others."""

    kind: Literal["evaluate"]
    """Evaluate a model on tasks."""
    version: ClassVar[int] = 4
    produces: ClassVar[Product] = "report"

    start: str = Field(alias="from")
    """The model."""
    on: list[str | dict[str, Any]] = Field(min_length=1)
    """The tasks: `facts`, `sums?steps_high=6&samples=8`, or `{task: own, data: mine.jsonl, scorer: math}`."""
    against: Annotated[list[str], BeforeValidator(_listed, json_schema_input_type=str | list[str])] = Field(
        default=[]
    )
    """Earlier evaluate stages with the same tasks, the first of a chain first: answers compare one by one."""
    asking: Settings = Settings()
    """How the tasks are asked, where they do not say so themselves."""
    engine: EngineChoice = EngineSettings()
    """What generates the answers: `own`, `vllm`, or `{kind: endpoint, url: ..., model: ...}`."""

    @field_validator("on")
    @classmethod
    def _known_tasks(cls, on: list[TaskSpec]) -> list[str | dict[str, Any]]:
        return checked_specs(on)

    def references(self) -> list[Reference]:
        found = [Reference("from", self.start, ("model",))]
        found += [Reference("against", name, ("report",)) for name in self.against]
        for place, spec in enumerate(self.on):
            for option, name in outside(spec):
                if option not in FILES:
                    read = None if option in MODELS else Source(path=name)
                    found.append(Reference(f"on.{place}.{option}", name, NAMED[option], read))
        for option, name in outside(self._asking):
            if option not in FILES:
                found.append(Reference(f"asking.{option}", name, NAMED[option]))
        found += [Reference("reward_files", file, ("source",)) for file in self._files]
        return found

    def examines(self) -> Examined:
        return examined(self.on, self._seeded())

    @property
    def _asking(self) -> dict[str, Any]:
        return {"search": self.asking.search}

    @property
    def _files(self) -> list[str]:
        """The files of functions that score answers or a search, each once."""
        return sorted({file for spec in (self._asking, *self.on) for file in scorer_files(spec)})

    def counted(self) -> dict[str, Any]:
        """Our own engine is what every earlier report was made with, and no setting of those."""
        found = super().counted()
        if self.engine.kind == "own":
            del found["engine"]
        # The text of a file that scores counts as well; a stage without one is what it was before.
        return {**found, "reward_files": self._files} if self._files else found

    def check_machine(self) -> None:
        for spec in self.on:
            ready_for(spec)
        self.engine.check_machine()

    def run(self, work: Work) -> dict[str, Any]:
        """Ask, write the numbers and every answer, and compare."""
        asking = placed_search(self._seeded(), self._place(work))
        folder = resolve(work.path(self.start))
        found = self._found(work)
        results = evaluate_folder(folder, found, asking, name=self.start, say=work.say, engine=self.engine)
        earlier = [Results.load(work.path(name) / "results.json") for name in self.against]
        compared = [one.as_json() for one in compare(earlier[-1], results)] if earlier else []
        chain = chain_table([*earlier, results]) if earlier else []
        if chain:
            work.say(f"gained here, lost there\n{table(chain, PIPED).rstrip()}")
        with whole_folder(work.output("report")) as report:
            results.save(report / "results.json")
            if compared:
                write_json(report / "compared.json", compared)
                write_json(report / "chain.json", chain)
        headlines: dict[str, Any] = {}
        for label, one in results.tasks.items():
            measures = one.measures()
            for name in [*one.headline, *one.whole]:
                if name in measures:
                    headlines[f"{label}: {name}"] = as_json(measures[name])
        return headlines

    def _seeded(self) -> Settings:
        """How the tasks are asked, with questions drawn by the stage's seed unless `asking` has one."""
        if self.seed is None or "seed" in self.asking.model_fields_set:
            return self.asking
        return self.asking.model_copy(update={"seed": self.seed})

    def _found(self, work: Work) -> list[str | dict[str, Any]]:
        """The tasks, with what they name where it lies: of a stage of data, what it held out."""
        place = self._place(work)
        return [placed(spec, place) for spec in self.on]

    def _place(self, work: Work) -> Callable[[str, str], str]:
        """Where what an option names lies."""
        reads: dict[str, Callable[[Path], Path]] = {"data": _to_ask, **dict.fromkeys(MODELS, resolve)}

        def place(option: str, name: str) -> str:
            path = work.path(name)
            return str(reads[option](path) if option in reads else path)

        return place


def _to_ask(data: Path) -> Path:
    held_out = data.parent / HELD_OUT
    return held_out if data.is_dir() and held_out.is_dir() else data
