"""How well the steps of a solution are judged: accuracy, calibration, and whether the first error is found.

ProcessBench (Zheng et al., 2412.06559): the judge names the first step whose score lies below a threshold, or
none. `accuracy_error` is the share of wrong solutions whose first wrong step is named, `accuracy_correct` the
share of right ones in which none is, and F1 their harmonic mean.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trivium.data.steps import labelled_steps, split_steps
from trivium.evals.asking import Subject
from trivium.evals.knowledge import questions
from trivium.evals.published import rows_of
from trivium.evals.results import Record, as_json
from trivium.evals.settings import Settings
from trivium.evals.statistics import Interval, bootstrap_of, wilson
from trivium.evals.task import Found, as_task
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.grade.process import ProcessScorer
from trivium.grade.steps import labels_of_steps
from trivium.kit.errors import TriviumError

THRESHOLD = 0.5
BINS = 10
NONE = -1
UNREAD = -2
"""What a judge names that cannot read a solution, which is never right."""


def first_below(scores: Sequence[float], threshold: float = THRESHOLD) -> int:
    """The number of the first step that scores below the threshold, counted from 0; -1 where none does."""
    return next((place for place, score in enumerate(scores) if score < threshold), NONE)


def first_wrong(labels: Sequence[float]) -> int | None:
    """The number of the first step labelled wrong, counted from 0; -1 where all are right.

    None where it is not known, as a step before it, or any where none is wrong, has no label (NaN).
    """
    for place, label in enumerate(labels):
        if math.isnan(label):
            return None
        if label < 0.5:
            return place
    return NONE


def f1_of(found: np.ndarray) -> float:
    """F1 from [solutions, 2]: the first error (-1: none), and which step was named."""
    wrong, hit = found[:, 0] != NONE, found[:, 0] == found[:, 1]
    if wrong.all() or not wrong.any():
        return float(hit.mean())
    error, correct = float(hit[wrong].mean()), float(hit[~wrong].mean())
    return 0.0 if error + correct == 0 else 2 * error * correct / (error + correct)


def first_error_measures(truth: Sequence[int], named: Sequence[int]) -> dict[str, Interval]:
    """`first-error F1` and the two shares it is made of, with 95 % intervals."""
    found = np.array([truth, named]).T
    wrong, hit = found[:, 0] != NONE, found[:, 0] == found[:, 1]
    measures = {"first-error F1": bootstrap_of(f1_of, found, resamples=500)}
    for name, some in (("accuracy_error", wrong), ("accuracy_correct", ~wrong)):
        if some.any():
            measures[name] = wilson(float(hit[some].sum()), int(some.sum()))
    return measures


def calibration_of_steps(scores: np.ndarray, labels: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """How often steps of a score were right: [said, was, steps] per bin, and the mean distance of the two."""
    place = np.minimum((scores * bins).astype(int), bins - 1)
    found = [
        [float(scores[place == one].mean()), float(labels[place == one].mean()), int((place == one).sum())]
        for one in range(bins)
        if (place == one).any()
    ]
    error = sum(abs(said - was) * count for said, was, count in found) / max(1, len(scores))
    return {"calibration": found, "calibration_error": error}


def step_report(
    scores: Sequence[Sequence[float]],
    labels: Sequence[Sequence[float]],
    threshold: float = THRESHOLD,
    cut: Sequence[bool] | None = None,
) -> dict[str, Any]:
    """What a judge of steps is worth on labelled solutions; NaN is a step without a label.

    Of a solution that was cut before its first wrong step, where it has one, nothing is known about the first
    error, and neither where a step before it has no label: the steps that have one count, and the first-error
    measures leave the solution out.
    """
    said = np.concatenate([np.array(one) for one in scores])
    true = np.concatenate([np.array(one) for one in labels])
    known = ~np.isnan(true)
    agrees = (said[known] >= threshold) == (true[known] >= 0.5)
    truth = [first_wrong(one) for one in labels]
    told = [place for place, first in enumerate(truth) if first is not None]
    whole = [place for place in told if truth[place] != NONE or cut is None or not cut[place]]
    named = [first_below(one, threshold) for one in scores]
    first = [one for place in whole if (one := truth[place]) is not None]
    measures = first_error_measures(first, [named[k] for k in whole]) if whole else {}
    return {
        "solutions": len(scores),
        **({"partly_labelled_solutions": len(scores) - len(told)} if len(told) < len(scores) else {}),
        **({"cut_solutions": len(told) - len(whole)} if len(whole) < len(told) else {}),
        "steps": int(known.sum()),
        "accuracy": as_json(wilson(float(agrees.sum()), int(known.sum()))),
        **{name: as_json(one) for name, one in measures.items()},
        **calibration_of_steps(said[known], true[known]),
    }


@as_task("first_error", ("found", "step accuracy"))
def run_first_error(
    subject: Subject,
    settings: Settings,
    model: str,
    data: str | None = None,
    threshold: float = THRESHOLD,
    steps_low: int = 1,
    steps_high: int = 4,
    largest: int = 50,
) -> Found:
    """A process reward model (`model`) names the first wrong step of a solution, or says that there is
    none.

    A process reward model over labelled solutions of a file, or over the model's own to world:sums.
    """
    judge = ProcessScorer(model)
    rows = _labelled(data, settings) if data is not None else _own(
        subject, settings, judge.separator,
        {"steps_low": steps_low, "steps_high": steps_high, "largest": largest},
    )  # fmt: skip
    scored = judge.step_scores([row["prompt"] for row in rows], [row["steps"] for row in rows])
    records, pairs, unread = [], [], 0
    for row, scores in zip(rows, scored, strict=True):
        first = first_wrong(row["labels"])
        # A solution that is too long for the judge is one that it gets wrong, not one that was not asked.
        named = first_below(scores, threshold) if scores else UNREAD
        unread += named == UNREAD
        answer = {"text": judge.separator.join(row["steps"]), "step_scores": scores, "named": named}
        known = [place for place, label in enumerate(row["labels"]) if label == label]
        right = [
            scores is not None and (scores[place] >= threshold) == (row["labels"][place] >= 0.5)
            for place in known
        ]
        found = {"step accuracy": float(np.mean(right))} if right else {}
        if first is not None:
            pairs.append((first, named))
            found["found"] = float(first == named)
        kind = "partly labelled" if first is None else "right" if first == NONE else "wrong"
        shown = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        expected = "not known" if first is None else "no wrong step"
        expected = f"step {first + 1} is wrong" if kind == "wrong" and first is not None else expected
        records.append(Record(row["id"], str(shown), expected, (answer,), found, {}, "", {"solution": kind}))
    if unread == len(rows):
        raise TriviumError("The task first_error found no solution with steps that the judge can read.")
    measures = first_error_measures(*zip(*pairs, strict=True)) if pairs else {}
    if unread:
        measures["read"] = wilson(float(len(rows) - unread), len(rows))
    return Found(records, measures)


def _labelled(data: str, settings: Settings) -> list[dict[str, Any]]:
    found = []
    for name, fields in rows_of(data, settings):
        try:
            prompt, steps, labels = labelled_steps(fields)
        except TriviumError as error:
            raise TriviumError(f"{name} {error}.") from None
        found.append({"id": name, "prompt": prompt, "steps": steps, "labels": labels})
    return found


def _own(
    subject: Subject, settings: Settings, separator: str, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The model's own solutions to world:sums, each step compared with what the problem says."""
    asked = [question for question, _ in questions("sums", settings, **options)]
    chat = subject.style(settings) == "chat"
    prompts: list[Any] = [list(one.messages) if chat else one.prompt for one in asked]
    requests = [
        Request(
            subject.chat_ids(prompt) if chat else subject.text_ids(prompt),
            Sampling(
                temperature=settings.temperature, max_new_tokens=settings.max_new_tokens or 96,
                seed=settings.seed * 1_000_003 + number, stop=() if chat else ("\n\n", "Question:"),
            ),
        )
        for number, prompt in enumerate(prompts)
    ]  # fmt: skip
    found = []
    for question, prompt, [completion] in zip(asked, prompts, subject.engine.generate(requests), strict=True):
        steps = split_steps(completion.text, separator)
        labels = labels_of_steps(steps, question.answer.splitlines())
        if steps:
            found.append({"id": question.id, "prompt": prompt, "steps": steps, "labels": labels})
    return found
