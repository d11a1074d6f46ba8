"""One number of one stage that ran, and what a line of stages cost."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.evals.statistics import CONFIDENCE, normal_quantile
from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import read_json
from trivium.kit.metrics import read_metrics
from trivium.kit.seals import read_record
from trivium.lab.formatting import figure

EARLIER = {
    "right": "accuracy",
    "chosen": "multiple-choice accuracy",
    "gave way": "flip rate",
    "mended by a true hint": "accepts correction",
    "prefers flattery": "prefers sycophancy",
    "surer than right": "overconfidence",
}
"""Earlier names of measures, each with the present one."""


@dataclass(frozen=True)
class Number:
    """A number, and the standard error its questions leave: endless where they bound nothing."""

    value: float
    error: float = 0.0


def taken(folder: Path, take: str) -> Number:
    """The number called so: of the report the stage wrote, of its summary, or the last one in its log."""
    report = folder / "report" / "results.json"
    found = _reported(read_json(report)) if report.is_file() else _logged(folder)
    take = _present(take)
    if take not in found:
        raise TriviumError(
            f"{folder.name} has no number `{take}`{nearest(take, found) or f'; it has {_listed(found)}.'}"
        )
    return found[take]


def _present(take: str) -> str:
    """The present name of a measure that a recipe calls by an earlier one."""
    label, colon, measure = take.partition(": ")
    name, comma, group = measure.partition(", ")
    return f"{label}{colon}{EARLIER.get(name, name)}{comma}{group}"


def cost(folders: Iterable[Path]) -> dict[str, float]:
    """The tokens that a line of stages learnt from, the seconds it took, and its FLOPs."""
    records = [read_record(folder) for folder in folders]
    tokens = sum((one.get("summary") or {}).get("tokens", 0) for one in records if one["produces"] == "model")
    flops = sum(one.get("flops") or 0.0 for one in records)
    return {
        "tokens": float(tokens),
        "seconds": float(sum(one["seconds"] for one in records)),
        "flops": float(flops),
    }


def _reported(summary: Mapping[str, Any]) -> dict[str, Number]:
    """`task: measure`, and `task: measure, group=value` for every group there is."""
    found: dict[str, Number] = {}
    for label, task in summary["tasks"].items():
        for name, interval in task["measures"].items():
            found[f"{label}: {name}"] = _number(interval)
        for axis, values in task["groups"].items():
            for value, measures in values.items():
                for name, interval in measures.items():
                    found[f"{label}: {name}, {axis}={value}"] = _number(interval)
    return found


def _number(interval: Mapping[str, Any]) -> Number:
    low, high = interval["low"], interval["high"]
    width = high - low if low is not None and high is not None else math.inf
    return Number(interval["value"], width / 2 / normal_quantile(0.5 + CONFIDENCE / 2))


def _logged(folder: Path) -> dict[str, Number]:
    """The last value of every column of the log, and what the summary says."""
    found: dict[str, Number] = {}
    for row in [*read_metrics(folder / "metrics.jsonl"), read_record(folder).get("summary") or {}]:
        for name, value in row.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                found[name] = Number(float(value))
    return found


def _listed(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:30]) + (" ..." if len(names) > 30 else "")


def interval(found: Mapping[str, Any]) -> str:
    """An interval in words; one seed leaves it open, and so does what nothing bounds."""
    if found["low"] is None:
        return "open: one seed" if found["n"] == 1 else "open: nothing bounds it"
    return f"{figure(found['low'])} to {figure(found['high'])}"
