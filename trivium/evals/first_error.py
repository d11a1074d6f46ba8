"""How well the steps of a solution are judged: accuracy, calibration, and whether the first error is found.

ProcessBench (Zheng et al., 2412.06559): the judge names the first step whose score lies below a threshold, or
none. `accuracy_error` is the share of wrong solutions whose first wrong step is named, `accuracy_correct` the
share of right ones in which none is, and F1 their harmonic mean.
"""

from __future__ import annotations

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
from trivium.evals.task import Found, Task
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


def first_wrong(labels: Sequence[float]) -> int:
    """The number of the first step labelled wrong; a step without a label (NaN) is passed over."""
    return next((place for place, label in enumerate(labels) if label < 0.5), NONE)


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
    error: its steps count, and the first-error measures leave it out.
    """
    said = np.concatenate([np.array(one) for one in scores])
    true = np.concatenate([np.array(one) for one in labels])
    known = ~np.isnan(true)
    agrees = (said[known] >= threshold) == (true[known] >= 0.5)
    truth = [first_wrong(one) for one in labels]
    whole = [place for place, first in enumerate(truth) if first != NONE or cut is None or not cut[place]]
    named = [first_below(one, threshold) for one in scores]
    measures = first_error_measures([truth[k] for k in whole], [named[k] for k in whole]) if whole else {}
    return {
        "solutions": len(scores),
        **({"cut_solutions": len(scores) - len(whole)} if len(whole) < len(scores) else {}),
        "steps": int(known.sum()),
        "accuracy": as_json(wilson(float(agrees.sum()), int(known.sum()))),
        **{name: as_json(one) for name, one in measures.items()},
        **calibration_of_steps(said[known], true[known]),
    }


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
    """A process reward model over labelled solutions of a file, or over the model's own to world:sums."""
    judge = ProcessScorer(model)
    rows = _labelled(data, settings) if data is not None else _own(
        subject, settings, judge.separator,
        {"steps_low": steps_low, "steps_high": steps_high, "largest": largest},
    )  # fmt: skip
    scored = judge.step_scores([row["prompt"] for row in rows], [row["steps"] for row in rows])
    records, truth, named = [], [], []
    for row, scores in zip(rows, scored, strict=True):
        truth.append(first_wrong(row["labels"]))
        # A solution that is too long for the judge is one that it gets wrong, not one that was not asked.
        named.append(first_below(scores, threshold) if scores else UNREAD)
        answer = {"text": judge.separator.join(row["steps"]), "step_scores": scores, "named": named[-1]}
        known = [place for place, label in enumerate(row["labels"]) if label == label]
        right = [
            scores is not None and (scores[place] >= threshold) == (row["labels"][place] >= 0.5)
            for place in known
        ]
        found = {"found": float(truth[-1] == named[-1])}
        found |= {"step accuracy": float(np.mean(right))} if right else {}
        kind = "right" if truth[-1] == NONE else "wrong"
        shown = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        expected = "no wrong step" if truth[-1] == NONE else f"step {truth[-1] + 1} is wrong"
        records.append(Record(row["id"], str(shown), expected, (answer,), found, {}, "", {"solution": kind}))
    if all(place == UNREAD for place in named):
        raise TriviumError("The task first_error found no solution with steps that the judge can read.")
    measures, unread = first_error_measures(truth, named), named.count(UNREAD)
    if unread:
        measures["read"] = wilson(float(len(named) - unread), len(named))
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


FIRST_ERROR = Task(
    "first_error",
    "A process reward model (`model`) names the first wrong step of a solution, or says that there is none.",
    ("found", "step accuracy"),
    run_first_error,
)
