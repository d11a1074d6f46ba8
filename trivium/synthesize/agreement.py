"""What most of several answers say (self-consistency, Wang et al., 2022)."""

from collections.abc import Sequence

from trivium.grade.maths.extract import after_thinking, marked_answers
from trivium.grade.maths.scorer import MathScorer

_SCORER = MathScorer()


def stated(text: str) -> str:
    """The answer that a text gives: the last it marks, else all of it in one line."""
    spoken = after_thinking(text)
    marked = marked_answers(spoken) if spoken is not None else None
    if marked is not None and marked.answers:
        return marked.answers[-1].strip()
    return " ".join((spoken or "").split())


def majority(texts: Sequence[str]) -> tuple[str, set[int]]:
    """The commonest answer and who gives it; of equally common ones the first. Nothing said agrees with
    none."""
    groups: list[tuple[str, set[int]]] = []
    for place, text in enumerate(texts):
        said = stated(text)
        if not said:
            continue
        for known, members in groups:
            if said == known or _SCORER.compare(said, known).value == 1.0:
                members.add(place)
                break
        else:
            groups.append((said, {place}))
    return max(groups, key=lambda group: (len(group[1]), -min(group[1])), default=("", set()))
