"""Models and collections small enough to be compared in a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from test_tokens import own
from tuning import save, small_model

from trivium.lab.compare_numbers import numbers

TASKS = [
    {"task": "instructions", "limit": 8},
    {"task": "sums", "samples": 2, "limit": 6, "max_new_tokens": 12},
]


def two_models(folder: Path) -> list[str]:
    """Two random models with one tokenizer."""
    tokenizer = own()
    for name, seed in (("first", 0), ("second", 1)):
        save(folder / name, small_model(tokenizer, seed=seed), tokenizer)
    return [str(folder / "first"), str(folder / "second")]


def answered(right: np.ndarray, **more: Any) -> list[dict[str, Any]]:
    """Records of a task that is right or wrong."""
    return [
        {"id": f"q{n}", "asked": f"question {n}?", "expected": "yes", "cluster": "", "weights": {},
         "groups": {"kind": "odd" if n % 2 else "even", "steps": str(1 + n % 3)},
         "answers": [{"text": "yes" if one else "no", "answer": "yes" if one else "no", "tokens": 3}],
         "scores": {"accuracy": float(one), "ended": 1.0, "tokens": 3.0, **more}}
        for n, one in enumerate(right)
    ]  # fmt: skip


def collected(
    right: dict[str, dict[str, np.ndarray]], before: dict[str, str], **changes: Any
) -> dict[str, Any]:
    """What a comparison collects, by task and model: only whether each answer was right."""
    models = list(dict.fromkeys(model for task in right.values() for model in task))
    tasks = {
        label: {
            "task": label, "description": f"{label}.", "headline": ["accuracy"], "settings": {},
            "models": {
                model: {"style": "chat", "seconds": 0.0, "whole": {}, "records": answered(values)}
                for model, values in task.items()
            },
        }
        for label, task in right.items()
    }  # fmt: skip
    return {
        "title": "test", "made": "2026-01-01 00:00", "version": "0", "stages": [], "curves": {},
        "models": [{"name": name, "kind": "imported", "window": 64, "vocabulary": 9, "fingerprint": name,
                    "place": name} for name in models],
        "before": before, "tasks": tasks, "behaviour": [], "judged": [], **changes,
    }  # fmt: skip


def report_of(raw: dict[str, Any]) -> dict[str, Any]:
    return {"collected": raw, "numbers": numbers(raw)}
