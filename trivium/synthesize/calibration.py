"""What a judge is worth, found on pairs whose better answer a program knows (Zheng et al., 2023).

Accuracy counts a tie, and a verdict that changes with the order, as half. Position bias is how much more
often than half the answer shown first wins; length bias is accuracy where the better answer is the longer
one minus accuracy where it is the shorter one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trivium.evals.pairwise import accuracy, length_bias
from trivium.kit.errors import TriviumError
from trivium.kit.settings import Settings
from trivium.synthesize.row import Messages

FEWEST = 10


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, the better one known."""

    prompt: Messages
    better: str
    worse: str


@dataclass(frozen=True)
class Verdict:
    """Scores of the better and the worse answer, and how often the one shown first won (None: no order)."""

    better: float
    worse: float
    first: float | None = None


class Bounds(Settings):
    """From when on a judge is refused."""

    accuracy: float = 0.7
    """The least share of pairs that it has to rank as the program does."""
    position_bias: float = 0.25
    """The most by which the answer shown first may win more or less often than half."""
    length_bias: float | None = None
    """The most by which accuracy may differ between pairs whose better answer is longer and shorter."""


def calibrated(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The numbers of a judge."""
    better, worse = (np.array([getattr(one, name) for one in verdicts]) for name in ("better", "worse"))
    lengths = [np.array([len(getattr(one, name)) for one in pairs]) for name in ("better", "worse")]
    first = [one.first for one in verdicts if one.first is not None]
    length = length_bias(better, worse, *lengths)
    ends = [length.get(f"accuracy_where_better_is_{name}") for name in ("longer", "shorter")]
    return {
        "pairs": len(pairs),
        "accuracy": accuracy(better - worse),
        "position_bias": float(np.mean(first)) - 0.5 if first else None,
        "changes_with_order": float(np.mean([one == 0.5 for one in better])) if first else None,
        "length_bias": ends[0]["value"] - ends[1]["value"] if ends[0] and ends[1] else None,
        "length": length,
    }


def sentence(facts: dict[str, Any]) -> str:
    """The numbers in one line."""
    right = facts["accuracy"]
    parts = [
        f"right in {right['value']:.1%} of {facts['pairs']} pairs ({right['low']:.1%} to {right['high']:.1%})"
    ]
    for name, said in (("position_bias", "position bias"), ("length_bias", "length bias")):
        parts.append(f"{said} {facts[name]:+.2f}" if facts[name] is not None else f"no {said} to measure")
    if facts.get("silent"):
        parts.append(f"no score for {facts['silent']} of the texts")
    return ", ".join(parts)


def refuse(facts: dict[str, Any], bounds: Bounds, name: str) -> None:
    """Stop where a judge is worse than it may be."""
    trouble = []
    if facts["accuracy"]["value"] < bounds.accuracy:
        trouble.append(f"accuracy {facts['accuracy']['value']:.2f} is below {bounds.accuracy:g}")
    for measure in ("position_bias", "length_bias"):
        value, most = facts[measure], getattr(bounds, measure)
        if value is not None and most is not None and abs(value) > most:
            trouble.append(f"{measure.replace('_', ' ')} {value:+.2f} is beyond {most:g}")
    if trouble:
        raise TriviumError(
            f"The judge {name} is refused: {'; '.join(trouble)} ({sentence(facts)}); name another model or a "
            "better rubric, or change `bounds`."
        )
