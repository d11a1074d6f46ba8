"""Labels for a quality classifier from a judge, who is tried first on texts whose score is known."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from trivium.data.sources import Document
from trivium.generate.asking.journal import ANSWERS, answers_beside, keep_answers
from trivium.generate.asking.rubric import TextJudge
from trivium.kit.fingerprint import fingerprint
from trivium.kit.numbers import Count
from trivium.kit.steps import NamedStep
from trivium.stages.parts.stage import Work
from trivium.synthesize.calibration import FEWEST, Bounds, Pair, Verdict, calibrated, refuse, sentence

PAIRS = 100
"""On so many pairs of texts with known scores a judge is tried at most."""


class LabelJudge(NamedStep, TextJudge):
    """A model that labels texts by a rubric."""

    name: ClassVar[str] = "judge"
    short: ClassVar[str] = "model"

    rows: Count = Field(default=500, ge=1)
    """How many texts it labels, drawn at random."""
    bounds: Bounds = Bounds()
    """From when on the judge is refused, where texts have known scores."""


@dataclass
class JudgeLabels:
    """The texts that have a label now, what the judge is worth, and what it cost."""

    documents: list[Document]
    labels: list[float]
    facts: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


def judge_labels(work: Work, judge: LabelJudge, documents: Sequence[Document], known: str) -> JudgeLabels:
    """Let the judge label some of the documents; those with a number in the column `known` try it first."""
    drawn = sorted(documents, key=lambda one: fingerprint(["drawn", work.seed, one.text]))
    some = drawn[: judge.rows]
    trial = [one for one in drawn if _number(one.fields.get(known)) is not None][: 2 * PAIRS]
    texts = [one.text or "" for one in (*trial, *some)]
    folder = work.path(judge.model) if judge.model is not None else None
    journal = work.folder / "checkpoints" / ANSWERS
    found = judge.scores(texts, folder, journal, answers_beside(work.folder))
    keep_answers([journal], work.folder / ANSWERS)
    name = found.facts["judge"]
    facts = {"judge": name, "rubric": judge.rubric, "scale": list(judge.scale)}
    facts["calibration"] = _calibrated(work, judge, name, trial, found.scores[: len(trial)], known)
    labelled = [
        (one, score) for one, score in zip(some, found.scores[len(trial) :], strict=True) if score is not None
    ]
    facts |= {"labelled": len(labelled), "without a score": len(some) - len(labelled)}
    paid = ("requests", "tokens", "money")
    cost = {what: value for what, value in found.facts.items() if what in paid}
    work.say(
        f"judge {name}: {len(labelled):,} of {len(some):,} texts have a score; "
        f"{cost['tokens']:,} tokens in {cost['requests']:,} requests"
    )
    if "first failure" in found.facts:
        count = found.facts["not answered"]
        work.say(f"{count:,} texts were not answered, the first since: {found.facts['first failure']}")
    return JudgeLabels([one for one, _ in labelled], [score for _, score in labelled], facts, cost)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _calibrated(
    work: Work, judge: LabelJudge, name: str, trial: Sequence[Document], scores: Sequence[float | None],
    known: str,
) -> dict[str, Any] | None:  # fmt: skip
    """How often the judge ranks two texts as their known scores do; refused where that is too seldom."""
    order = np.argsort([_number(one.fields[known]) or 0.0 for one in trial], kind="stable")
    pairs: list[Pair] = []
    verdicts: list[Verdict] = []
    # Of equally many texts, the lowest of one half against the lowest of the other, and so on.
    for low, high in zip(order, order[len(order) // 2 :]):
        worse, better = trial[low], trial[high]
        if worse.fields[known] < better.fields[known] and len(pairs) < PAIRS:
            pairs.append(Pair([], better.text or "", worse.text or ""))
            said = [judge.scale[0] if scores[one] is None else scores[one] for one in (high, low)]
            verdicts.append(Verdict(*(float(one) for one in said)))  # type: ignore[arg-type]
    if len(pairs) < FEWEST:
        work.say(
            f"judge {name}: taken at its word, since {len(pairs)} pairs of texts have different known "
            f"scores; with {FEWEST} in the column `{known}` it would be tried"
        )
        return None
    facts = calibrated(pairs, verdicts) | {"silent": list(scores).count(None)}
    work.say(f"judge {name}: {sentence(facts)}")
    refuse(facts, judge.bounds, name)
    return facts
