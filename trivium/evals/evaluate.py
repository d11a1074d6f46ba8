"""Ask a model everything, and compare two models on the same items."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.evals.asking import Subject
from trivium.evals.results import LOWER_IS_BETTER, Record, Results, TaskResult, as_json
from trivium.evals.settings import Settings, TaskSpec
from trivium.evals.statistics import Difference, holm, paired_difference
from trivium.evals.task import planned, ready_for
from trivium.generate.engines import EngineSettings
from trivium.generate.requests import GenerationEngine
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.folder import load_model
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer


@torch.inference_mode()
def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: Sequence[TaskSpec],
    settings: Settings | None = None,
    *,
    name: str = "",
    say: Callable[[str], None] | None = None,
    engine: GenerationEngine | None = None,
) -> Results:
    """Run these tasks on a model; every answer is kept."""
    given = settings or Settings()
    wanted = [planned(spec, given) for spec in tasks]
    labels = [one.label for one in wanted]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise TriviumError(f"The task {twice} is listed twice; give one of them another `name`.")
    for spec in tasks:
        ready_for(spec)
    subject = Subject(model, tokenizer, engine=engine)
    results = Results(name, {})
    for asked in wanted:
        one, label, own = asked.task, asked.label, asked.settings
        if own.reasoning != "off" and subject.style(own) == "continue":
            own = own.model_copy(update={"reasoning": "off"})
            if say is not None:
                say(f"{label}: {name or 'the model'} is asked as text, so for no thoughts before the answer")
        started = time.perf_counter()
        found = one(subject, own, asked.options)
        if not found.records:
            raise TriviumError(f"The task {label} found nothing to ask; check its options.")
        results.tasks[label] = TaskResult(
            one.name, one.description, one.headline, found.records, found.style or subject.style(own),
            {**own.model_dump(), **asked.options}, found.whole, time.perf_counter() - started,
        )  # fmt: skip
        if say is not None:
            say(line_of(label, results.tasks[label]))
    return results


@dataclass(frozen=True)
class Comparison:
    """One number of two models on the same items: how they differ, before and after Holm's correction."""

    task: str
    metric: str
    before: float
    after: float
    difference: Difference
    corrected: float
    headline: bool
    better: bool | None
    """Whether the second is better, worse, or (None) not distinguishable from the first."""

    def as_json(self) -> dict[str, Any]:
        return {
            "task": self.task, "metric": self.metric, "before": self.before, "after": self.after,
            "difference": as_json(self.difference.interval), "p": self.difference.p_value,
            "corrected_p": self.corrected, "headline": self.headline, "better": self.better,
        }  # fmt: skip


def compare(first: Results, second: Results, *, seed: int = 0) -> list[Comparison]:
    """Paired differences of all numbers both have; Holm corrects the headlines together, then the rest."""
    rows: list[tuple[str, str, bool, float, float, Difference]] = []
    for label, task_before in first.tasks.items():
        if label not in second.tasks:
            continue
        task_after = second.tasks[label]
        pairs = _paired(label, task_before.records, task_after.records)
        for metric in task_before.metrics:
            both = [(a, b) for a, b in pairs if metric in a.scores and metric in b.scores]
            if not both:
                continue
            before = [a.scores[metric] for a, _ in both]
            after = [b.scores[metric] for _, b in both]
            weights = [a.weights.get(metric, 1.0) for a, _ in both]
            names = [a.cluster or a.id for a, _ in both]
            found = paired_difference(
                before, after, weights=weights, seed=seed,
                clusters=names if len(set(names)) < len(names) else None,
            )  # fmt: skip
            whole = sum(weights)
            means = [
                sum(value * weight for value, weight in zip(values, weights)) / whole
                for values in (before, after)
            ]
            rows.append((label, metric, metric in task_before.headline, means[0], means[1], found))
    if not rows:
        raise TriviumError("The two evaluations have no task in common; ask both models the same tasks.")
    corrected: dict[int, float] = {}
    for kind in (True, False):
        members = [place for place, row in enumerate(rows) if row[2] is kind]
        values = holm([rows[place][5].p_value for place in members])
        corrected.update(zip(members, values))
    return [
        Comparison(label, metric, before, after, found, corrected[place], headline,
                   _better(metric, found, corrected[place]))
        for place, (label, metric, headline, before, after, found) in enumerate(rows)
    ]  # fmt: skip


