"""Every number of the page and of its tables, worked out from what was collected and from nothing else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.evals.knowledge import BINS
from trivium.evals.results import LOWER_IS_BETTER, UNBOUNDED, Record, as_json, estimate
from trivium.evals.statistics import (
    CONFIDENCE,
    Interval,
    bootstrap,
    bootstrap_of,
    holm,
    no_order,
    paired_difference,
    proportion,
)
from trivium.grade.steps import steps_in
from trivium.lab.compare_examples import answer

Numbers = dict[str, Any]
Answers = Mapping[str, Mapping[str, list[Record]]]


def records_of(raw: Mapping[str, Any], label: str, model: str) -> list[Record]:
    """The answers of one model to one task, as they were judged."""
    return [
        Record(**{**row, "answers": tuple(row["answers"]), "asked": row["asked"] or ""})
        for row in raw["tasks"][label]["models"][model]["records"]
    ]


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


def between(records: Sequence[Record], first: str, second: str) -> Numbers | None:
    """How two scores of the same answers differ: the second less the first."""
    pair = [
        [replace(one, scores={"": one.scores[metric]} if metric in one.scores else {}) for one in records]
        for metric in (first, second)
    ]
    return difference(pair[0], pair[1], "")


def corrected(changes: Sequence[Numbers]) -> None:
    """Holm's correction over all changes of a figure; one is shown where test and interval speak for it."""
    for change, p_value in zip(changes, holm([one["p"] for one in changes])):
        low, high = change["difference"]["low"], change["difference"]["high"]
        apart = (low is not None and low > 0) or (high is not None and high < 0)
        change["corrected p"] = p_value
        change["shown"] = p_value < 1 - CONFIDENCE and apart


def grouped(records: Sequence[Record], axis: str, metric: str) -> dict[str, Any]:
    """One score apart by a group."""
    held = [record for record in records if axis in record.groups and metric in record.scores]
    values = sorted({record.groups[axis] for record in held}, key=_natural)
    return {
        value: as_json(estimate([one for one in held if one.groups[axis] == value], metric))
        for value in values
    }


def grouped_scores(records: Sequence[Record], axis: str, metric: str) -> dict[str, list[float]]:
    """The scores themselves apart by a group."""
    found: dict[str, list[float]] = {}
    for record in records:
        if axis in record.groups and metric in record.scores:
            found.setdefault(record.groups[axis], []).append(record.scores[metric])
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(text: str) -> list[tuple[int, float, str]]:
    return [
        (0, float(word), "") if word.replace(".", "", 1).isdigit() else (1, 0.0, word)
        for word in text.split()
    ]


def labels_of(
    raw: Mapping[str, Any], kind: str, fits: Callable[[Mapping[str, Any]], bool] = lambda settings: True
) -> list[str]:
    """The labels of the tasks of one kind whose settings fit."""
    return [label for label, task in raw["tasks"].items() if task["task"] == kind and fits(task["settings"])]


def text_of(record: Record) -> str:
    """What a model said, as it was judged."""
    return answer({"answers": record.answers})


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


FIFTHS = 5
TOLD = ("instructions", "sums", "own", "gsm8k", "replies")
"""The tasks that are answered in words."""
RESULT = ("####", "answer is")


def behaviour(raw: Mapping[str, Any], answers: Answers) -> Numbers:
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


def _manner(raw: Mapping[str, Any], answers: Answers) -> dict[str, Numbers]:
    """Length, ending and sameness of the answers to whatever is answered in words."""
    told = [label for label in answers if raw["tasks"][label]["task"] in TOLD]
    found: dict[str, Numbers] = {}
    changes = []
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
                replace(one, scores={"in form": float(any(form in text_of(one) for form in RESULT))})
                for one in sums
            ]
            found[name]["in form"] = as_json(estimate(formed, "in form"))
        before = raw["before"].get(name)
        if before is None:
            continue
        same = [
            Record(mine.id, "", "", (), {"same": float(text_of(mine) == text_of(other))})
            for label in told
            for mine, other in zip(answers[label].get(name, []), answers[label].get(before, []))
        ]
        found[name]["same"] = as_json(estimate(same, "same"))
        both = [label for label in told if before in answers[label] and name in answers[label]]
        earlier, later = ([one for label in both for one in answers[label][who]] for who in (before, name))
        for metric in ("tokens", "ended"):
            change = difference(earlier, later, metric)
            if change is not None:
                found[name].setdefault("changes", {})[metric] = change
                changes.append(change)
    corrected(changes)
    return found


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
