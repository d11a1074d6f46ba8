"""The scorer of worked solutions: every line that claims an equality is worked out again."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from trivium.grade.maths.expressions import exact
from trivium.grade.maths.extract import after_thinking
from trivium.grade.maths.notation import tidy
from trivium.grade.maths.parser import read_expression
from trivium.grade.maths.scorer import shorten
from trivium.grade.maths.tokens import Unreadable, cut
from trivium.grade.scorer import Score

_MOST_LINES = 400
_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_SIDE = r"[-+(\d.][-+*/^()\d.,\s]*"
_CHAIN = re.compile(rf"(?<![\w.^*/+]){_SIDE}(?:=\s*{_SIDE})+")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)\s*%(\s*of\b)?")


@dataclass(frozen=True)
class StepsScorer:
    """The share of a solution's steps that are right; `all_or_nothing` wants every one."""

    name: str = "steps"
    all_or_nothing: bool = False

    def __call__(self, completion: str, **columns: Any) -> Score:
        spoken = after_thinking(completion)
        # The thinking is where the work is; an answer cut off inside it still shows its steps.
        text = spoken if spoken is not None and "=" in spoken else completion
        verdicts: dict[str, str | None] = {}
        for line in text.splitlines()[:_MOST_LINES]:
            for step in steps_in(line):
                verdicts.setdefault(step, mistake(step))
        verdicts.pop("", None)
        if not verdicts:
            return Score(0.0, "the solution shows no step that can be checked", "unparsed")
        wrong = [trouble for trouble in verdicts.values() if trouble]
        right = len(verdicts) - len(wrong)
        if not wrong:
            return Score(1.0, f"all of the {right} steps hold", "ok")
        value = 0.0 if self.all_or_nothing else right / len(verdicts)
        return Score(value, f"{right} of {len(verdicts)} steps hold; {wrong[0]}", "wrong")


def steps_in(line: str) -> list[str]:
    """The equalities between numbers that a line claims; that a number is itself is no step."""
    if len(line) > 2000:
        return []
    found = _ANNOTATION.findall(line)
    rest = tidy(_ANNOTATION.sub("", line)).replace("\\currency ", "").replace('"', " ")
    rest = re.sub(r"\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1/\2)", rest)
    rest = _PERCENT.sub(lambda m: f"({m[1]}/100){'*' if m[2] else ''}", rest)
    rest = re.sub(r"(?<=\d)\s*[x×]\s*(?=[\d(])", "*", rest)
    found += [match[0] for match in _CHAIN.finditer(rest)]
    steps = []
    for step in found:
        step = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", step).strip().rstrip(".,")
        step = re.sub(r"\s*([-+*/^=()])\s*", r"\1", step)
        sides = step.split("=")
        if len(sides) >= 2 and len(set(sides)) > 1 and all(re.search(r"\d", side) for side in sides):
            steps.append(step)
    return list(dict.fromkeys(steps))


def mistake(step: str) -> str | None:
    """What is wrong with a step, or None where nothing is."""
    values: list[Fraction] = []
    sides = step.split("=")
    for side in sides:
        try:
            value = exact(read_expression(cut(_PERCENT.sub(r"(\1/100)", side))))
        except (Unreadable, RecursionError):
            value = None
        if value is None:
            return f"{shorten(step)} cannot be worked out"
        values.append(value)
    for side, value in zip(sides[1:], values[1:], strict=True):
        if value != values[0] and not _rounded(values[0], side):
            return f"{shorten(step)} is wrong: {sides[0]} is {_spelled(values[0])}"
    return None


def labels_of_steps(steps: Sequence[str], worked: Sequence[str] | None = None) -> list[float]:
    """1 for every step up to the first wrong one and 0 from it on: what an exact checker says of a solution.

    A step is wrong that claims an equality which does not hold. Where the `worked` lines of the problem are
    known it also has to claim the equality whose turn it is, and a line without one the result of the last.
    """
    expected = None if worked is None else [claim for line in worked for claim in steps_in(line)]
    labels, turn, right = [], 0, True
    for step in steps:
        claims = steps_in(step)
        right = right and not any(mistake(claim) for claim in claims)
        if expected is not None:
            if claims:
                right = right and expected[turn : turn + len(claims)] == claims
                turn += len(claims)
            elif numbers := re.findall(r"-?\d+(?:\.\d+)?", step):
                result = expected[-1].rpartition("=")[2] if expected else numbers[-1]
                right = right and turn == len(expected) and numbers[-1] == result
        labels.append(float(right))
    return labels


def _rounded(value: Fraction, written: str) -> bool:
    """Whether a decimal is this value rounded to the places it shows, which must be two or more."""
    places = re.fullmatch(r"-?\d*\.(\d{2,})", written)
    return places is not None and abs(Fraction(written) - value) * 2 * 10 ** len(places[1]) <= 1


def _spelled(value: Fraction) -> str:
    text = str(value) if value.denominator < 100 else f"{float(value):.6g}"
    return shorten(text)
