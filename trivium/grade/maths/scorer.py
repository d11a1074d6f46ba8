"""The scorer of mathematical answers."""

import re
from dataclasses import dataclass
from typing import Any

from trivium.grade.maths.answers import Answer, Quantity, read_answer
from trivium.grade.maths.compare import Undecided, same
from trivium.grade.maths.expressions import number
from trivium.grade.maths.extract import after_thinking, marked_answers
from trivium.grade.maths.notation import LONGEST_ANSWER, tidy
from trivium.grade.maths.tokens import Unreadable
from trivium.grade.scorer import Score, column

GOLD_COLUMNS = ("gold", "answer", "solution", "ground_truth", "target")
_CHOICE = re.compile(r"^\(?([A-J])(?:\)|[.:]|\s*$)")


@dataclass(frozen=True)
class MathScorer:
    """One where the completion's one answer is the row's, nought where it is not."""

    name: str = "math"
    tolerance: float = 0.0
    symbolic: bool = False
    """Without effect, as `seconds`: earlier recipes may set them."""
    seconds: float = 5.0

    def __call__(self, completion: str, **columns: Any) -> Score:
        gold = gold_answer(str(column(columns, GOLD_COLUMNS, self.name)))
        spoken = after_thinking(completion)
        marked = marked_answers(spoken) if spoken is not None else None
        if marked is None or not marked.answers:
            return Score(0.0, "no answer was found in the text", "unparsed")
        answers = list(dict.fromkeys(marked.answers))
        if len(answers) > 20:
            return Score(0.0, f"{len(answers)} answers are marked, where one is wanted", "wrong")
        for other in answers[:-1]:
            if self.compare(answers[-1], other).value != 1.0:
                return Score(0.0, f"several different answers are marked: {shorten(other)} and "
                             f"{shorten(answers[-1])}", "wrong")  # fmt: skip
        return self.compare(answers[-1], gold)

    def compare(self, answer: str, gold: str) -> Score:
        """Score one answer, already found, against the gold answer."""
        if len(gold) > LONGEST_ANSWER or not gold.strip():
            return Score(None, "the gold answer is empty or too long to read", "gold_bad")
        if len(answer) > LONGEST_ANSWER:
            return Score(0.0, "the answer is too long to read", "unparsed")
        if _spelling(answer) == _spelling(gold):
            return Score(1.0, f"{shorten(answer)} is the gold answer letter by letter", "ok")
        wanted, gold_trouble = _read(gold)
        given, trouble = _read(answer, isinstance(wanted, Quantity) and wanted.unit is not None)
        if isinstance(given, Quantity) and given.unit is not None and wanted is not None:
            wanted = _read(gold, glued_units=True)[0] or wanted
        choice = _CHOICE.match(gold.strip())
        if choice and _spelling(gold).strip("().:") == choice[1]:
            picked = _CHOICE.match(tidy(answer).replace('"', "").strip())
            if picked:
                right = picked[1] == choice[1]
                return _verdict(right, answer, gold)
        if wanted is not None and given is not None:
            try:
                return _verdict(same(wanted, given, self.tolerance), answer, gold)
            except (Undecided, RecursionError, ArithmeticError):
                trouble = "it could not be compared"
                if not _comparable(wanted):
                    wanted, gold_trouble = None, "it could not be compared with anything"
        if wanted is None:
            return Score(None, f"the gold answer {shorten(gold)} cannot be read: {gold_trouble}", "gold_bad")
        return Score(0.0, f"the answer {shorten(answer)} cannot be read: {trouble}", "unparsed")


def gold_answer(text: str) -> str:
    """The answer within a gold column, which may be a whole worked solution."""
    marked = marked_answers(text)
    return marked.answers[-1] if marked.how == "marked" else text.strip()


def shorten(text: str, most: int = 60) -> str:
    """A text short enough for a reason that a person reads."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def _spelling(text: str) -> str:
    return re.sub(r"\s*([,;()\[\]{}=+*/^])\s*", r"\1", tidy(text))


def _read(text: str, glued_units: bool = False) -> tuple[Answer | None, str]:
    try:
        return read_answer(text, glued_units), ""
    except Unreadable as error:
        return None, str(error)
    except RecursionError:
        return None, "it is nested too deeply"


def _comparable(gold: Answer) -> bool:
    """Whether a gold answer can be compared with a plain number, so that a failure is not its own."""
    try:
        same(gold, Quantity(number(7)))
    except (Undecided, RecursionError, ArithmeticError):
        return False
    return True


def _verdict(right: bool, answer: str, gold: str) -> Score:
    if right:
        return Score(1.0, f"{shorten(answer)} equals {shorten(gold)}", "ok")
    return Score(0.0, f"{shorten(answer)} is not {shorten(gold)}", "wrong")
