"""What an evaluation leaves behind: every answer one by one, and every number with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trivium.evals.statistics import Interval, bootstrap, proportion
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, write_json, write_text

LOWER_IS_BETTER = frozenset(
    {"bits per byte", "floor", "flip rate", "prefers sycophancy", "brier", "tokens", "tokens drawn"}
)
UNBOUNDED = frozenset({"bits per byte", "floor", "tokens", "tokens drawn", "log-likelihood"})
"""Measures that are no shares, even where all their values happen to lie between 0 and 1."""


@dataclass(frozen=True)
class Record:
    """One item: what was asked, what was answered, and how it scored."""

    id: str
    asked: str
    expected: str
    answers: tuple[dict[str, Any], ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    """How much an item counts in a mean of this score; one where it is not named."""
    cluster: str = ""
    """What the item shares with others, such as the entity it is about."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """By what the numbers are also given apart: kind, depth, frequency."""


def columns(records: Sequence[Record], metric: str) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """The scores of those items that have this one, their weights, and their clusters if any are shared."""
    held = [record for record in records if metric in record.scores]
    values = np.array([record.scores[metric] for record in held], dtype=float)
    weights = np.array([record.weights.get(metric, 1.0) for record in held], dtype=float)
    names = [record.cluster or record.id for record in held]
    return values, weights, names if len(set(names)) < len(names) else None


def estimate(records: Sequence[Record], metric: str, seed: int = 0) -> Interval:
    """The mean of a score with its 95 % interval; scores from 0 to 1 get Wilson's, which stays there."""
    values, weights, clusters = columns(records, metric)
    inside = bool(((values >= 0) & (values <= 1)).all()) and metric not in UNBOUNDED
    if inside and bool((weights == 1).all()):
        return proportion(values, clusters)
    return bootstrap(values, clusters=clusters, weights=weights, seed=seed)


@dataclass
class TaskResult:
    """What one task found out about one model."""

    name: str
    description: str
    headline: tuple[str, ...]
    records: list[Record]
    style: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Interval] = field(default_factory=dict)
    """Numbers that are no mean over items, such as the effective context."""
    seconds: float = 0.0

    @property
    def metrics(self) -> list[str]:
        """Every score an item has, the headlines first."""
        found = dict.fromkeys(metric for record in self.records for metric in record.scores)
        first = [name for name in self.headline if name in found]
        return [*first, *(name for name in found if name not in first)]

    def measures(self) -> dict[str, Interval]:
        """Every number of the whole task."""
        means = {metric: estimate(self.records, metric) for metric in self.metrics}
        return {**means, **self.whole}

    def by_group(self) -> dict[str, dict[str, dict[str, Interval]]]:
        """The same numbers apart: by what, for which value, which number."""
        found: dict[str, dict[str, dict[str, Interval]]] = {}
        for axis in dict.fromkeys(name for record in self.records for name in record.groups):
            values = {record.groups[axis] for record in self.records if axis in record.groups}
            for value in sorted(values, key=_natural):
                members = [record for record in self.records if record.groups.get(axis) == value]
                metrics = dict.fromkeys(metric for record in members for metric in record.scores)
                found.setdefault(axis, {})[value] = {one: estimate(members, one) for one in metrics}
        return found


@dataclass
class Results:
    """Everything one model was asked."""

    model: str
    tasks: dict[str, TaskResult]

    def summary(self) -> dict[str, Any]:
        """All numbers, without the single answers, ready for JSON."""
        return {
            "model": self.model,
            "tasks": {
                label: {
                    "task": task.name,
                    "description": task.description,
                    "headline": list(task.headline),
                    "style": task.style,
                    "settings": dict(task.settings),
                    "seconds": round(task.seconds, 3),
                    "measures": {name: as_json(one) for name, one in task.measures().items()},
                    "whole": sorted(task.whole),
                    "groups": {
                        axis: {
                            value: {name: as_json(one) for name, one in found.items()}
                            for value, found in values.items()
                        }
                        for axis, values in task.by_group().items()
                    },
                }
                for label, task in self.tasks.items()
            },
        }

    def save(self, path: Path | str) -> None:
        """Write the numbers to `path` and every answer, a line each, beside it."""
        write_text(
            answers_path(path),
            "".join(
                json.dumps({"task": label, **asdict(record)}, ensure_ascii=False) + "\n"
                for label, task in self.tasks.items()
                for record in task.records
            ),
        )
        write_json(path, self.summary())

    @classmethod
    def load(cls, path: Path | str) -> Results:
        summary = read_json(path)
        if not isinstance(summary, dict) or not isinstance(summary.get("tasks"), dict):
            raise TriviumError(f"{path} holds no evaluation; name a file that `trivium eval --json` wrote.")
        records: dict[str, list[Record]] = {label: [] for label in summary["tasks"]}
        beside = answers_path(path)
        if not beside.is_file():
            raise TriviumError(f"{beside} is missing: it belongs beside {path} and holds the single answers.")
        for line in beside.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            records[row.pop("task")].append(Record(**{**row, "answers": tuple(row["answers"])}))
        tasks = {
            label: TaskResult(
                one["task"], one["description"], tuple(one["headline"]), records[label], one["style"],
                one["settings"], {name: Interval(**one["measures"][name]) for name in one["whole"]},
                one["seconds"],
            )
            for label, one in summary["tasks"].items()
        }  # fmt: skip
        return cls(summary["model"], tasks)

    def table(self) -> list[list[str]]:
        """The headline numbers as rows for a person; the first row is the heading."""
        rows = [["task", "measure", "value", "95 % interval", "n"]]
        for label, task in self.tasks.items():
            for name, one in task.measures().items():
                if name in task.headline or name in task.whole:
                    rows.append(
                        [label, name, f"{one.value:.4g}", f"{one.low:.4g} to {one.high:.4g}", str(one.n)]
                    )
        return rows


def as_json(interval: Interval) -> dict[str, float | int | None]:
    """An interval for JSON, which has no infinity: an open end, or a value of nothing, is null."""
    plain = {"value": float(interval.value), "low": float(interval.low), "high": float(interval.high)}
    finite = {name: one if math.isfinite(one) else None for name, one in plain.items()}
    return {**finite, "n": int(interval.n)}


def answers_path(path: Path | str) -> Path:
    """Where the single answers lie: `out.json` has `out.answers.jsonl` beside it."""
    return Path(path).with_suffix(".answers.jsonl")


def quarters(values: Iterable[float]) -> Callable[[float], str]:
    """A name for the quarter a value lies in, the largest values being the first."""
    cuts = np.quantile(np.array(list(values), dtype=float), [0.75, 0.5, 0.25])
    names = ("1 most frequent", "2", "3", "4 least frequent")
    return lambda value: names[int((value < cuts).sum())]


def _natural(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), text)
    except ValueError:
        return (1, 0.0, text)
