"""Searches drawn as trees that a person can walk: every step with its score, the way to the answer marked."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

SHOWN = 3
"""How many searches of a task and a model are drawn."""
MOST = 400
"""The most nodes of a drawn tree."""
LONGEST = 160
"""Characters of a step that are shown."""


def searches(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some searches of every task and model; first those that found a right answer and chose another."""
    found = []
    for task, asked in raw["tasks"].items():
        for model in raw["models"]:
            told = asked["models"].get(model["name"])
            records = [] if told is None else [one for one in told["records"] if _of(one) is not None]
            records.sort(key=lambda one: one["scores"].get("accuracy", 0) - one["scores"].get("oracle", 0))
            for record in records[:SHOWN]:
                found.append(_drawn(task, model["name"], record, _of(record) or {}))
    return found


def _of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    answers = record.get("answers") or [{}]
    search = answers[0].get("search")
    return search if isinstance(search, Mapping) else None


def _drawn(task: str, model: str, record: Mapping[str, Any], search: Mapping[str, Any]) -> dict[str, Any]:
    score = record["scores"].get("accuracy")
    return {
        "task": task,
        "model": model,
        "asked": record["asked"],
        "expected": record["expected"],
        "answer": search["answer"],
        "right": score is not None and score >= 1,
        "method": search["settings"]["method"],
        "tokens": search["tokens"],
        "solutions": search["solutions"],
        "left_out": max(0, len(search["tree"]) - MOST),
        "steps": _below(0, search["tree"][:MOST]),
    }


def _below(parent: int, nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps below a node, the best first, each with those below it."""
    children: dict[int, list[Mapping[str, Any]]] = {}
    for node in nodes:
        children.setdefault(node["parent"], []).append(node)

    def steps(number: int) -> list[dict[str, Any]]:
        return [
            {
                "text": node["text"].strip()[:LONGEST] or "(nothing)",
                "score": "not judged" if node["score"] is None else f"{node['score']:.2f}",
                "facts": _facts(node),
                "chosen": node["chosen"],
                "below": steps(node["id"]),
            }
            for node in sorted(children.get(number, []), key=_height, reverse=True)
        ]

    return steps(parent)


def _height(node: Mapping[str, Any]) -> float:
    return -math.inf if node["score"] is None else float(node["score"])


def _facts(node: Mapping[str, Any]) -> str:
    facts = [f"drawn {node['drawn']} times"] if node["drawn"] > 1 else []
    value = "none" if node["value"] is None else f"{node['value']:.2f}"
    facts += [f"{node['visits']} visits, value {value}"] if node["visits"] else []
    return ", ".join([*facts, *(["ends"] if node["finished"] else [])])
