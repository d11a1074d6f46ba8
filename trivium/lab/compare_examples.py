"""Which questions stand on the page with everybody's answers, and what is marked in them."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

WORDY = ("instructions", "sums", "facts", "tongue", "sql", "own", "gsm8k", "svamp", "craft", "humaneval")
IN_ALL = 9
_WORD = re.compile(r"\s+|[^\s\w]|\w+")


def examples(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Questions that were gained, lost, and that no model answers rightly, kinds and tasks in turn."""
    found: list[dict[str, Any]] = []
    for label, task in raw["tasks"].items():
        models = list(task["models"])
        if task["task"] not in WORDY or not models:
            continue
        if task["task"] == "sums" and not task["settings"].get("chain_of_thought", True):
            continue
        shared = _shared(task)
        wanted = {
            "became right": lambda before, after: after > before,
            "became wrong": lambda before, after: after < before,
        }
        used: set[str] = set()
        for kind, (why, fits) in enumerate(wanted.items()):
            for model, before in reversed(list(raw["before"].items())):
                both = (before, model)
                one = next(
                    (
                        name
                        for name, records in shared.items()
                        if name not in used
                        and all("accuracy" in records.get(who, {}).get("scores", {}) for who in both)
                        and fits(*(float(records[who]["scores"]["accuracy"]) for who in both))
                    ),
                    None,
                )
                if one is not None:
                    used.add(one)
                    why = f"{why} from {before} to {model}"
                    found.append({"task": label, "id": one, "why": why, "kind": kind})
                    break
        still = next((one for one in shared if one not in used and all(
            shared[one][model]["scores"].get("accuracy") == 0 for model in models)), None)  # fmt: skip
        if still is not None:
            found.append({"task": label, "id": still, "why": "wrong in every model", "kind": len(wanted)})
    return [{name: one[name] for name in ("task", "id", "why")} for one in _some(found)]


def _some(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """As many as the page has room for: each time of the kind, and then of the task, shown least so far."""
    chosen: list[dict[str, Any]] = []

    def shown(name: str, value: Any) -> int:
        return sum(one[name] == value for one in chosen)

    while len(chosen) < min(IN_ALL, len(found)):
        left = [one for one in found if one not in chosen]
        chosen.append(min(left, key=lambda one: (shown("kind", one["kind"]), shown("task", one["task"]))))
    return sorted(chosen, key=found.index)


def _shared(task: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The questions all models were asked, each with every model's record."""
    found: dict[str, dict[str, Any]] = {}
    for model, asked in task["models"].items():
        for record in asked["records"]:
            if record["answers"]:
                found.setdefault(record["id"], {})[model] = record
    return {name: records for name, records in found.items() if len(records) == len(task["models"])}


def answer(record: Mapping[str, Any]) -> str:
    """What a model said, as it was judged."""
    first = record["answers"][0] if record["answers"] else {}
    return str(first.get("answer", first.get("text", "")))


def marked(before: str, after: str) -> list[tuple[str, bool]]:
    """The second text in pieces, each with whether it differs from the first."""
    old, new = _WORD.findall(before), _WORD.findall(after)
    pieces: list[tuple[str, bool]] = []
    for tag, _, _, start, end in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if start < end:
            pieces.append(("".join(new[start:end]), tag != "equal"))
    return pieces


def all_answers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Every judged answer in the form the page's filter reads: questions once, answers by model."""
    tasks: dict[str, Any] = {}
    for label, task in raw["tasks"].items():
        metric = next(
            (name for name in (*task["headline"], "accuracy under pressure") if _is_verdict(task, name)), None
        )
        if task["task"] == "sycophancy":
            metric = "accuracy under pressure"
        if metric is None:
            continue
        questions: dict[str, Any] = {}
        for model, asked in task["models"].items():
            for record in asked["records"]:
                if metric not in record["scores"] or not record["answers"]:
                    continue
                one = questions.setdefault(
                    record["id"], {"q": record["asked"] or "", "e": record["expected"], "a": {}}
                )
                told = record["answers"][1 if task["task"] == "sycophancy" else 0]
                text = str(told.get("answer", told.get("text", "")))
                one["a"][model] = [text, record["scores"][metric]]
        if questions:
            tasks[label] = {"metric": metric, "questions": list(questions.values())}
    return {"models": [one["name"] for one in raw["models"]], "before": raw["before"], "tasks": tasks}


def _is_verdict(task: Mapping[str, Any], name: str) -> bool:
    scores = [
        record["scores"][name]
        for asked in task["models"].values()
        for record in asked["records"]
        if name in record["scores"] and record["answers"]
    ]
    return bool(scores) and all(score in (0, 1) for score in scores)
