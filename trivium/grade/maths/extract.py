"""Finding the answer that a completion gives: boxed, behind four hashes, or announced in words."""

import re
from dataclasses import dataclass

from trivium.grade.maths.notation import partners

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)|\\boxed\s+(?P<bare>[^\s$\\{}]+)")
_HASHES = re.compile(r"^[ \t]*#{4}[ \t]*(?P<answer>.+?)[ \t]*$", re.M)
_ANNOUNCED = re.compile(r"(?:final answer|the answer|answer)\s*(?:is|:|=)+\s*:?\s*(?P<answer>[^\n]+)", re.I)


@dataclass(frozen=True)
class Marked:
    """The answers a completion marks as its own, and how."""

    how: str
    answers: tuple[str, ...]


def after_thinking(text: str) -> str | None:
    """What a completion says after it has thought, or None where it never stopped thinking."""
    if "</think>" in text:
        return text.rpartition("</think>")[2]
    return None if "<think>" in text else text


def marked_answers(text: str) -> Marked:
    """Every boxed or hashed answer; failing those the announced ones; failing those a short text itself."""
    answers = [*_boxed(text), *(match["answer"] for match in _HASHES.finditer(text))]
    if answers:
        return Marked("marked", tuple(answers))
    announced = [match["answer"].strip().strip("*").strip() for match in _ANNOUNCED.finditer(text)]
    if announced:
        return Marked("announced", tuple(dict.fromkeys(announced)))
    whole = text.strip()
    if whole and "\n" not in whole and len(whole) <= 200:
        return Marked("whole", (whole,))
    return Marked("none", ())


def _boxed(text: str) -> list[str]:
    found = []
    ends = partners(text)
    for match in _BOXED.finditer(text):
        if match["bare"] is not None:
            found.append(match["bare"])
            continue
        if match.end() in ends:
            found.append(text[match.end() + 1 : ends[match.end()]].strip())
    return found
