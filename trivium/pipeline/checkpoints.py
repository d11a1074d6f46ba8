"""Where a parent's product lies: its last state, or a checkpoint that it kept (`base@tokens=2M`)."""

from pathlib import Path

from trivium.pipeline.store import Store
from trivium.stages.parts.inheritance import kept_model


def product(store: Store, recorded: str) -> Path:
    """The folder behind `base-0123abcd` or `base-0123abcd@tokens=2000000`."""
    name, _, checkpoint = recorded.partition("@")
    entry = store.named(name)
    return kept_model(entry.folder, checkpoint) if checkpoint else entry.output
