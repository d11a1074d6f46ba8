"""Regular expressions that a row or a recipe brings, matched in a process that can be killed.

Python's `re` backtracks, so that some patterns take practically for ever with some texts, and a thread that
matches one cannot be stopped.
"""

from pathlib import Path

from trivium.grade.answering_process import Helper, Late, Unusable
from trivium.kit.errors import TriviumError

_SECONDS = 2.0
_helper = Helper(Path(__file__).with_name("patterns_child.py"))


def matches(pattern: str, text: str, whole: bool, seconds: float = _SECONDS) -> bool:
    """Whether a pattern matches the whole text, or is found in it; `Late` where that takes too long."""
    try:
        answer = _helper.ask([pattern, text, whole], seconds)
    except Unusable as error:
        raise TriviumError(f"Regular expressions cannot be matched here: {error}.") from error
    if isinstance(answer, str):
        raise TriviumError(f"The pattern {pattern[:200]!r} is no regular expression: {answer}.")
    return bool(answer)


__all__ = ["Late", "matches"]
