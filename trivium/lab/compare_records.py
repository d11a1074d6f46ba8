"""Records as they stand in the JSON: read again, grouped, and compared pair by pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from trivium.evals.results import Record, as_json, estimate
from trivium.evals.statistics import CONFIDENCE, holm, paired_difference
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
