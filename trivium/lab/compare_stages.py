"""What stages cost and how their training went, from what they left behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.lab.gather import Seen
from trivium.model.flops import flops_per_token, parameter_count
from trivium.model.folder import load_config

POINTS = 160
# What a person looks at first in each log; the rest stays in metrics.jsonl.
SERIES = (
    "loss", "validation_loss", "bits_per_byte", "reward", "pass@1", "entropy", "completions/mean_length",
    "kl", "rewards/accuracies", "rewards/margins", "accuracy", "grad_norm", "learning_rate",
)  # fmt: skip
FORWARD, TRAINED = 1.0, 3.0


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
        "machine": (record.get("machine") or {}).get("device_name"),
        "started": record.get("started"),
        "measured": dict(_intervals(summary)),
        "changes": [row for row in stage.metrics if "change" in row],
        **_arithmetic(stage, tokens),
    }


def _intervals(summary: Mapping[str, Any], lead: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The numbers with intervals that a stage measured itself, by where they stand in its summary."""
    for name, one in summary.items():
        if isinstance(one, Mapping) and {"value", "low", "high"} <= one.keys():
            yield f"{lead}{name}", dict(one)
        elif isinstance(one, Mapping):
            yield from _intervals(one, f"{lead}{name}: ")


def _arithmetic(stage: Seen, tokens: int | None) -> dict[str, Any]:
    """The parameters and floating-point operations of a stage that trains a model."""
    if stage.weights is None:
        return {"flops": None, "parameters": None}
    try:
        config = load_config(stage.weights)
    except TriviumError:
        # A stage of a kind added from outside may leave a folder of another form.
        return {"flops": None, "parameters": None}
    settings = stage.record.get("settings") or {}
    context = settings.get("context")
    length = min(context if isinstance(context, int) else config.context, config.context)
    per_token = flops_per_token(config, length, training=False)
    counted = passes(stage.record["kind"], settings)
    return {
        "flops": per_token * counted * tokens if tokens is not None else None,
        "parameters": parameter_count(config),
    }


def passes(kind: str, settings: Mapping[str, Any]) -> float:
    """How many forward passes a trained token costs: the backward is two, reading by others one each."""
    # The weights under an adapter get no gradient of their own, which saves a third.
    trained = TRAINED if settings.get("adapter") is None else TRAINED - FORWARD
    if kind == "rlvr":
        return trained + FORWARD / max(settings.get("passes") or 1, 1)
    if kind == "ppo":
        # Policy and value head learn; the rollout, the reference and the reward model read each token once.
        return trained + 3 * FORWARD
    if kind == "preference":
        return trained + FORWARD
    return trained


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
