"""The same questions to every model side by side."""

from collections.abc import Mapping
from typing import Any

from trivium.lab.compare_examples import answer, examples, marked
from trivium.lab.formatting import figure

LONGEST = 700
"""Characters of an answer that are shown."""


def example_answers(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some questions, each with the answer of every model."""
    found = []
    for one in examples(raw):
        task = raw["tasks"][one["task"]]
        records = {
            model["name"]: next(
                record for record in task["models"][model["name"]]["records"] if record["id"] == one["id"]
            )
            for model in raw["models"]
            if model["name"] in task["models"]
        }
        first = next(iter(records.values()))
        found.append(
            {
                "task": one["task"],
                "why": one["why"],
                "asked": first["asked"] or "",
                "expected": f"Expected: {first['expected']}" if first["expected"] else "Judged by a program",
                "answers": [_answer(model, records, raw["before"].get(model)) for model in records],
            }
        )
    return found


def _answer(model: str, records: Mapping[str, Any], before: str | None) -> dict[str, Any]:
    """An answer in pieces, those marked that the model before did not write, and its verdict."""
    text = answer(records[model])[:LONGEST]
    pieces = [(text, False)]
    if before is not None and before in records:
        pieces = [
            (piece, new and bool(piece.strip()))
            for piece, new in marked(answer(records[before])[:LONGEST], text)
        ]
    score = records[model]["scores"].get("accuracy")
    return {"model": model, "pieces": pieces if text else [], "verdict": _verdict(score), "score": score}


def _verdict(score: float | None) -> str:
    if score is None:
        return "? not judged"
    return "✓ right" if score >= 1 else "✗ wrong" if score <= 0 else f"✗ {figure(score, 'share')} right"
