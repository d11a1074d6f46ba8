"""How models differ in what they would say next, and in what their answers look like."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from trivium.evals.results import Record, as_json, estimate
from trivium.evals.statistics import Interval, bootstrap
from trivium.lab.compare_records import Answers, Numbers, corrected, difference, text_of

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
