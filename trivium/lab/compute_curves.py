"""A measure against the FLOPs spent, of every arm of an experiment: what reaching a value costs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.kit.metrics import read_metrics
from trivium.kit.numbers import short
from trivium.kit.seals import read_record
from trivium.lab.charts import Axis, Line, Panel, Table, axis
from trivium.lab.formatting import figure


def curve(folders: Sequence[Path], column: str) -> list[list[float]]:
    """[total FLOPs, value] along the stages of one arm, in the order in which they ran.

    What earlier stages cost counts: a small model that is grown brings its own FLOPs along.
    """
    found: list[list[float]] = []
    before = 0.0
    for folder in folders:
        record = read_record(folder)
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if "flops" in row]
        found += [[before + row["flops"], row[column]] for row in rows if column in row]
        before += record.get("flops") or 0.0
    return found


def reached(points: Sequence[Sequence[float]], target: float) -> float | None:
    """The FLOPs after which a falling curve first lies at the target, between two points by proportion."""
    last: Sequence[float] | None = None
    for point in points:
        if point[1] <= target:
            if last is None or last[1] <= point[1]:
                return point[0]
            return last[0] + (point[0] - last[0]) * (last[1] - target) / (last[1] - point[1])
        last = point
    return None


def targets(curves: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> list[float]:
    """Two values: the worst arm's end, which all reach, and half way from it to the best end."""
    ends = [math.fsum(seed[-1][1] for seed in seeds) / len(seeds) for seeds in curves.values() if seeds]
    worst, best = max(ends), min(ends)
    return [worst, (worst + best) / 2]


def summary(
    curves: Mapping[str, list[list[list[float]]]], wanted: Sequence[float], column: str
) -> dict[str, Any]:
    """What the experiment's JSON holds: the curves, and the FLOPs to each target by arm and seed."""
    found = []
    for target in list(wanted) or targets(curves):
        spent = {arm: [reached(seed, target) for seed in seeds] for arm, seeds in curves.items()}
        found.append({"target": target, "flops": spent})
    return {"take": column, "arms": curves, "targets": found}


def drawn(found: Mapping[str, Any]) -> dict[str, Any]:
    """The curves of the first seed as panels, one for each arm over all others, and the table of targets."""
    shown = {arm: seeds[0] for arm, seeds in found["arms"].items() if seeds and seeds[0]}
    points = [point for one in shown.values() for point in one]
    x: Axis = axis([point[0] for point in points], "total FLOPs", _short, zero=True)
    values = sorted(point[1] for point in points)
    # The first measurements of a training would flatten all that follows.
    y = axis(values[: max(2, len(values) * 9 // 10)], found["take"].replace("_", " "))
    panels = []
    for arm in shown:
        others = [_line(name, one, "faint") for name, one in shown.items() if name != arm]
        lines = [*others, _line(arm, shown[arm], "main")]
        panels.append(Panel(arm, lines, x, y, latest=figure(shown[arm][-1][1])))
    rows = []
    for one in found["targets"]:
        for arm, seeds in one["flops"].items():
            known = [value for value in seeds if value is not None]
            mean = short(sum(known) / len(known)) if len(known) == len(seeds) and known else "not reached"
            each = " ".join("–" if value is None else short(value) for value in seeds)
            rows.append([figure(one["target"]), arm, mean, each])
    heading = ["target", "arm", "FLOPs, mean over seeds", "each seed"]
    return {"panels": panels, "table": Table(heading, rows, "FLOPs until the target is reached")}


def _short(value: float | None) -> str:
    return "" if value is None else short(value)


def _line(name: str, points: Sequence[Sequence[float]], look: str) -> Line:
    return Line(name, [(x, y, None, None) for x, y in points], look, dots=look == "main")
