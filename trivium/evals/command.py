"""What `trivium eval` and the stage `evaluate` do: open a folder's model, ask it, and say what came out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trivium.evals.evaluate import compare, comparison_table, evaluate
from trivium.evals.results import Results
from trivium.evals.settings import Settings, TaskSpec
from trivium.kit import machine
from trivium.model.folder import load_model
from trivium.tokens.tokenizer import Tokenizer


def evaluate_folder(
    folder: Path,
    tasks: Sequence[TaskSpec],
    settings: Settings,
    *,
    name: str,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Load the model of a Hugging Face folder and ask it."""
    place = machine.device()
    model = load_model(folder, dtype=machine.compute_dtype(place), device=place)
    model.requires_grad_(False)
    return evaluate(model, Tokenizer.load(folder), tasks, settings, name=name, say=say)


def against(results: Results, before: Results) -> list[list[str]]:
    """A table of how these results differ from those of an earlier evaluation."""
    return comparison_table(compare(before, results))
