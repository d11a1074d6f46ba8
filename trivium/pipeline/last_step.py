"""What the last step of reinforcement, or of learning preferences, says beside its loss."""

from collections.abc import Mapping
from typing import Any

LEGIBLE = {
    "reward": "reward", "rewards/accuracies": "accuracy", "accuracy": "accuracy", "rewards/margins": "margin",
    "margin": "margin", "kl": "KL", "objective/kl": "KL", "entropy": "entropy",
    "policy/entropy_avg": "entropy", "completions/mean_length": "length",
    "frac_reward_zero_std": "taught nothing",
}  # fmt: skip
"""What tells how reinforcement and preferences go, and how it is called."""


def progress_of(row: Mapping[str, Any]) -> dict[str, str]:
    """What a step of reinforcement or of preferences says beside its loss; empty for other stages."""
    if not any(sign in row for sign in ("reward", "rewards/accuracies", "accuracy")):
        return {}
    found = {LEGIBLE[key]: row[key] for key in LEGIBLE if isinstance(row.get(key), (int, float))}
    shares = ("accuracy", "taught nothing")
    return {name: f"{value:.0%}" if name in shares else f"{value:.3g}" for name, value in found.items()}
