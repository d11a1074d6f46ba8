"""How a model wants to be sampled, as its own generation_config.json says; a request may say otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.kit.files import read_object

KEYS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """The settings of sampling that a model's folder names; greedy where it says `do_sample: false`."""
    path = folder / "generation_config.json"
    content = read_object(path) if path.is_file() else {}
    if content.get("do_sample") is False:
        return {"temperature": 0.0}
    found = {key: content[key] for key in KEYS if isinstance(content.get(key), (int, float))}
    # transformers writes these where they change nothing.
    return {key: value for key, value in found.items() if not (key == "top_k" and value <= 0)}
