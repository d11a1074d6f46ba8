"""What a run left for others, and whether two runs left the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_run import Seen

from trivium.kit.files import load_tensors, read_json

BEYOND_ROUNDING = 1e-5


def product(seen: Seen) -> dict[str, Path]:
    """Every file of the product."""
    folder = seen.folder / {"shards": "data", "reward": "model"}.get(seen.stage.produces, seen.stage.produces)
    return {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}


def differences(one: Seen, other: Seen, *, exact: bool = False) -> list[str]:
    """The files of the product in which two runs differ, tensors by more than rounding unless `exact`."""
    beyond = 0.0 if exact else BEYOND_ROUNDING
    left, right = product(one), product(other)
    assert left, "the run left nothing"
    found = sorted(left.keys() ^ right.keys())
    for name in left.keys() & right.keys():
        if name.endswith(".safetensors"):
            tensors, others = load_tensors(left[name]), load_tensors(right[name])
            alike = tensors.keys() == others.keys() and all(
                torch.allclose(tensor.float(), others[key].float(), rtol=0, atol=beyond)
                for key, tensor in tensors.items()
            )
        elif name.endswith(".json"):
            alike = approximate(read_json(left[name])) == approximate(read_json(right[name]))
        else:
            alike = left[name].read_bytes() == right[name].read_bytes()
        found += [] if alike else [name]
    return found


def approximate(content: Any) -> Any:
    """The same, with numbers to four digits and without what tells the time."""
    if isinstance(content, float):
        return float(f"{content:.4g}")
    if isinstance(content, dict):
        return {key: approximate(value) for key, value in content.items() if key != "seconds"}
    return [approximate(value) for value in content] if isinstance(content, list) else content