def _better(metric: str, found: Difference, corrected: float) -> bool | None:
    if not Difference(found.interval, corrected).significant:
        return None
    return (found.interval.value > 0) != (metric in LOWER_IS_BETTER)


def _paired(label: str, before: Sequence[Record], after: Sequence[Record]) -> list[tuple[Record, Record]]:
    others = {record.id: record for record in after}
    if [record.id for record in before] != [record.id for record in after]:
        raise TriviumError(
            f"The task {label} asked the two models different items; ask both with the same settings."
        )
    for record in before:
        if record.expected != others[record.id].expected:
            raise TriviumError(f"The task {label} expects different answers to {record.id}; ask both again.")
    return [(record, others[record.id]) for record in before]


def comparison_table(found: Sequence[Comparison]) -> list[list[str]]:
    """Comparisons as rows for a person; the first row is the heading."""
    rows = [["task", "measure", "before", "after", "difference (95 %)", "p, corrected", ""]]
    for one in found:
        if not one.headline:
            continue
        inside = one.difference.interval
        verdict = {True: "better", False: "worse", None: "no difference shown"}[one.better]
        rows.append([
            one.task, one.metric, f"{one.before:.4g}", f"{one.after:.4g}",
            f"{inside.value:+.4g} ({inside.low:+.4g} to {inside.high:+.4g})", f"{one.corrected:.3g}", verdict,
        ])  # fmt: skip
    return rows


def line_of(label: str, result: TaskResult) -> str:
    """What a task came to, in one line."""
    measures = result.measures()
    told = []
    for name in [*result.headline, *result.whole]:
        if name in measures:
            one = measures[name]
            ends = f"{one.low:.3g} to {one.high:.3g}" if math.isfinite(one.low) else "interval unknown"
            told.append(f"{name} {one.value:.3g} ({ends})")
    return f"{label}: {', '.join(told)}; {len(result.records)} items, {result.seconds:.1f} s"


VERDICTS = {True: "gained", False: "lost", None: "kept"}
"""`kept` says that no difference is shown, not that there is none."""


def chain_table(steps: Sequence[Results]) -> list[list[str]]:
    """Every headline of every step, and what the last step did to it; the first row is the heading."""
    assert len(steps) > 1, "a chain has two ends"
    now, before = steps[-1], steps[-2]
    latest, whole = _headlines(compare(before, now)), _headlines(compare(steps[0], now))
    ends = [
        (f"since {before.model} (95 %)", latest),
        *([(f"since {steps[0].model} (95 %)", whole)] if len(steps) > 2 else []),
    ]
    rows = [["skill", *(step.model for step in steps), *(name for title, _ in ends for name in (title, ""))]]
    for label, task in now.tasks.items():
        for metric in task.headline:
            key = (label, metric)
            if all(key not in found for _, found in ends):
                continue
            told = [piece for _, found in ends for piece in _told(found.get(key))]
            rows.append([f"{label}: {metric}", *(_value(step, *key) for step in steps), *told])
    return rows


def _headlines(found: Sequence[Comparison]) -> dict[tuple[str, str], Comparison]:
    return {(one.task, one.metric): one for one in found if one.headline}


def _told(one: Comparison | None) -> list[str]:
    if one is None:
        return ["", ""]
    inside = one.difference.interval
    return [f"{inside.value:+.3g} ({inside.low:+.3g} to {inside.high:+.3g})", VERDICTS[one.better]]


def _value(step: Results, label: str, metric: str) -> str:
    task = step.tasks.get(label)
    measures = {} if task is None else task.measures()
    return f"{measures[metric].value:.3g}" if metric in measures else ""


def evaluate_folder(
    folder: Path,
    tasks: Sequence[TaskSpec],
    settings: Settings,
    *,
    name: str,
    say: Callable[[str], None] | None = None,
    engine: EngineSettings | None = None,
) -> Results:
    """Load the model of a Hugging Face folder and ask it; with `engine` another one gives its answers."""
    place = machine.device()
    model = load_model(folder, dtype=machine.compute_dtype(place), device=place)
    model.requires_grad_(False)
    tokenizer = Tokenizer.load(folder)
    other = engine.open(folder, tokenizer, model.config.reach) if engine is not None else None
    return evaluate(model, tokenizer, tasks, settings, name=name, say=say, engine=other)
