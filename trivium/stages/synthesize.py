"""The synthesize stage: rows that models write and programs verify, with what became of every other row."""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from trivium.curate.steps.decontaminate import planned_against
from trivium.data.door import documents
from trivium.data.settings import Sources
from trivium.generate.asking.budget import Budget
from trivium.generate.endpoint import EndpointSettings
from trivium.generate.engines import EngineChoice, EngineSettings
from trivium.kit.numbers import Count
from trivium.stages.parts.documents import source_references
from trivium.stages.parts.stage import Product, Reference, Stage, Work
from trivium.synthesize.prompted import PromptedStep
from trivium.synthesize.row import Form, Row, row_of
from trivium.synthesize.step import Room, parse_steps
from trivium.synthesize.steps.answer import Answer
from trivium.synthesize.synthesis import Synthesis
from trivium.synthesize.teachers import asking, teachers


class Synthesize(Stage):
    """Send rows through named steps in which models write, programs verify, and what is alike is left out."""

    kind: Literal["synthesize"]
    """Write data with a model, and verify it."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "data"
    unaffecting: ClassVar[frozenset[str]] = frozenset({"max_rows"})

    start: str | None = Field(default=None, alias="from")
    """The teacher: a stage, a folder or an id on the hub."""
    endpoint: EndpointSettings | None = None
    """The teacher behind an OpenAI-compatible endpoint instead."""
    data: Sources | None = None
    """The rows to start from; the step `seed` can do without."""
    steps: list[str | dict[str, Any]]
    """What is done with them, in order: names, or names with settings."""
    budget: Budget = Budget()
    """The most that may be spent: `tokens`, `requests`, `money`; what comes then is not asked."""
    per_round: Count = Field(default=256, ge=1)
    """How many rows go through all steps together."""
    seeds: Count | None = Field(default=None, ge=1)
    """Draw at most so many seeds, whatever is known already; else all, or as many as the budget allows."""
    form: Form = "messages"
    """How rows are written: `messages`, or `prompt` and `completion` as plain texts."""
    file_format: Literal["jsonl", "parquet"] = "jsonl"
    """Whether the rows are in `data/rows.jsonl` or `data/rows.parquet`."""
    coverage_by: list[str] = []
    """The columns that coverage is measured over, as `truth.family`; those that steer, or topic, persona,
    style, language and length, where it is left out."""
    engine: EngineChoice = EngineSettings()
    """What `from` is opened in: `own` or `vllm`, which needs a GPU and has no `embed`; `{kind: endpoint,
    url: ..., model: ...}` is another way to write `endpoint`."""
    max_rows: Count = Field(default=32, ge=1)
    """How many answers the own engine writes at once."""

    @model_validator(mode="after")
    def _endpoint_is_an_engine(self) -> Self:
        if self.engine.kind == "endpoint":
            if self.endpoint is not None:
                raise ValueError("the teacher's endpoint is `engine` or `endpoint`, not both")
            self.endpoint, self.engine = self.engine.endpoint(), EngineSettings()
        return self

    @field_validator("steps", mode="before")
    @classmethod
    def _known_steps(cls, steps: Any) -> list[dict[str, Any]]:
        return [step.written() for step in parse_steps(steps)]

    @model_validator(mode="after")
    def _one_teacher(self) -> Self:
        if self.start is not None and self.endpoint is not None:
            raise ValueError("the teacher is `from` or `endpoint`, not both")
        steps = parse_steps(self.steps)
        for step in steps:
            own = isinstance(step, PromptedStep) and (step.model is not None or step.endpoint is not None)
            if step.asks and not own and self.start is None and self.endpoint is None:
                raise ValueError(f"`{step.name}` asks a model: name it as `from` or `endpoint`")
            elsewhere = self.engine.kind != "own" or (self.endpoint is not None and not own)
            if isinstance(step, Answer) and step.search is not None and elsewhere:
                raise ValueError("`search` needs our engine and a model in it; leave out `search`")
        if self.data is None and steps[0].name != "seed":
            raise ValueError("name `data` to start from, or begin with the step `seed`")
        if self.budget.money is not None and not any(
            one.prompt_price or one.completion_price for one in self._endpoints()
        ):
            raise ValueError(
                "`budget.money` needs prices: `endpoint: {prompt_price: ..., completion_price: ...}`"
            )
        return self

    def _endpoints(self) -> list[EndpointSettings]:
        own = [step.endpoint for step in parse_steps(self.steps) if isinstance(step, PromptedStep)]
        return [one for one in (self.endpoint, *own) if one is not None]

    def references(self) -> list[Reference]:
        found = [] if self.start is None else [Reference("from", self.start, ("model",))]
        found += [] if self.data is None else source_references("data", self.data)
        for place, step in enumerate(parse_steps(self.steps)):
            for setting, name, needs in step.mentions():
                found.append(Reference(f"steps.{place}.{step.name}.{setting}", name, needs))  # type: ignore[arg-type]
        return found

    def plan(self, inputs: Any) -> dict[str, Any]:
        return dict(planned_against(parse_steps(self.steps)))

    def counted(self) -> dict[str, Any]:
        """How fast an endpoint is asked, and what it costs, changes no row."""
        found = super().counted()
        # vLLM without settings is counted by its name, as it always was.
        found["engine"] = found["engine"] if self.engine.settings else self.engine.kind
        for one in [found, *(inside for step in found["steps"] for inside in step.values())]:
            if one.get("endpoint"):
                one["endpoint"] = {name: one["endpoint"][name] for name in ("url", "model", "body")}
        return found

    def estimate(self, rows: float, prompt_tokens: float) -> dict[str, float]:
        """Answers and tokens at most, and money, of so many rows whose prompts have so many tokens."""
        asked: dict[str, float] = {"answers": 0.0, "tokens at most": 0.0}
        money = 0.0
        for step in parse_steps(self.steps):
            rows, answers, longest = step.answers(rows)
            asked["answers"] += answers
            asked["tokens at most"] += answers * (prompt_tokens + longest)
            own = step.endpoint if isinstance(step, PromptedStep) else None
            endpoint = own or (self.endpoint if step.asks else None)
            if endpoint is not None:
                money += endpoint.cost(round(answers * prompt_tokens), round(answers * longest))
        for name, most in (("answers", self.budget.requests), ("tokens at most", self.budget.tokens)):
            asked[name] = min(asked[name], most if most is not None else asked[name])
        money = min(money, self.budget.money) if self.budget.money is not None else money
        return {**asked, "rows at most": rows, **({"money at most": money} if money else {})}

    def longest_answers(self) -> dict[str, int]:
        """The tokens of the longest answer of every step that `from` answers, by its setting."""
        return {
            f"steps.{place}.{step.name}.max_new_tokens": step.max_new_tokens
            for place, step in enumerate(parse_steps(self.steps))
            if isinstance(step, PromptedStep) and step.model is None and step.endpoint is None
        }

    def check_machine(self) -> None:
        for one in self._endpoints():
            one.key()
        self.engine.check_machine()
        for step in parse_steps(self.steps):
            step.check(Path())

    def run(self, work: Work) -> dict[str, Any]:
        """Do what is not done yet, and put rows, dropped rows and the report in place."""
        steps = parse_steps(self.steps)
        where = {
            name: work.path(name) for step in steps for _, name, _ in step.mentions() if name in work.inputs
        }
        teacher, others = teachers(
            steps, self.start, self.endpoint, work.path, max_rows=self.max_rows, engine=self.engine
        )
        with asking([teacher, *others.values()], self.budget, work.folder) as asker:
            room = Room(
                asker, work.seed, work.say, work.base, work.folder / "checkpoints", teacher, others, where,
                self._rows(work),
            )  # fmt: skip
            synthesis = Synthesis(
                steps, room, self.per_round, self.seeds, self.form, self.file_format, self.coverage_by,
                lambda done, seeds: work.progress.update(done, seeds, "seeds"),
            )  # fmt: skip
            rows = synthesis.run()
        synthesis.write_dropped(work.folder)
        report = synthesis.write(rows, work.output("data"), work.folder)
        return self._said(work, report, room)

    def _rows(self, work: Work) -> list[Row]:
        return [row_of(document.id, document.fields) for document in documents(work, self.data or [])]

    def _said(self, work: Work, report: dict[str, Any], room: Room) -> dict[str, Any]:
        """Tell what came out, and return it in short."""
        for step in report["steps"]:
            reasons = ", ".join(f"{why} {count:,}" for why, count in list(step["reasons"].items())[:4])
            left_out = f" ({reasons})" if reasons else ""
            work.say(f"{step['step']}: {step['in']:,} -> {step['out']:,} rows{left_out}")
        counts, cost = room.asker.counts, report["cost"]
        money = f" for {cost['money']:.2f}" if cost["money"] else ""
        work.say(
            f"{report['rows']:,} rows; {counts['answered']:,} answers written, {counts['cached']:,} known; "
            f"{cost['tokens']:,} tokens in {cost['requests']:,} requests{money}"
        )
        if report["out_of_budget"]:
            left, seeds = report["not_drawn"], report["seeds"]
            work.say(f"the budget is used up; {left:,} of {seeds:,} seeds were not drawn")
        names = ("seeds", "not_drawn", "rows", "dropped", "cost", "out_of_budget")
        short = ("step", "in", "out", "reasons")
        diversity = report["diversity"]
        return {
            **{name: report[name] for name in names},
            "steps": [{name: step[name] for name in short} for step in report["steps"]],
            **{f"distinct_{size}": share for size, share in diversity["distinct"].items()},
            "nearest": diversity["self_similarity"]["nearest"],
            "coverage": diversity["coverage"]["share"],
            "evenness": diversity["coverage"]["evenness"],
            "requests": dict(counts),
        }
