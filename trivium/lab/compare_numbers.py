"""Every number of the page, worked out from what was collected and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.evals.knowledge import BINS, calibration_error
from trivium.evals.results import LOWER_IS_BETTER, Record, as_json, estimate
from trivium.evals.statistics import CONFIDENCE, Interval, bootstrap, bootstrap_of, holm, paired_difference
from trivium.grade.steps import steps_in

FIFTHS = 5
Numbers = dict[str, Any]


def records_of(raw: Mapping[str, Any], label: str, model: str) -> list[Record]:
    """The answers of one model to one task, as they were judged."""
    return [
        Record(**{**row, "answers": tuple(row["answers"]), "asked": row["asked"] or ""})
        for row in raw["tasks"][label]["models"][model]["records"]
    ]


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
        "help": apart_by(raw, answers, "instructions", "kind", "right"),
        "flattery": flattery(raw, answers),
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


def skills(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> list[Numbers]:
    """The headline numbers of all tasks: each model's, and its difference from the one before it."""
    rows: list[Numbers] = []
    changes: list[Numbers] = []
    for label, task in raw["tasks"].items():
        for metric in _headlines(task, answers[label]):
            row: Numbers = {
                "task": label, "metric": metric, "lower is better": metric in LOWER_IS_BETTER,
                "share": _is_share(answers[label], metric), "cells": {}, "changes": {},
            }  # fmt: skip
            for model, records in answers[label].items():
                if any(metric in record.scores for record in records):
                    row["cells"][model] = as_json(estimate(records, metric))
                elif metric in task["models"][model]["whole"]:
                    row["cells"][model] = task["models"][model]["whole"][metric]
            for model, before in raw["before"].items():
                change = difference(answers[label].get(before, []), answers[label].get(model, []), metric)
                if change is not None:
                    row["changes"][model] = {"before": before, **change}
                    changes.append(row["changes"][model])
            rows.append(row)
    for change, corrected in zip(changes, holm([change["p"] for change in changes])):
        change["corrected p"] = corrected
        value = change["difference"]["value"]
        change["shown"] = corrected < 1 - CONFIDENCE and value != 0
    for row in rows:
        for change in row["changes"].values():
            gained = (change["difference"]["value"] > 0) != row["lower is better"]
            change["better"] = gained if change["shown"] else None
    return rows


def difference(before: Sequence[Record], after: Sequence[Record], metric: str) -> Numbers | None:
    """Second minus first on the items both have the score of; None where they were asked different things."""
    if [one.id for one in before] != [one.id for one in after] or not before:
        return None
    if any(one.expected != other.expected for one, other in zip(before, after)):
        return None
    both = [(a, b) for a, b in zip(before, after) if metric in a.scores and metric in b.scores]
    if len(both) < 2:
        return None
    names = [a.cluster or a.id for a, _ in both]
    found = paired_difference(
        [a.scores[metric] for a, _ in both],
        [b.scores[metric] for _, b in both],
        weights=[a.weights.get(metric, 1.0) for a, _ in both],
        clusters=names if len(set(names)) < len(names) else None,
    )
    return {"difference": as_json(found.interval), "p": found.p_value}


