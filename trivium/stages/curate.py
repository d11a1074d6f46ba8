"""The curate stage: raw documents through named steps, and what became of each."""

import math
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from trivium.curate.curation import FUNNEL, Curation
from trivium.curate.engines import Engine
from trivium.curate.passes import READ
from trivium.curate.step import parse_steps
from trivium.curate.steps.decontaminate import planned_against
from trivium.curate.steps.quality import Quality, Rejudge
from trivium.data.settings import Sources
from trivium.data.sources import Source
from trivium.generate.asking.journal import ANSWERS, answers_beside, keep_answers
from trivium.stages.parts.documents import source_references
from trivium.stages.parts.stage import Product, Reference, Stage, Work


class Curate(Stage):
    """Clean, filter, deduplicate and sample `data`; documents that are left out are kept with the reason."""

    kind: Literal["curate"]
    """Curate raw text."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "data"
    computes: ClassVar[bool] = False
    unaffecting: ClassVar[frozenset[str]] = frozenset({"seed", "workers", "engine", "most_lost"})

    data: Sources
    """Where the documents are: files, folders, patterns, URLs, `world:web`, or stages that make data."""
    steps: list[str | dict[str, Any]]
    """What is done with them, in order: names, or names with settings."""
    workers: int = Field(default=1, ge=1)
    """How many processes work on shards."""
    engine: Engine = "local"
    """Where they work: `local`, or `ray` on a cluster."""
    most_lost: float | None = Field(default=None, gt=0, lt=1)
    """Stop if a source loses a larger share of its documents than this."""

    @field_validator("steps", mode="before")
    @classmethod
    def _known_steps(cls, steps: Any) -> list[dict[str, Any]]:
        return [step.written() for step in parse_steps(steps)]

    def references(self) -> list[Reference]:
        """`data` is outside data or a stage that makes documents; some steps name more."""
        found = source_references("data", self.data)
        for place, step in enumerate(parse_steps(self.steps)):
            for setting, name, needs in step.mentions():
                found.append(Reference(f"steps.{place}.{step.name}.{setting}", name, needs))  # type: ignore[arg-type]
        return found

    def plan(self, inputs: Any) -> dict[str, Any]:
        return dict(planned_against(parse_steps(self.steps)))

    def _judges(self) -> dict[int, Rejudge]:
        steps = enumerate(parse_steps(self.steps))
        found = {place: step.rejudge for place, step in steps if isinstance(step, Quality)}
        return {place: judge for place, judge in found.items() if judge is not None}

    @property
    def asks(self) -> str | None:
        """The model that judges near a bound, where it is one of ours."""
        return next((judge.model for judge in self._judges().values() if judge.model is not None), None)

    def judging(self, documents: int, characters: float, known: float) -> dict[str, float]:
        """What judging near the bounds costs at most, if no step before it leaves anything out."""
        found: dict[str, float] = {}
        for judge in self._judges().values():
            one = judge.estimate(math.ceil(judge.band * documents), characters)
            found = {name: value + found.get(name, 0.0) for name, value in one.items()}
        return found

    def counted(self) -> dict[str, Any]:
        """How fast a judge is asked, and what it costs, changes no document."""
        found = super().counted()
        for place, judge in self._judges().items():
            found["steps"][place][Quality.name]["rejudge"] = judge.counted()
        return found

    def run(self, work: Work) -> dict[str, Any]:
        """Work on what is left of the shards, and put the folders of kept and dropped documents in place."""
        steps = parse_steps(self.steps)
        where = {name: work.path(name) for step in steps for _, name, _ in step.mentions() if ":" not in name}
        for step in steps:
            step.locate(where)
        curation = Curation(
            steps=steps,
            sources=[(source.path, _located(work, source)) for source in self.data],
            # What only the work itself needs lies where the store removes it.
            scratch=work.folder / "checkpoints",
            kept=work.output("data"),
            dropped=work.folder / "dropped",
            funnel=work.folder / FUNNEL,
            where=where,
            answers=answers_beside(work.folder),
            workers=self.workers,
            engine=self.engine,
            most_lost=self.most_lost,
            said=lambda documents, unit: work.progress.update(documents, None, unit),
        )
        summary = summary_of(curation.run())
        if journals := sorted(curation.scratch.glob(f"*/{ANSWERS}")):
            keep_answers(journals, work.folder / ANSWERS)
        for facts in summary["decisions"].values():
            if "judged" in facts:
                why = f", the first since: {facts['first failure']}" if "first failure" in facts else ""
                work.say(
                    f"{facts['judged']:,} documents judged again by {facts['judge']}, "
                    f"{facts['without a score']:,} of them without a score{why}"
                )
        for step in summary["steps"]:
            work.say(f"{step['step']}: {step['in']:,} -> {step['out']:,} documents")
        return summary


def _located(work: Work, source: Source) -> Source:
    if "://" in source.path:
        return source
    # A copy keeps what the recipe left unsaid unsaid.
    return source.model_copy(update={"path": str(work.path(source.path))})


def summary_of(funnel: dict[str, Any]) -> dict[str, Any]:
    """The funnel in short, for `stage.yaml`."""
    steps = []
    for step in funnel["steps"]:
        rows = list(step["sources"].values())
        steps.append(
            {
                "step": step["title"],
                "in": sum(row[0] for row in rows), "out": sum(row[2] for row in rows),
                "bytes_in": sum(row[1] for row in rows), "bytes_out": sum(row[3] for row in rows),
                "rules": dict(sorted(step["rules"].items(), key=lambda one: -one[1])),
            }
        )  # fmt: skip
    read = next(step for step in funnel["steps"] if step["key"] == READ)
    return {
        "read": sum(row[0] for row in read["sources"].values()),
        "documents": funnel["documents"],
        "steps": steps,
        "decisions": funnel["decisions"],
    }
