"""Every number of the page, worked out from what was collected and from nothing else."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from trivium.evals.knowledge import BINS
from trivium.evals.results import LOWER_IS_BETTER, UNBOUNDED, Record, as_json, estimate
from trivium.evals.statistics import CONFIDENCE, Interval, no_order, paired_difference, proportion
from trivium.lab.compare_behaviour import behaviour
from trivium.lab.compare_depth import depth
from trivium.lab.compare_examples import answer
from trivium.lab.compare_records import (
    Answers,
    Numbers,
    between,
    corrected,
    difference,
    grouped,
    grouped_scores,
    labels_of,
    records_of,
)


def numbers(raw: Mapping[str, Any]) -> Numbers:
    """All figures of the page; the same collection always gives the same."""
    answers = {
        label: {model: records_of(raw, label, model) for model in task["models"]}
        for label, task in raw["tasks"].items()
    }
    return {
        "cost": cost(raw),
        "skills": skills(raw, answers),
        "behaviour": behaviour(raw, answers),
        "depth": depth(raw, answers),
        "help": apart_by(raw, answers, "instructions", "kind", "accuracy"),
        "wins": wins(raw),
        "sycophancy": sycophancy(raw, answers),
        "confidence": confidence(raw, answers),
        "passkey": passkey(raw, answers),
    }


def cost(raw: Mapping[str, Any]) -> list[Numbers]:
    """What each stage took, and its share of the whole."""
    totals = {key: sum(stage[key] or 0 for stage in raw["stages"]) for key in ("tokens", "flops", "seconds")}
    return [
        {
            "stage": stage["name"],
            **{key: stage[key] for key in totals},
            **{f"{key} share": (stage[key] or 0) / totals[key] if totals[key] else 0.0 for key in totals},
        }
        for stage in raw["stages"]
    ]


def skills(raw: Mapping[str, Any], answers: Answers) -> list[Numbers]:
    """The headline numbers of all tasks: each model's, and its difference from the one before it."""
    rows: list[Numbers] = []
    changes: list[Numbers] = []
    for label, task in raw["tasks"].items():
        for name, metric, asked in _rows(label, task, answers[label]):
            row: Numbers = {
                "task": name, "metric": metric, "lower is better": metric in LOWER_IS_BETTER,
                "share": _is_share(asked, metric), "cells": {}, "changes": {}, "asked": list(asked),
            }  # fmt: skip
            for model, records in asked.items():
                if any(metric in record.scores for record in records):
                    row["cells"][model] = as_json(estimate(records, metric))
                elif metric in task["models"][model]["whole"]:
                    row["cells"][model] = task["models"][model]["whole"][metric]
            for model, before in raw["before"].items():
                change = difference(asked.get(before, []), asked.get(model, []), metric)
                if change is not None:
                    row["changes"][model] = {"before": before, **change}
                    changes.append(row["changes"][model])
            rows.append(row)
    corrected(changes)
    for row in rows:
        for change in row["changes"].values():
            gained = (change["difference"]["value"] > 0) != row["lower is better"]
            change["better"] = gained if change["shown"] else None
    return rows


def _rows(
    label: str, task: Mapping[str, Any], answers: Mapping[str, list[Record]]
) -> Iterator[tuple[str, str, Mapping[str, list[Record]]]]:
    """The rows a task fills; bits per byte are given for each source, as a mean over them says little."""
    if task["task"] == "bits":
        sources = dict.fromkeys(one.groups["source"] for records in answers.values() for one in records)
        for source in sources:
            part = {
                model: [one for one in records if one.groups["source"] == source]
                for model, records in answers.items()
            }
            yield f"predicting {source}", "bits per byte", part
        return
    for metric in _headlines(task, answers):
        yield label, metric, answers


def apart_by(raw: Mapping[str, Any], answers: Answers, kind: str, axis: str, metric: str) -> Numbers:
    """One score of one task, apart by a group, for every model."""
    labels = labels_of(raw, kind)
    if not labels:
        return {}
    told = answers[labels[0]]
    found = {model: grouped(records, axis, metric) for model, records in told.items()}
    alike = {}
    for model, records in told.items():
        groups = list(grouped_scores(records, axis, metric).values())
        if len(groups) > 1:
            alike[model] = no_order(groups)
    return {"task": labels[0], "models": found, "p of no order": alike}


