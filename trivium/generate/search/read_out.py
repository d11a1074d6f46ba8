"""How an answer is chosen among scored solutions.

With solutions i, their scores s_i and answers a_i (Snell et al., 2408.03314; search-and-learn's read-outs):

    best      argmax_i s_i
    weighted  argmax_a sum_i s_i [a_i = a]
    majority  argmax_a sum_i [a_i = a]            (self-consistency, 2203.11171)

A node that was drawn several times counts as often. A solution whose answer cannot be read (None) votes for
none, and one that the scorer could not judge (-inf) counts only in `majority`. Of the solutions with the
chosen answer the best one is handed over; ties go to the one drawn first.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.generate.search.settings import ReadOut
from trivium.generate.search.tree import Node


@dataclass(frozen=True)
class Solution:
    """A finished path with its score and the answer read from it."""

    node: Node
    answer: str | None

    @property
    def score(self) -> float:
        """The score of the whole solution."""
        return self.node.score


def chosen(solutions: Sequence[Solution], how: ReadOut) -> Solution | None:
    """The solution to hand over; None of none."""
    if not solutions:
        return None
    best = max(solutions, key=lambda one: one.score)
    votes: dict[str, float] = defaultdict(float)
    for one in solutions:
        judged = how == "majority" or math.isfinite(one.score)
        if one.answer is not None and judged:
            votes[one.answer] += one.node.drawn * (one.score if how == "weighted" else 1.0)
    if how == "best" or not votes:
        return best
    answer = max(votes, key=lambda name: votes[name])
    return max((one for one in solutions if one.answer == answer), key=lambda one: one.score)
