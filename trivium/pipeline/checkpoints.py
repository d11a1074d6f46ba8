"""Where a parent's product lies: its last state, or a checkpoint that it kept (`base@tokens=2M`)."""

from __future__ import annotations

from pathlib import Path

from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.pipeline.store import Entry, Store


def product(store: Store, recorded: str) -> Path:
    """The folder behind `base-0123abcd` or `base-0123abcd@tokens=2000000`."""
    name, _, checkpoint = recorded.partition("@")
    entry = Entry(store.folder / name)
    if not checkpoint:
        return entry.output
    unit, _, amount = checkpoint.partition("=")
    kept = {folder: read_json(folder / "kept.json") for folder in sorted((entry.folder / "kept").glob("*/"))}
    for folder, facts in kept.items():
        # The first that reached the place: optimiser steps seldom end on a round number of tokens.
        if [unit, int(amount)] in facts["at"] or (unit == "step" and facts["step"] == int(amount)):
            return folder / "model"
    have = ", ".join(f"{unit}={facts[unit]}" for facts in kept.values()) or "none"
    raise TriviumError(
        f"{entry.record['stage']} kept no checkpoint at {checkpoint} (it kept: {have});"
        f" name that place in its `checkpoint: {{at: [...]}}` and run it again."
    )
