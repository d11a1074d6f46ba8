"""Preference pairs under a model: log-probabilities of the reference, kept by parts; validation rewards."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.data.preferences import PROMPT, PreferenceBatches
from trivium.data.rows import PackedSequence, collate
from trivium.evals.pairwise import pairwise
from trivium.evals.results import as_json
from trivium.evals.statistics import wilson
from trivium.kit.files import load_tensors, save_tensors
from trivium.kit.fingerprint import fingerprint
from trivium.kit.processes import barrier, world
from trivium.learn.objectives.preference import Preference, answers_under
from trivium.learn.objectives.reward import pair_scores
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import PASS_TOKENS, groups_of
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer
from trivium.stages.parts.stage import Work

PART = 1024
"""How many pairs are written at once."""


def store_references(
    work: Work,
    name: str,
    model: Transformer,
    batches: PreferenceBatches,
    *,
    parent: str,
    tail: float = 1.0,
    precision: Precision = "float32",
) -> None:
    """Give the batches every completion's log-probability under the model, stored as it is computed."""
    found = []
    for number, source in enumerate(batches.sources):
        places = [(number, index) for index in range(len(source.items))]
        identity = fingerprint(
            [parent, batches.share, batches.mismatched, tail, [_shape(batches, p) for p in places]]
        )
        folder = work.folder / "reference" / f"{name}-{number}-{identity}"
        parts = []
        for start in range(0, len(places), PART):
            path = folder / f"{start:09d}.safetensors"
            if not path.exists() and world().leads:
                folder.mkdir(parents=True, exist_ok=True)
                rows = [batches.row([place]) for place in places[start : start + PART]]
                save_tensors(path, {"logprobs": torch.from_numpy(_measured(model, rows, tail, precision))})
            barrier()
            parts.append(load_tensors(path)["logprobs"].numpy())
        width = parts[0].shape[1] if parts else 1
        found.append(np.concatenate(parts) if parts else np.zeros((0, width), dtype=np.float32))
    batches.references = found


def _shape(batches: PreferenceBatches, place: tuple[int, int]) -> tuple[str, int]:
    one = batches.sources[place[0]].items[place[1]]
    return one.id, len(one)


@torch.no_grad()
def _measured(
    model: Transformer, rows: Sequence[PackedSequence], tail: float, precision: Precision
) -> np.ndarray:
    """The summed log-probabilities [rows, answers]."""
    found: list[list[float]] = []
    for group in groups_of(rows, PASS_TOKENS):
        with one_pass(precision, model.device):
            sums = answers_under(model, collate(group, model.device), tail=tail).sums.float().tolist()
        start = 0
        for row in group:
            mine = sums[start : start + len(row.lengths)]
            start += len(row.lengths)
            found.append(
                [value for value, role in zip(mine, row.facts["role"], strict=True) if role != PROMPT]
            )
    return np.array(found, dtype=np.float32)


def clear_references(folder: Path) -> None:
    """Throw the stored numbers away, once the model is whole."""
    if world().leads:
        shutil.rmtree(folder / "reference", ignore_errors=True)


@torch.no_grad()
def measured(
    model: Transformer, objective: Preference, batches: PreferenceBatches, precision: Precision
) -> dict[str, Any]:
    """Rewards on validation pairs, and the share of pairs that the model ranks as people did.

    The first process alone measures.
    """
    if not world().leads:
        return {}
    totals: dict[str, tuple[float, float]] = {}
    for group in groups_of(batches.rows(0), PASS_TOKENS):
        with one_pass(precision, model.device):
            rewards = objective.rewards(model, collate(group, model.device))
        for name, (total, weight) in rewards.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + float(total), before[1] + float(weight))
    found: dict[str, Any] = {name: total / weight for name, (total, weight) in totals.items() if weight}
    if "rewards/accuracies" in totals:
        right, count = totals["rewards/accuracies"]
        found["rewards/accuracies"] = as_json(wilson(right, int(count)))
    return found


@torch.no_grad()
def accuracy_of_scores(
    model: Transformer, head: ScalarHead, sources: Mapping[str, PreferenceBatches], precision: Precision
) -> dict[str, Any]:
    """Accuracy, calibration and length bias of a reward model on pairs, of all sources and of each."""
    found: dict[str, Any] = {}
    parts: list[np.ndarray] = []
    for name, batches in sources.items():
        pairs = batches.sources[0].items
        rows = [batches.row([(0, number)]) for number in range(len(pairs))]
        scores = []
        for some in groups_of(rows, PASS_TOKENS):
            with one_pass(precision, model.device):
                scores.append(pair_scores(model, head, collate(some, model.device)))
        chosen, rejected = (torch.cat([one[side] for one in scores]).cpu().numpy() for side in (0, 1))
        lengths = [np.array([len(one.completions[side].tokens) for one in pairs]) for side in (0, 1)]
        parts.append(np.stack((chosen, rejected, *lengths)))
        found[name] = pairwise(*parts[-1])
    if len(found) != 1:
        everything = pairwise(*np.concatenate(parts, 1)) if parts else {}
        return {**everything, "by_source": found} if parts else {}
    return next(iter(found.values()))
