"""The scorer of next-token reasoning: does the answer go on as the text does?"""

from dataclasses import dataclass
from typing import Any

from trivium.grade.maths.extract import after_thinking
from trivium.grade.maths.scorer import shorten
from trivium.grade.scorer import Score, column


@dataclass(frozen=True)
class ContinuationScorer:
    """The share of the text's next words that the answer names, from the first on (2506.08007)."""

    name: str = "continuation"

    def __call__(self, completion: str, **columns: Any) -> Score:
        wanted = str(column(columns, ("continuation",), self.name)).split()
        if not wanted:
            return Score(None, "the text does not go on", "gold_bad")
        said = after_thinking(completion)
        if said is None:
            return Score(0.0, "the answer never stopped thinking", "unparsed")
        right = 0
        for word, one in zip(wanted, said.split(), strict=False):
            if word != one:
                break
            right += 1
        reason = f"{right} of the next {len(wanted)} words, {shorten(' '.join(wanted))}"
        return Score(right / len(wanted), reason, "ok" if right == len(wanted) else "wrong")
