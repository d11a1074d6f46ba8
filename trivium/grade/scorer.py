"""What every scorer gives back, and the table of scorers by name."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

from trivium.kit.errors import TriviumError, nearest

Status = Literal["ok", "wrong", "unparsed", "compile", "overtime", "memory", "gold_bad", "timeout", "fault"]

GRADER_FAULTS: frozenset[str] = frozenset({"gold_bad", "timeout", "fault"})


@dataclass(frozen=True)
class Score:
    """A number, or None where the grader itself could not judge, with a reason a person can read."""

    value: float | None
    reason: str
    status: Status

    def __post_init__(self) -> None:
        # A grader's own fault must never be learned from as if the answer had been wrong.
        assert (self.value is None) == (self.status in GRADER_FAULTS), (self.value, self.status)


class Scorer(Protocol):
    """Anything that turns one completion and its row's columns into a Score."""

    name: str

    def __call__(self, completion: str, **columns: Any) -> Score: ...


_PLACES = {
    "math": "trivium.grade.maths.scorer:MathScorer",
    "steps": "trivium.grade.steps:StepsScorer",
    "code": "trivium.grade.code:CodeScorer",
    "continuation": "trivium.grade.continuation:ContinuationScorer",
    "sql": "trivium.grade.sql:SqlScorer",
    "format": "trivium.grade.format:FormatScorer",
    "instructions": "trivium.grade.instructions:InstructionsScorer",
    "random": "trivium.grade.chance:RandomScorer",
    "learned": "trivium.grade.learned:learned_scorer",
}


def scorer_names() -> list[str]:
    """The names that `scorer` knows."""
    return sorted(_PLACES)


def scorer(name: str, **settings: Any) -> Scorer:
    """Make the scorer of that name with these settings."""
    place = _PLACES.get(name)
    if place is None:
        near = nearest(name, scorer_names()) or f"; choose one of {', '.join(scorer_names())}."
        raise TriviumError(f"There is no scorer called {name!r}{near}")
    module, attribute = place.split(":")
    make: Callable[..., Scorer] = getattr(import_module(module), attribute)
    try:
        return make(**settings)
    except TypeError as error:
        raise TriviumError(f"The scorer {name!r} does not take these settings: {error}.") from error


def ready(scorer: Scorer) -> None:
    """Try what a scorer needs besides this process, such as one of its own; one sentence if that fails."""
    attempt = getattr(scorer, "ready", None)
    if attempt is not None:
        attempt()


def column(columns: dict[str, Any], names: tuple[str, ...], scorer_name: str) -> Any:
    """The first of these columns that the row has, or an error that names them."""
    for name in names:
        if columns.get(name) is not None:
            return columns[name]
    raise TriviumError(
        f"The scorer {scorer_name!r} needs one of the columns {', '.join(names)}; "
        f"the row has {', '.join(sorted(columns)) or 'none'}."
    )
