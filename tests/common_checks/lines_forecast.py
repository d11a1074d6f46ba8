"""Settings of forecast: which models it is made from, and which of their numbers."""

from __future__ import annotations

from typing import Any

from lines import moves
from tiny_run import Seen

from trivium.kit.files import read_json

KIND = ["forecast"]


def told(seen: Seen) -> dict[str, Any]:
    """What the stage wrote."""
    found: dict[str, Any] = read_json(seen.folder / "report" / "forecast.json")
    return found


@moves("of", [["forked"], ["base"], ["wide"]], kinds=KIND)
def of(before: Seen, after: Seen) -> None:
    assert [len(rung) for rung in told(before)["rungs"]] == [1, 2, 1]
    assert [len(rung) for rung in told(after)["rungs"]] == [1, 1, 1]
    assert told(before)["law"] != told(after)["law"]


@moves("take", "grad_norm", kinds=KIND)
def take(before: Seen, after: Seen) -> None:
    flops, other = ([run[0] for run in told(one)["rungs"][2]] for one in (before, after))
    assert flops == other
    assert told(before)["rungs"] != told(after)["rungs"]


@moves("seed", 2, kinds=KIND)
def seed(before: Seen, after: Seen) -> None:
    assert told(before)["law"] == told(after)["law"]
    assert told(before)["resampled"] != told(after)["resampled"]
