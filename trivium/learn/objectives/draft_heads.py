"""Heads that draft for their own model: each learns a token further on, the model itself stays as it is.

At place t the head k guesses the token k places after the next one, where that lies in the same document and
is learned (its weight w is not 0). With the distance weighing less (Medusa-1, 2401.10774, section 2.2.1)

    loss = sum_k 0.8^k sum_t w_(t+k) (-log p_k(x_(t+1+k) | h_t)) / sum_t w_t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trivium.data.rows import Batch, PackedSequence
from trivium.learn.head_loss import fused_cross_entropy
from trivium.learn.objective import Loss, Measure
from trivium.model.attention import Documents
from trivium.model.draft_heads import DraftHeads, save_draft_heads
from trivium.model.transformer import Transformer

DECAY = 0.8
"""By how much each head weighs less than the one before it."""


def further_on(batch: Batch, places: int) -> tuple[Tensor, Tensor]:
    """What stands so many places after the next token, and its weight, 0 beyond the document: [tokens]."""
    document = batch.owners()
    targets, weights = batch.targets.roll(-places), batch.weights.roll(-places)
    inside = document == document.roll(-places)
    inside[max(0, len(inside) - places) :] = False
    return targets, weights * inside


@dataclass
class DraftsAhead:
    """The weighted negative log-likelihood of each head's token under a model that is not trained."""

    extra: DraftHeads

    name = "draft_heads"

    @classmethod
    def on(cls, model: Transformer, count: int) -> DraftsAhead:
        """So many fresh heads on a model, which is frozen."""
        model.requires_grad_(False)
        return cls(DraftHeads(model.config.width, count).to(model.device))

    def save(self, folder: Path) -> None:
        """Write the heads into the folder of their model."""
        save_draft_heads(self.extra, folder)

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """The sum of the tokens' weights."""
        return float(sum(row.weights.sum(dtype="float64") for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """The loss sum of all heads, and of each how often it is right."""
        with torch.no_grad():
            hidden = model(batch.tokens, Documents(batch.lengths, batch.tokens.device))
        total, whole = hidden.new_zeros(()), batch.weights.sum()
        metrics: dict[str, Measure] = {}
        for head in range(len(self.extra)):
            targets, weights = further_on(batch, head + 1)
            found = fused_cross_entropy(
                self.extra(hidden, head), model.head_weight.detach(), targets, weights,
                soft_cap=model.final_soft_cap,
            )  # fmt: skip
            total = total + DECAY ** (head + 1) * found.sum
            metrics[f"head_{head + 1}_accuracy"] = ((found.correct * weights).sum(), weights.sum())
        metrics["loss"] = (total.detach(), whole)
        return Loss(total, metrics)
