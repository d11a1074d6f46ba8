"""Rewards of pairs: who wins how often, accuracy, calibration, and how much of them is mere length."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trivium.evals.results import as_json
from trivium.evals.statistics import bootstrap, bootstrap_of, proportion, wilson

BINS = 10


def pairwise(
    chosen: np.ndarray, rejected: np.ndarray, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray
) -> dict[str, Any]:
    """The rewards of held-out pairs [pairs] and the answers' lengths in tokens, as a report."""
    apart = chosen - rejected
    return {
        "pairs": len(apart),
        "accuracy": accuracy(apart),
        "margin": float(apart.mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        **calibration(apart),
        "length": length_bias(chosen, rejected, chosen_lengths, rejected_lengths),
    }


def outcome(first: np.ndarray, second: np.ndarray) -> Mapping[str, Any]:
    """Who won how often, a tie being half a win, with a paired bootstrap over the prompts."""
    both = ~(np.isnan(first) | np.isnan(second))
    apart = first[both] - second[both]
    return {
        "prompts": len(apart),
        "win_rate": as_json(proportion((apart > 0) + 0.5 * (apart == 0))),
        "ties": float((apart == 0).mean()),
        "score": as_json(bootstrap(first[both])),
        "score_against": as_json(bootstrap(second[both])),
        "gain": as_json(bootstrap(apart)),
    }


def accuracy(apart: np.ndarray) -> dict[str, float | int | None]:
    """The share of pairs ranked as people did, a tie for half, with Wilson's interval."""
    right = float((apart > 0).sum() + (apart == 0).sum() / 2)
    return as_json(wilson(right, len(apart)))


def calibration(apart: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """How often the favourite is the chosen one, beside how sure the model was of it (Bradley-Terry).

    `calibration` holds [sure of, was right, pairs] per bin from 0.5 to 1, `calibration_error` the mean
    distance of the two, weighted by pairs.
    """
    sure = 1 / (1 + np.exp(-np.abs(apart)))
    right = np.where(apart == 0, 0.5, apart > 0)
    place = np.minimum(((sure - 0.5) * 2 * bins).astype(int), bins - 1)
    found = [
        [float(sure[place == one].mean()), float(right[place == one].mean()), int((place == one).sum())]
        for one in range(bins)
        if (place == one).any()
    ]
    error = sum(abs(said - was) * count for said, was, count in found) / len(apart)
    return {"calibration": found, "calibration_error": error}


def length_bias(
    chosen: np.ndarray, rejected: np.ndarray, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray
) -> dict[str, Any]:
    """Whether length is rewarded: correlations, and accuracy where the better answer is the shorter one.

    `within_pairs` correlates differences, so that prompts which ask for much do not count as a bias.
    """
    apart, longer = chosen - rejected, chosen_lengths - rejected_lengths
    rewards = np.concatenate((chosen, rejected))
    lengths = np.concatenate((chosen_lengths, rejected_lengths))
    found: dict[str, Any] = {
        "correlation": as_json(_correlation(rewards, lengths)),
        "within_pairs": as_json(_correlation(apart, longer)),
    }
    for name, some in (("better_is_shorter", longer < 0), ("better_is_longer", longer > 0)):
        if some.any():
            found[f"accuracy_where_{name}"] = accuracy(apart[some])
    return found


def _correlation(values: np.ndarray, lengths: np.ndarray) -> Any:
    def pearson(items: np.ndarray) -> float:
        spread = items.std(0)
        if not spread.all():
            return 0.0
        return float(((items - items.mean(0)) / spread).prod(1).mean())

    return bootstrap_of(pearson, np.stack((values, lengths), 1).astype(float), resamples=500)