def behaviour(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> Numbers:
    """How each model's distributions differ from those before it, and what its answers look like."""
    pairs = []
    for pair in raw["behaviour"]:
        texts = pair["texts"]
        kinds = list(dict.fromkeys(text["kind"] for text in texts))
        pairs.append({
            "model": pair["model"], "before": pair["before"], "why_not": pair["why_not"],
            "all": distances(texts),
            "kinds": {kind: distances([text for text in texts if text["kind"] == kind]) for kind in kinds},
            "fifths": {
                kind: [as_json(_fifth([text for text in texts if text["kind"] == kind], place))
                       for place in range(FIFTHS)]
                for kind in kinds
            },
        })  # fmt: skip
    return {"pairs": pairs, "manner": _manner(raw, answers)}


def distances(texts: Sequence[Mapping[str, Any]]) -> Numbers:
    """Means per token with intervals over texts."""
    names = ("kl", "reverse", "js", "entropy", "entropy before")
    return {name: as_json(_per_token(texts, name)) for name in names} if texts else {}


def _per_token(texts: Sequence[Mapping[str, Any]], name: str) -> Interval:
    held = [text[name] for text in texts if text[name]]
    return bootstrap([float(np.mean(one)) for one in held], weights=[len(one) for one in held])


def _fifth(texts: Sequence[Mapping[str, Any]], place: int) -> Interval:
    """The divergence in one fifth of every text."""
    parts = []
    for text in texts:
        count = len(text["kl"])
        part = text["kl"][place * count // FIFTHS : (place + 1) * count // FIFTHS]
        if part:
            parts.append(part)
    return bootstrap([float(np.mean(part)) for part in parts], weights=[len(part) for part in parts])


def _manner(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> dict[str, Numbers]:
    """Length, ending and sameness of the answers to whatever is answered in words."""
    told = [
        label for label in answers if raw["tasks"][label]["task"] in ("instructions", "sums", "own", "gsm8k")
    ]
    found: dict[str, Numbers] = {}
    for model in raw["models"]:
        name = model["name"]
        mine = [record for label in told for record in answers[label].get(name, [])]
        if not mine:
            continue
        found[name] = {
            "tokens": as_json(estimate(mine, "tokens")),
            "ended": as_json(estimate(mine, "ended")),
            "style": raw["tasks"][told[0]]["models"][name]["style"],
        }
        sums = [
            record for label in told for record in answers[label].get(name, []) if "steps" in record.scores
        ]
        if sums:
            formed = [
                Record(
                    one.id, "", "", (), {"in form": float("####" in _text(one) or "answer is" in _text(one))}
                )
                for one in sums
            ]
            found[name]["in form"] = as_json(estimate(formed, "in form"))
        before = raw["before"].get(name)
        if before is None:
            continue
        same = [
            Record(mine.id, "", "", (), {"same": float(_text(mine) == _text(other))})
            for label in told
            for mine, other in zip(answers[label].get(name, []), answers[label].get(before, []))
        ]
        found[name]["same"] = as_json(estimate(same, "same"))
    return found


def _text(record: Record) -> str:
    return str(record.answers[0].get("answer", record.answers[0].get("text", ""))) if record.answers else ""


def depth(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> Numbers:
    """How far the models reason: with work shown and at once, by steps needed, by how many tries."""
    written = _labels(raw, "sums", lambda settings: settings.get("chain_of_thought", True))
    at_once = _labels(raw, "sums", lambda settings: not settings.get("chain_of_thought", True))
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
                    "right": as_json(estimate(records, "right")),
                    "by steps": _grouped(records, "steps", "right"),
                }
        for label in written[:1]:
            one |= _worked(answers[label].get(model, []))
        if written and at_once:
            pair = [[replace(record, expected="") for record in answers[label].get(model, [])]
                    for label in (at_once[0], written[0])]  # fmt: skip
            one["helps"] = difference(pair[0], pair[1], "right")
        models[model] = one
    helps = [one["helps"] for one in models.values() if one.get("helps")]
    for change, corrected in zip(helps, holm([change["p"] for change in helps])):
        change["corrected p"] = corrected
        change["shown"] = corrected < 1 - CONFIDENCE and change["difference"]["value"] != 0
    return {**found, "models": models}


def _worked(records: Sequence[Record]) -> Numbers:
    shown = [
        Record(one.id, "", "", (), {
            "steps": float(len({step for line in _text(one).splitlines() for step in steps_in(line)})),
            "valid steps": one.scores.get("valid steps", 0.0),
        })
        for one in records
    ]  # fmt: skip
    with_steps = [one for one in shown if one.scores["steps"] > 0]
    tries = sorted({name for one in records for name in one.scores if name.startswith("pass@")}, key=_tries)
    price = np.array(
        [[one.scores["tokens"], one.scores["right"]] for one in records if "tokens" in one.scores]
    )
    found: Numbers = {
        "steps": as_json(estimate(shown, "steps")),
        "valid steps": as_json(estimate(with_steps, "valid steps")) if with_steps else None,
        "pass": {str(_tries(name)): as_json(estimate(list(records), name)) for name in tries},
        "tokens per right answer": None,
    }
    if len(price) and price[:, 1].sum() >= 1:
        found["tokens per right answer"] = as_json(bootstrap_of(_tokens_per_right, price))
    return found


def _tokens_per_right(rows: np.ndarray) -> float:
    # A resample without a right answer has no price; the whole bill over one is the least it could be.
    return float(rows[:, 0].sum() / max(rows[:, 1].sum(), 1.0))


def _tries(name: str) -> int:
    return int(name.removeprefix("pass@").split()[0])


def apart_by(
    raw: Mapping[str, Any],
    answers: Mapping[str, Mapping[str, list[Record]]],
    kind: str,
    axis: str,
    metric: str,
) -> Numbers:
    """One score of one task, apart by a group, for every model."""
    labels = _labels(raw, kind)
    if not labels:
        return {}
    found = {model: _grouped(records, axis, metric) for model, records in answers[labels[0]].items()}
    return {"task": labels[0], "models": found}


def flattery(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> Numbers:
    """Right answers given up under pressure, beside true hints that were taken."""
    labels = _labels(raw, "flattery")
    if not labels:
        return {}
    names = ("gave way", "mended by a true hint", "prefers flattery", "right when asked plainly")
    found: dict[str, Numbers] = {}
    for model, records in answers[labels[0]].items():
        found[model] = {
            name: as_json(estimate(records, name))
            for name in names
            if any(name in record.scores for record in records)
        }
        found[model]["by pressure"] = _grouped(records, "pressure", "gave way")
    return {"task": labels[0], "models": found}


def confidence(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> Numbers:
    """How sure each model is of the choice it makes among four, against how often it is right."""
    label = next((name for kind in ("calibration", "facts") for name in _labels(raw, kind)), None)
    if label is None:
        return {}
    models: dict[str, Numbers] = {}
    for model, records in answers[label].items():
        held = [one for one in records if "confidence" in one.scores and "chosen" in one.scores]
        if not held:
            continue
        pairs = np.array([[one.scores["confidence"], one.scores["chosen"]] for one in held])
        bins = np.minimum((pairs[:, 0] * BINS).astype(int), BINS - 1)
        models[model] = {
            "error": as_json(bootstrap_of(calibration_error, pairs)),
            "sure": as_json(estimate(held, "confidence")),
            "right": as_json(estimate(held, "chosen")),
            "bins": [
                {
                    "sure": float(pairs[bins == place, 0].mean()),
                    "right": as_json(
                        estimate([one for one, its in zip(held, bins) if its == place], "chosen")
                    ),
                }
                for place in range(BINS)
                if (bins == place).any()
            ],
        }
    return {"task": label, "models": models}


def passkey(raw: Mapping[str, Any], answers: Mapping[str, Mapping[str, list[Record]]]) -> Numbers:
    """What is found in long texts, by how long they are and how deep it lies."""
    labels = _labels(raw, "passkey")
    if not labels:
        return {}
    return {
        "task": labels[0],
        "models": {
            model: _grouped(records, "length and depth", "right")
            for model, records in answers[labels[0]].items()
        },
    }


def _grouped(records: Sequence[Record], axis: str, metric: str) -> dict[str, Any]:
    held = [record for record in records if axis in record.groups and metric in record.scores]
    values = sorted({record.groups[axis] for record in held}, key=_natural)
    return {
        value: as_json(estimate([one for one in held if one.groups[axis] == value], metric))
        for value in values
    }


def _natural(text: str) -> list[tuple[int, float, str]]:
    return [
        (0, float(word), "") if word.replace(".", "", 1).isdigit() else (1, 0.0, word)
        for word in text.split()
    ]


def _labels(
    raw: Mapping[str, Any], kind: str, fits: Callable[[Mapping[str, Any]], bool] = lambda settings: True
) -> list[str]:
    return [label for label, task in raw["tasks"].items() if task["task"] == kind and fits(task["settings"])]


def _headlines(task: Mapping[str, Any], answers: Mapping[str, list[Record]]) -> list[str]:
    scored = {name for records in answers.values() for record in records for name in record.scores}
    whole = {name for model in task["models"].values() for name in model["whole"]}
    return [name for name in task["headline"] if name in scored] + sorted(whole)


def _is_share(answers: Mapping[str, list[Record]], metric: str) -> bool:
    values = [one.scores[metric] for records in answers.values() for one in records if metric in one.scores]
    return all(0 <= value <= 1 for value in values)
