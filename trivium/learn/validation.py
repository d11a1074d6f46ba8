"""The loss on text the model never trains on, in bits per byte, so that tokenizers can be compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trivium.data.rows import PackedSequence, collate
from trivium.kit.processes import all_reduce_sum, world
from trivium.learn.head_loss import fused_cross_entropy
from trivium.learn.precision import Precision, one_pass
from trivium.model.attention import Documents
from trivium.model.transformer import Transformer


@dataclass(frozen=True)
class ValidationLoss:
    """The validation loss: nats per token, bits per byte, and how many tokens were predicted."""

    loss: float
    bits_per_byte: float
    tokens: int


PASS_TOKENS = 4096
"""Tokens of a pass that measures and learns nothing."""


def groups_of(rows: Sequence[PackedSequence], budget: int) -> list[list[PackedSequence]]:
    """Rows in order, in groups of at most `budget` tokens; a longer row is a group of its own."""
    groups: list[list[PackedSequence]] = []
    filled = 0
    for row in rows:
        if not groups or filled + len(row) > budget:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += len(row)
    return groups


@torch.no_grad()
def measure(
    model: Transformer,
    rows: Sequence[PackedSequence],
    budget: int = 4096,
    *,
    precision: Precision = "float32",
) -> ValidationLoss:
    """The mean loss of rows that carry a `bytes` column; every process takes its share of them."""
    here = world()
    total = spelled = tokens = 0.0
    for group in groups_of(rows[here.rank :: here.size], budget):
        batch = collate(group, model.device)
        with one_pass(precision, model.device):
            hidden = model(batch.tokens, Documents(batch.lengths, batch.tokens.device))
            result = fused_cross_entropy(
                hidden, model.head_weight, batch.targets, torch.ones_like(batch.weights),
                soft_cap=model.final_soft_cap,
            )  # fmt: skip
        total += float(result.token_losses.double().sum())
        spelled += float(batch.columns["bytes"].double().sum())
        tokens += int((batch.targets >= 0).sum())
    total, spelled, tokens = all_reduce_sum(total), all_reduce_sum(spelled), all_reduce_sum(tokens)
    return ValidationLoss(total / max(tokens, 1), total / math.log(2) / max(spelled, 1), int(tokens))


@torch.no_grad()
def by_document(
    model: Transformer, rows: Sequence[PackedSequence], budget: int = 4096
) -> dict[str, tuple[float, float]]:
    """The bits and the bytes of every document in rows that carry a `bytes` column, its pieces together."""
    found: dict[str, tuple[float, float]] = {}
    for group in groups_of(rows, budget):
        batch = collate(group, model.device)
        hidden = model(batch.tokens, Documents(batch.lengths, batch.tokens.device))
        losses = fused_cross_entropy(
            hidden, model.head_weight, batch.targets, torch.ones_like(batch.weights),
            soft_cap=model.final_soft_cap,
        ).token_losses.double().cpu()  # fmt: skip
        pieces = zip(
            batch.ids,
            losses.split(list(batch.lengths)),
            batch.columns["bytes"].double().cpu().split(list(batch.lengths)),
            strict=True,
        )
        for name, nats, spelled in pieces:
            bits, size = found.get(name, (0.0, 0.0))
            found[name] = (bits + float(nats.sum()) / math.log(2), size + float(spelled.sum()))
    return {name: one for name, one in found.items() if one[1] > 0}
