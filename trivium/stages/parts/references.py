"""Log-probabilities under the reference, computed once and kept: a stop costs one part of them at most."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from trivium.data.preferences import PROMPT, PreferenceBatches
from trivium.data.rows import PackedSequence, collate
from trivium.kit.files import load_tensors, save_tensors
from trivium.kit.fingerprint import fingerprint
from trivium.kit.processes import barrier, world
from trivium.learn.objectives.preference import answers_under
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import groups_of
from trivium.model.transformer import Transformer
from trivium.stages.parts.stage import Work

PART = 1024
"""How many pairs are written at once."""
PASS_TOKENS = 4096


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
        places = [(number, index) for index in range(len(source.pairs))]
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
    one = batches.sources[place[0]].pairs[place[1]]
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
