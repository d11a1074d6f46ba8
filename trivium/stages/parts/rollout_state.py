"""A rollout as a part of the state of a training: its rows as flat tensors, the rest as JSON."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.data.rows import PackedSequence

Made = tuple[int, list[PackedSequence], dict[str, float]]
"""The number of a rollout, its rows and its measures."""


def saved(made: Made) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A rollout as a part of the state."""
    rollout, rows, measures = made
    names = sorted(rows[0].columns)
    json: dict[str, Any] = {"rollout": rollout, "measures": measures, "columns": names}
    json["rows"] = [[list(row.lengths), list(row.ids), dict(row.facts)] for row in rows]
    tensors = {
        name: _joined([getattr(row, name) for row in rows]) for name in ("tokens", "targets", "weights")
    }
    return json, tensors | {f"column.{name}": _joined([row.columns[name] for row in rows]) for name in names}


def restored(json: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Made:
    """The rollout that was saved."""
    flat = {name: tensor.numpy() for name, tensor in tensors.items()}
    rows, start = [], 0
    for lengths, ids, facts in json["rows"]:
        piece = slice(start, start + sum(lengths))
        start = piece.stop
        columns = {name: flat[f"column.{name}"][piece] for name in json["columns"]}
        rows.append(
            PackedSequence(
                flat["tokens"][piece], flat["targets"][piece], flat["weights"][piece], tuple(lengths),
                columns, facts, tuple(ids), (0,) * len(lengths),
            )
        )  # fmt: skip
    return json["rollout"], rows, json["measures"]


def _joined(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))
