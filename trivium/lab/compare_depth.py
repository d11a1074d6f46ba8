"""How far models reason: right answers by steps needed, the work shown, and what more tries give."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.evals.results import Record, as_json, estimate
from trivium.evals.statistics import bootstrap_of
from trivium.grade.steps import steps_in
from trivium.lab.compare_records import (
    Answers,
    Numbers,
    between,
    corrected,
    difference,
    grouped,
    labels_of,
    text_of,
)


def depth(raw: Mapping[str, Any], answers: Answers) -> Numbers:
    """How far the models reason: with work shown and at once, by steps needed, by how many tries."""
    written = labels_of(raw, "sums", lambda settings: settings.get("chain_of_thought", True))
    at_once = labels_of(raw, "sums", lambda settings: not settings.get("chain_of_thought", True))
    if not written and not at_once:
        return {}
    found: Numbers = {"written": written[0] if written else None, "at once": at_once[0] if at_once else None}
    models: dict[str, Numbers] = {}
    for model in (one["name"] for one in raw["models"]):
        one: Numbers = {}
        for way, labels in (("written", written[:1]), ("at once", at_once[:1])):
            for label in labels:
                records = answers[label].get(model, [])
                one[way] = {
                    "accuracy": as_json(estimate(records, "accuracy")),
                    "by steps": grouped(records, "steps", "accuracy"),
                }
        for label in written[:1]:
            one |= _worked(answers[label].get(model, []))
        if written and at_once:
            pair = [[replace(record, expected="") for record in answers[label].get(model, [])]
                    for label in (at_once[0], written[0])]  # fmt: skip
            one["helps"] = difference(pair[0], pair[1], "accuracy")
        models[model] = one
    for figure in ("helps", "more tries"):
        corrected([one[figure] for one in models.values() if one.get(figure)])
    return {**found, "models": models}


def _worked(records: Sequence[Record]) -> Numbers:
    shown = [
        Record(one.id, "", "", (), {
            "steps": float(len({step for line in text_of(one).splitlines() for step in steps_in(line)})),
            **{name: value for name, value in one.scores.items() if name == "valid steps"},
        })
        for one in records
    ]  # fmt: skip
    with_steps = [one for one in shown if "valid steps" in one.scores]
    tries = sorted({name for one in records for name in one.scores if name.startswith("pass@")}, key=_tries)
    price = np.array(
        [[one.scores["tokens"], one.scores["accuracy"]] for one in records if "tokens" in one.scores]
    )
    found: Numbers = {
        "steps": as_json(estimate(shown, "steps")),
        "valid steps": as_json(estimate(with_steps, "valid steps")) if with_steps else None,
        "pass": {str(_tries(name)): as_json(estimate(list(records), name)) for name in tries},
        "more tries": None,
        "tokens per right answer": None,
    }
    if len(tries) > 1:
        found["more tries"] = between(records, tries[0], tries[-1])
    if len(price) and price[:, 1].sum() >= 1:
        found["tokens per right answer"] = as_json(bootstrap_of(_tokens_per_right, price))
    return found


def _tokens_per_right(rows: np.ndarray) -> float:
    # A resample without a right answer has no price; the whole bill over one is the least it could be.
    return float(rows[:, 0].sum() / max(rows[:, 1].sum(), 1.0))


def _tries(name: str) -> int:
    return int(name.removeprefix("pass@").split()[0])