def wins(raw: Mapping[str, Any]) -> list[Numbers]:
    """How often each model's answer is preferred to that of the model before; ties are half."""
    found: list[Numbers] = []
    for judged in raw["judged"]:
        told = raw["tasks"][judged["task"]]["models"]
        for model, before in raw["before"].items():
            if model not in judged["scores"] or before not in judged["scores"]:
                continue
            won, longer = [], []
            scores = zip(judged["scores"][model], judged["scores"][before])
            rows = zip(scores, told[model]["records"], told[before]["records"])
            for (mine, other), record, earlier in rows:
                if mine is None or other is None or record["id"] != earlier["id"]:
                    continue
                won.append((float(other > mine), float(mine > other)))
                size = len(answer(record)) - len(answer(earlier))
                if size and mine != other:
                    likes_it = float((mine > other) == (size > 0))
                    longer.append(Record(record["id"], "", "", (), {"longer": likes_it}))
            if len(won) > 1:
                margin = paired_difference(*zip(*won))
                inside = margin.interval
                value, low, high = (0.5 + end / 2 for end in (inside.value, inside.low, inside.high))
                found.append({
                    "judge": judged["judge"], "model": model, "before": before,
                    "rate": as_json(Interval(value, low, high, inside.n)),
                    "margin": {"difference": as_json(inside), "p": margin.p_value},
                    "longer": as_json(estimate(longer, "longer")) if longer else None,
                })  # fmt: skip
    corrected([one["margin"] for one in found])
    return found


def sycophancy(raw: Mapping[str, Any], answers: Answers) -> Numbers:
    """Right answers given up under pressure, beside true hints that were taken."""
    labels = labels_of(raw, "sycophancy")
    if not labels:
        return {}
    names = ("flip rate", "accepts correction", "prefers sycophancy", "accuracy when asked plainly")
    found: dict[str, Numbers] = {}
    for model, records in answers[labels[0]].items():
        found[model] = {
            name: as_json(estimate(records, name))
            for name in names
            if any(name in record.scores for record in records)
        }
        found[model]["by pressure"] = grouped(records, "pressure", "flip rate")
    return {"task": labels[0], "models": found}


def confidence(raw: Mapping[str, Any], answers: Answers) -> Numbers:
    """How sure each model is of the choice it makes among four, against how often it is right."""
    label = next((name for kind in ("calibration", "facts") for name in labels_of(raw, kind)), None)
    if label is None:
        return {}
    models: dict[str, Numbers] = {}
    for model, records in answers[label].items():
        held = [
            one for one in records if "confidence" in one.scores and "multiple-choice accuracy" in one.scores
        ]
        if not held:
            continue
        sure = np.array([one.scores["confidence"] for one in held])
        bins = np.minimum((sure * BINS).astype(int), BINS - 1)
        models[model] = {
            "overconfidence": between(held, "multiple-choice accuracy", "confidence"),
            "confidence": as_json(estimate(held, "confidence")),
            "accuracy": as_json(estimate(held, "multiple-choice accuracy")),
            "bins": [
                {
                    "confidence": float(sure[bins == place].mean()),
                    "accuracy": as_json(
                        estimate(
                            [one for one, its in zip(held, bins) if its == place], "multiple-choice accuracy"
                        )
                    ),
                }
                for place in range(BINS)
                if (bins == place).any()
            ],
        }
    corrected([one["overconfidence"] for one in models.values() if one["overconfidence"]])
    return {"task": label, "models": models}


def passkey(raw: Mapping[str, Any], answers: Answers) -> list[Numbers]:
    """What is found in long texts, by how long they are and how deep it lies: apart by task and kind."""
    parts: list[tuple[str, str, dict[str, list[Record]]]] = []
    for label in labels_of(raw, "passkey"):
        told = answers[label]
        for kind in dict.fromkeys(one.groups["kind"] for records in told.values() for one in records):
            held = {
                model: [one for one in records if one.groups["kind"] == kind]
                for model, records in told.items()
            }
            parts.append((label, kind, held))
    # A claim may be made of every model and kind, so each gets its share of what may go wrong.
    confidence = 1 - (1 - CONFIDENCE) / max(1, sum(len(held) for _, _, held in parts))
    return [
        {
            "task": label,
            "kind": kind,
            "models": {m: grouped(records, "length and depth", "accuracy") for m, records in held.items()},
            "confidence by length": confidence,
            "by length": {
                model: {
                    length: as_json(proportion(scores, confidence=confidence))
                    for length, scores in grouped_scores(records, "length", "accuracy").items()
                }
                for model, records in held.items()
            },
        }
        for label, kind, held in parts
    ]


def _headlines(task: Mapping[str, Any], answers: Mapping[str, list[Record]]) -> list[str]:
    scored = {name for records in answers.values() for record in records for name in record.scores}
    whole = {name for model in task["models"].values() for name in model["whole"]}
    return [name for name in task["headline"] if name in scored] + sorted(whole)


def _is_share(answers: Mapping[str, list[Record]], metric: str) -> bool:
    if metric in UNBOUNDED:
        return False
    values = [one.scores[metric] for records in answers.values() for one in records if metric in one.scores]
    return bool(values) and all(0 <= value <= 1 for value in values)
