"""What `trivium eval` and the stage `evaluate` do: open a folder's model, ask it, and say what came out."""

from collections.abc import Callable, Sequence
from pathlib import Path

from trivium.evals.evaluate import compare, comparison_table, evaluate
from trivium.evals.results import Results
from trivium.evals.settings import Settings, TaskSpec
from trivium.generate.engines import EngineSettings
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
    engine: EngineSettings | None = None,
) -> Results:
    """Load the model of a Hugging Face folder and ask it; with `engine` another one gives its answers."""
    place = machine.device()
    model = load_model(folder, dtype=machine.compute_dtype(place), device=place)
    model.requires_grad_(False)
    tokenizer = Tokenizer.load(folder)
    other = engine.open(folder, tokenizer, model.config.reach) if engine is not None else None
    return evaluate(model, tokenizer, tasks, settings, name=name, say=say, engine=other)


def against(results: Results, before: Results) -> list[list[str]]:
    """A table of how these results differ from those of an earlier evaluation."""
    return comparison_table(compare(before, results))
