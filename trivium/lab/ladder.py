"""A scaling ladder judged: what was forecast for the next size, and what that size came to."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from trivium.evals.scaling import Forecast, PowerLaw
from trivium.kit.files import read_json
from trivium.kit.numbers import short
from trivium.kit.seals import read_record
from trivium.lab.charts import Axis, Line, Panel, Table, axis
from trivium.lab.formatting import figure
from trivium.recipe.experiment import FORECAST, Ladder, rung
from trivium.stages.forecast import reached

HOLDS, MISSED, VAGUE = "the forecast holds", "the forecast missed", "the forecast says nothing"


def climbed(
    ladder: Ladder, folders: Mapping[tuple[str, int], Mapping[str, Path]], seeds: Sequence[int]
) -> dict[str, Any]:
    """The forecast as it was written, and the next size's runs beside it, ready for JSON."""
    assert ladder.stage is not None
    assert ladder.next is not None
    place = folders[rung(ladder.next), seeds[0]][FORECAST]
    written = read_json(place / "report" / "forecast.json")
    laws = [PowerLaw(*law) for law in written["resampled"]]
    chance = {name: written[name] for name in ("left", "wider", "spent", "missed")}
    found = Forecast(PowerLaw(*written["law"]), laws, **chance)
    trained = [folders[rung(ladder.next), seed][ladder.stage] for seed in seeds]
    runs = []
    for folder in trained:
        flops, value = reached(folder, ladder.take)
        low, high = found.interval(flops)
        expected = found.law.at(flops)
        runs.append({"flops": flops, "value": value, "forecast": expected, "low": low, "high": high})
    mean = math.fsum(run["value"] for run in runs) / len(runs)
    middle = {name: math.fsum(run[name] for run in runs) / len(runs) for name in ("forecast", "low", "high")}
    # The control: a forecast that allows the next size to be no better than the last one is none.
    last = [value for _, value in written["rungs"][-1]]
    unchanged = math.fsum(last) / len(last)
    return {
        "take": ladder.take,
        "depths": ladder.depths,
        "next": ladder.next,
        "rungs": written["rungs"],
        "law": written["law"],
        "table": written["table"],
        "missed": written["missed"],
        "runs": runs,
        "value": mean,
        **middle,
        "written_before": all(_written(place) <= _begun(folder) for folder in trained),
        "unchanged": unchanged,
        "verdict": judged(mean, middle["low"], middle["high"], unchanged),
    }


def judged(value: float, low: float, high: float, unchanged: float) -> str:
    """Whether what came lies in the interval; one that holds the last size's loss forecasts nothing."""
    if low <= unchanged <= high:
        return VAGUE
    return HOLDS if low <= value <= high else MISSED


def _begun(folder: Path) -> datetime:
    return datetime.fromisoformat(str(read_record(folder)["started"]))


def _written(folder: Path) -> datetime:
    return _begun(folder) + timedelta(seconds=int(read_record(folder)["seconds"]))


def sentence(found: Mapping[str, Any]) -> str:
    """The verdict in words."""
    when = "before" if found["written_before"] else "not before"
    floor, _, power = found["law"]
    return (
        f"Depth {found['next']} came to {figure(found['value'])} {found['take'].replace('_', ' ')}; "
        f"{expected(found)} was forecast, written {when} it was trained, "
        f"from a law that falls with compute to the power {figure(power)}"
        f"{f' towards {figure(floor)}' if floor else ''}. {_tried(found)} "
        f"The control, no change from the last size, is {figure(found['unchanged'])}."
    )


def _tried(found: Mapping[str, Any]) -> str:
    """How well the fitted sizes were forecast from those before them."""
    tried = found["depths"][-len(found["missed"]) :]
    off = ", ".join(
        f"depth {depth} by {figure(by)}" for depth, by in zip(tried, found["missed"], strict=True)
    )
    return f"Forecasts of the sizes before missed {off}; the interval allows for as much."


def expected(found: Mapping[str, Any]) -> str:
    """The forecast with its interval."""
    return f"{figure(found['forecast'])} ({figure(found['low'])} to {figure(found['high'])})"


def table(found: Mapping[str, Any]) -> list[list[str]]:
    """The verdict as rows for a terminal."""
    return [
        ["next size", found["take"].replace("_", " "), "forecast (95 %)", "verdict"],
        [f"depth {found['next']}", figure(found["value"]), expected(found), found["verdict"]],
    ]


def drawn(found: Mapping[str, Any]) -> dict[str, Any]:
    """The law with its band from the smallest size to the next one, and every run."""
    runs = [tuple(run) for rung_ in found["rungs"] for run in rung_]
    new = [(run["flops"], run["value"]) for run in found["runs"]]
    most = max(flops for flops, _ in new)
    ahead = [one for one in found["table"] if one["flops"] <= 1.6 * most]
    law = PowerLaw(*found["law"])
    line = [(flops, law.at(flops), None, None) for flops in sorted(flops for flops, _ in runs)]
    line += [(one["flops"], one["value"], one["low"], one["high"]) for one in ahead]
    values = [value for _, value in [*runs, *new]] + [
        end for one in ahead for end in (one["low"], one["high"])
    ]
    low, high = min(flops for flops, _ in runs), max(most, *(one["flops"] for one in ahead))
    ticks = [low * (high / low) ** (step / 3) for step in range(4)]
    x = Axis(low, high, ticks, "FLOPs", lambda value: "" if value is None else short(value), logarithmic=True)
    y = axis(values, found["take"].replace("_", " "))
    lines = [Line("forecast", line, "main", dots=False)]
    lines += [Line("fitted", [(*run, None, None) for run in runs], "other")]
    lines += [Line("next size", [(*run, None, None) for run in new], "other")]
    rows = [
        [
            f"depth {depth}",
            " ".join(short(run[0]) for run in rung_),
            " ".join(figure(run[1]) for run in rung_),
            "",
        ]
        for depth, rung_ in zip(found["depths"], found["rungs"], strict=True)
    ]
    rows.append([
        f"depth {found['next']}", " ".join(short(run["flops"]) for run in found["runs"]),
        " ".join(figure(run["value"]) for run in found["runs"]), expected(found),
    ])  # fmt: skip
    heading = ["size", "FLOPs of each seed", found["take"].replace("_", " "), "forecast (95 %)"]
    panel = Panel("the ladder", lines, x, y, latest=figure(found["value"]))
    return {
        "panels": [panel],
        "table": Table(heading, rows, "Sizes, and what was forecast"),
        "says": sentence(found),
    }
