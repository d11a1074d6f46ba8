"""What stages cost and how their training went, from what they left behind."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object
from trivium.lab.gather import Seen
from trivium.model.flops import parameter_count
from trivium.model.folder import load_config

POINTS = 160
PLAN_FILE = "plan.json"
"""Beside the links to a recipe's stages: what was planned for each."""
# What a person looks at first in each log; the rest stays in metrics.jsonl.
SERIES = (
    "loss", "validation_loss", "bits_per_byte", "reward", "pass@1", "entropy", "completions/mean_length",
    "kl", "rewards/accuracies", "rewards/margins", "accuracy", "grad_norm", "learning_rate",
)  # fmt: skip


def stage_facts(stage: Seen, all_stages: Sequence[Seen]) -> dict[str, Any]:
    """One stage: its kind, parents, tokens, arithmetic and time."""
    record = stage.record
    summary = record.get("summary") or {}
    names = {other.folder: other.name for other in all_stages}
    tokens = summary.get(
        "tokens", next((row["tokens"] for row in reversed(stage.metrics) if "tokens" in row), None)
    )
    return {
        "name": stage.name,
        "kind": record["kind"],
        "from": names.get(stage.start) if stage.start else None,
        "parents": [names[folder] for folder in stage.parents.values() if folder in names],
        "outside": list(record.get("outside") or {}),
        "tokens": tokens,
        "seconds": record.get("seconds"),
        "flops": record.get("flops") or None,
        "machine": (record.get("machine") or {}).get("device_name"),
        "started": record.get("started"),
        "measured": dict(_intervals(summary)),
        "changes": [row for row in stage.metrics if "change" in row],
        "parameters": _parameters(stage),
        "peak_memory": record.get("peak_memory"),
        "planned": _planned(stage),
        "new_weights": summary.get("new_weights"),
    }


def _planned(stage: Seen) -> dict[str, Any] | None:
    """What was planned for this very result before it ran, where a plan was made."""
    record = stage.record
    place = stage.folder.resolve().parents[1] / str(record.get("recipe")) / PLAN_FILE
    if not place.is_file():
        return None
    found = read_object(place).get(str(record.get("stage")), {})
    return found if found.get("entry") == stage.folder.resolve().name else None


def _intervals(summary: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers with intervals that a stage measured itself, by where they stand in its summary."""
    for name, one in summary.items():
        if isinstance(one, Mapping) and {"value", "low", "high"} <= one.keys():
            yield f"{lead}{name}", dict(one)
        elif isinstance(one, Mapping):
            yield from _intervals(one, f"{lead}{name}: ")


def _parameters(stage: Seen) -> int | None:
    """How many weights the model of a stage has."""
    if stage.weights is None:
        return None
    try:
        return parameter_count(load_config(stage.weights))
    except TriviumError:
        # A stage of a kind added from outside may leave a folder of another form.
        return None


def curves(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The curves of one stage's log, thinned to what a screen can show."""
    found: dict[str, Any] = {}
    for name in SERIES:
        rows = [row for row in metrics if isinstance(row.get(name), int | float) and "step" in row]
        if len(rows) < 2:
            continue
        stride = -(-len(rows) // POINTS)
        picked = rows[::stride] if rows[-1] in rows[::stride] else [*rows[::stride], rows[-1]]
        found[name] = [[row["step"], row[name]] for row in picked]
    return found
