"""Opening what a person names as a draft."""

from __future__ import annotations

from pathlib import Path

from trivium.generate.drafts import LOOKUP, Draft
from trivium.kit import machine
from trivium.model.draft_heads import FILE, DraftHeads, load_draft_heads
from trivium.model.folder import load_model
from trivium.model.named import RUNS, find_model
from trivium.tokens.tokenizer import Tokenizer


def open_draft(
    name: str | Path | None, *, runs: str | Path = RUNS, device: str | None = None
) -> Draft | DraftHeads | str | None:
    """A model's folder, a stage of a run or an id of the hub, opened to draft; or "lookup" as it is.

    Of a folder that holds draft heads only these are opened: they draft for the model they were trained on.
    """
    if name is None or name == LOOKUP:
        return None if name is None else LOOKUP
    folder, place = find_model(name, runs), machine.usable(device)
    if (folder / FILE).is_file():
        return load_draft_heads(folder)
    model = load_model(folder, dtype=machine.compute_dtype(place), device=place)
    return Draft(model.requires_grad_(False).eval(), Tokenizer.load(folder))
