"""Labels for the steps of solutions: the model solves problems; roll-outs or a checker label each step.

The result is data for `reward: {steps: true}` in TRL's stepwise form. A chunk of problems is written as soon
as it is labelled, so a stage that was stopped goes on with the next one.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from trivium.data.settings import Mixture
from trivium.data.steps import SEPARATOR, step_ends
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import ready_scorers
from trivium.grade.steps import labels_of_steps
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, whole_folder, write_json, write_text
from trivium.kit.numbers import Count
from trivium.stages.parts.documents import PROMPTS, ROWS, mixture_references
from trivium.stages.parts.judges import Named, file_references, judges_of, model_references, reward_files
from trivium.stages.parts.model_folders import ModelFolder, folder_of
from trivium.stages.parts.prompts import Prompt, read_prompts
from trivium.stages.parts.stage import Product, Reference, Stage, Work
from trivium.stages.parts.step_labels import agreement_of, confusion, shuffle_labels
from trivium.stages.parts.step_rollouts import (
    Solution,
    StepRollouts,
    values_of_every_step,
    values_to_first_error,
    worked_steps,
)

CHUNK = 16
"""Problems that are labelled and written together."""


class LabelSteps(Stage):
    """Let a model solve problems, and label every step of its solutions by roll-outs or exactly."""

    kind: Literal["label_steps"]
    """Label the steps of solutions."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "data"
    unaffecting: ClassVar[frozenset[str]] = frozenset({"max_rows"})

    start: str = Field(alias="from")
    """The model that solves the problems and goes on from their steps."""
    data: Mixture
    """Problems, with the columns that the scorer reads; a row with `completions` brings its own solution."""
    scorer: Named = "math"
    """Who says whether an answer is right: a scorer, `file.py:function` or {model: rm}."""
    rollouts: Count = Field(default=8, ge=1)
    """Roll-outs from a step."""
    labels: Literal["hard", "soft", "exact", "outcome"] = "hard"
    """Whether any roll-out is right; the share that is; what a checker of the steps says; or one label at the
    end, whether the answer is right."""
    locate: Literal["first_error", "every_step"] = "first_error"
    """Whether hard labels come from a binary search for the first error, or from roll-outs of every step."""
    least_share: float = Field(default=0.0, ge=0, lt=1)
    """The share of roll-outs of which more must be right for a hard label to call the step right; 0: any."""
    num_generations: Count = Field(default=4, ge=1)
    """Solutions per problem."""
    temperature: float = Field(default=1.0, gt=0)
    """The sampling temperature of solutions and roll-outs."""
    max_new_tokens: Count = Field(default=256, ge=1)
    """The longest solution in tokens."""
    threshold: float = 1.0
    """The score from which an answer counts as right."""
    separator: str = Field(default=SEPARATOR, min_length=1)
    """The text that divides a solution into steps."""
    shuffled: bool = False
    """Give every step the label of another one, drawn at random: a control that teaches nothing."""
    prompt_template: str | None = None
    """How a model without a chat template is asked, such as `Question: {prompt}\\nAnswer:`."""
    stop: tuple[str, ...] = ()
    """Texts that end a solution."""
    max_rows: Count = Field(default=64, ge=1)
    """How many completions are sampled at once."""

    def references(self) -> list[Reference]:
        return [
            Reference("from", self.start, ("model",)),
            *mixture_references(self.data, needs=ROWS, without=PROMPTS),
            *model_references([self.scorer], "scorer"),
            *file_references([self.scorer]),
        ]

    def counted(self) -> dict[str, Any]:
        return {**super().counted(), "reward_files": reward_files([self.scorer])}

    def check_machine(self) -> None:
        ready_scorers([self.scorer])

    def run(self, work: Work) -> dict[str, Any]:
        """Solve, label and write chunk by chunk; then join the chunks and compare with exact labels."""
        start = folder_of(work, self.start)
        room = start.config.context - self.max_new_tokens
        prompts = read_prompts(
            work, self.data, start.tokenizer, room=room, prompt_template=self.prompt_template
        )
        chunks = [prompts[first : first + CHUNK] for first in range(0, len(prompts), CHUNK)]
        rollouts: StepRollouts | None = None
        for number, chunk in enumerate(chunks):
            path = self._chunk(work, number)
            if not path.exists():
                rollouts = rollouts or self._rollouts(work, start)
                rollouts.known.clear()
                rollouts.cost = dict.fromkeys(rollouts.cost, 0)
                path.parent.mkdir(parents=True, exist_ok=True)
                rows = self._labelled(rollouts, chunk)
                write_json(path, {"rows": rows, "cost": rollouts.cost})
            work.progress.update(number + 1, len(chunks), "chunks")
        written = [read_json(self._chunk(work, number)) for number in range(len(chunks))]
        return self._joined(work, written, len(prompts))

    def _chunk(self, work: Work, number: int) -> Path:
        return work.folder / "labelled" / f"{number:06d}.json"

    def _rollouts(self, work: Work, start: ModelFolder) -> StepRollouts:
        sampling = Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens, stop=self.stop)
        return StepRollouts(
            start.engine(self.max_rows), judges_of([self.scorer], work), sampling, work.seed,
            threshold=self.threshold, rollouts=self.rollouts,
            least_share=self.least_share,
        )  # fmt: skip

    def _labelled(self, rollouts: StepRollouts, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """The rows of a chunk: every solution with a label per step, and the exact labels where known."""
        given = [(prompt, text) for prompt in prompts if (text := self._given(prompt)) is not None]
        asked = [prompt for prompt in prompts if self._given(prompt) is None]
        pairs = [*given, *rollouts.draw(asked, self.num_generations)]
        solutions = []
        for (prompt, text), right in zip(pairs, rollouts.right(pairs), strict=True):
            found = step_ends(text, self.separator)
            steps, ends = [step for step, _ in found], [end for _, end in found]
            solutions.append(Solution(prompt, text, steps, ends, right))
        # A grader's own failure says nothing of the steps.
        solutions = [one for one in solutions if one.steps and one.right is not None]
        values = self._values(rollouts, solutions)
        counts: dict[str, int] = {}
        rows = []
        for one, mine in zip(solutions, values, strict=True):
            number = counts[one.prompt.id] = counts.get(one.prompt.id, -1) + 1
            worked = worked_steps(one.prompt.columns)
            rows.append({
                "id": f"{one.prompt.id}/{number}", "prompt": one.prompt.content, "completions": one.steps,
                "labels": self._labels(mine), "right": one.right,
                "exact": None if worked is None else labels_of_steps(one.steps, worked),
            })  # fmt: skip
        return rows

    def _given(self, prompt: Prompt) -> str | None:
        listed = prompt.columns.get("completions")
        return self.separator.join(listed) if isinstance(listed, list) and listed else None

    def _values(self, rollouts: StepRollouts, solutions: Sequence[Solution]) -> list[list[float]]:
        if self.labels == "outcome":
            return [[*([float("nan")] * (len(one.steps) - 1)), float(bool(one.right))] for one in solutions]
        if self.labels == "exact":
            return [labels_of_steps(one.steps, worked_steps(one.prompt.columns)) for one in solutions]
        if self.labels == "hard" and self.locate == "first_error":
            return values_to_first_error(rollouts, solutions)
        return values_of_every_step(rollouts, solutions)

    def _labels(self, values: Sequence[float]) -> list[bool | float | None]:
        # NaN: nothing is known of the step, neither that it is right nor that it is wrong.
        if self.labels == "soft":
            return [None if value != value else value for value in values]
        return [None if value != value else value > self.least_share for value in values]

    def _joined(self, work: Work, written: Sequence[Mapping[str, Any]], problems: int) -> dict[str, Any]:
        rows = [row for chunk in written for row in chunk["rows"]]
        if not rows:
            raise TriviumError(
                f"{work.stage}: no solution of {self.start} has a step that can be labelled; raise "
                "`max_new_tokens`, or check `separator` and the scorer."
            )
        agreement = agreement_of(rows)
        if self.shuffled:
            shuffle_labels(rows, work.seed)
        with whole_folder(work.output("data")) as folder:
            kept = [{name: row[name] for name in row if name != "exact"} for row in rows]
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
            write_text(folder / "train.jsonl", "".join(lines))
        cost = {name: sum(chunk["cost"][name] for chunk in written) for name in written[0]["cost"]}
        labels = [label for row in rows for label in row["labels"] if label is not None]
        found: dict[str, Any] = {
            "problems": problems,
            "solutions": len(rows),
            "right_solutions": sum(bool(row["right"]) for row in rows) / len(rows),
            "steps": sum(len(row["completions"]) for row in rows),
            "right_steps": float(np.mean([float(label) for label in labels])),
            **cost,
            "tokens_per_step": cost["tokens"] / len(labels),
        }
        if agreement is not None:
            found["agreement"] = agreement
            found["confusion"] = confusion(rows)
        agrees = f"; {agreement['value']:.1%} as the exact checker says" if agreement else ""
        work.say(
            f"{len(rows):,} solutions with {found['steps']:,} steps, {found['right_steps']:.0%} of them "
            f"right; {cost['rollouts']:,} roll-outs of {cost['tokens']:,} tokens{agrees}"
        )
        if cost.get("unknown_prefixes"):
            work.say(
                f"{cost['unknown_prefixes']:,} prefixes had no room for a roll-out or none that the scorer "
                "could judge: steps that depend on them have no label; "
                "raise `max_new_tokens` or check the scorer"
            )
        return found
