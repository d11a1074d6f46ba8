"""What tests of preference learning share: ragged pairs, a model, its reference, and rows of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tuning import small_model, tokenizer_of

from trivium.data.counted import CountedSource
from trivium.data.preferences import (
    PreferenceBatches,
    PreferenceData,
    PreferencePair,
    unpaired,
)
from trivium.data.rows import PackedSequence
from trivium.data.sources import Document
from trivium.learn.objectives.preference import NEEDS_ALL, UNPAIRED, Preference, needs_reference
from trivium.learn.objectives.preference_losses import PreferenceNumbers
from trivium.model.transformer import Transformer

PAIRS = [
    {"prompt": "the river", "chosen": " rises in the hills and rises", "rejected": " counts"},
    {"prompt": "and the miller counts 12 sacks", "chosen": " 345", "rejected": " in the hills; the river"},
    {"prompt": "12 or 345 sacks?", "chosen": " 345 sacks", "rejected": " 12 sacks or the river rises"},
    {"prompt": "the hills", "chosen": " and the river", "rejected": " and the miller's river in the hills"},
    {"prompt": "the miller", "chosen": " counts 345 sacks and sacks", "rejected": " 12"},
]


def pairs(rows: list[dict] | None = None, context: int = 256) -> list[PreferencePair]:
    documents = [Document(None, row, f"rows.jsonl:{n}") for n, row in enumerate(rows or PAIRS, 1)]
    return list(PreferenceData(tokenizer_of("own"), context).read(documents))


def model_and_reference(**changes: Any) -> tuple[Transformer, Transformer]:
    tokenizer = tokenizer_of("own")
    reference = small_model(tokenizer, seed=1, **changes)
    model = small_model(tokenizer, seed=0, **changes)
    # Near its reference, as a model in training is, so that no loss lies where it is flat.
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            mine.copy_(theirs + 0.05 * (mine - theirs))
    return model, reference.requires_grad_(False)


def batches_of(
    pairs: list[PreferencePair], losses: Mapping[str, float], *, batch: int | None = None, **options: Any
) -> PreferenceBatches:
    some = unpaired(pairs) if UNPAIRED & set(losses) else pairs
    settings = {"together": bool(NEEDS_ALL & set(losses)), "mismatched": "kto" in losses, "steps": 1}
    return PreferenceBatches(
        [CountedSource("rows", some)], batch=batch or len(some), seed=0, **{**settings, **options}
    )


def objective_of(
    losses: Mapping[str, float], reference: Transformer, numbers: PreferenceNumbers, **options: Any
) -> Preference:
    beside = options.pop("beside", "parent" if needs_reference(losses) else "none")
    return Preference(
        losses, numbers, beside=beside, reference=reference if beside == "parent" else None, **options
    )


def in_order(batches: PreferenceBatches) -> list[PackedSequence]:
    """The first batch, its judgements in the order of the data."""
    places = sorted(batches.plan.rows(0))
    batches.plan.__dict__["rows"] = lambda step: places
    return batches.rows(0)
