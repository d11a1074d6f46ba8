"""The head and the loss computed together in chunks, so that no tokens × vocabulary tensor ever exists."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trivium.learn.score_terms import (
    compiled,
    cross_entropy,
    gains,
    log_probabilities,
    log_probabilities_gradient,
)
from trivium.learn.vocabulary import HeadRows, rows_here
from trivium.model.arithmetic import note_product
from trivium.model.operations import in_product_type

CACHE_BYTES = 4 * 2**20
"""Measured: chunks of 4 to 16 MiB of logits are the fastest on a processor, smaller ones are not."""
DEVICE_BYTES = 256 * 2**20


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits to hold at once: enough for a busy matmul, few enough for the cache."""
    budget, least, most = (CACHE_BYTES, 128, 1024) if device.type == "cpu" else (DEVICE_BYTES, 512, 8192)
    return max(least, min(most, budget // (4 * vocabulary)))


class CrossEntropy(NamedTuple):
    """The differentiable sum of a cross-entropy, and for each token what the metrics need (detached)."""

    sum: Tensor
    token_losses: Tensor
    """[tokens] in nats, unweighted, without smoothing and z-loss; 0 where nothing is learned."""
    correct: Tensor
    """[tokens], whether the target was the likeliest token."""


def fused_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    learned: Tensor | Literal["all", "unknown"] = "unknown",
    chunk: int | None = None,
) -> CrossEntropy:
    """The weighted sum of next-token losses; gradients are made in the forward pass, chunk by chunk.

    `learned` are the places with a target and a weight. Where a caller knows them, a GPU need not be waited
    for to find them.
    """
    (hidden,) = in_product_type(hidden)
    rows = chunk or chunk_rows(head_weight.shape[0], hidden.device)
    head = rows_here(head_weight)
    places: Tensor | None
    if isinstance(learned, Tensor):
        places = learned
    else:
        places = None if learned == "all" else _learned(targets, weights)
    total, token_losses, correct = _FusedCrossEntropy.apply(
        head.entering(hidden),
        head.weight,
        head,
        targets,
        weights,
        places,
        soft_cap,
        z_loss,
        label_smoothing,
        rows,
        torch.is_grad_enabled(),
    )
    return CrossEntropy(total, token_losses, correct)


def _learned(targets: Tensor, weights: Tensor | None) -> Tensor | None:
    """The positions that have a target and a weight, or None when all of them do."""
    mask = targets >= 0 if weights is None else (targets >= 0) & (weights != 0)
    return None if bool(mask.all()) else mask.nonzero().squeeze(1)


def _logits(hidden: Tensor, head_weight: Tensor, soft_cap: float | None, into: Tensor) -> Tensor:
    """The chunk's logits in at least float32, soft-capped, in the buffer `into` when the types allow it."""
    if hidden.dtype == into.dtype:
        logits = torch.mm(hidden, head_weight.t(), out=into[: len(hidden)])
    else:
        logits = into[: len(hidden)].copy_(hidden @ head_weight.t())
    if soft_cap is not None:
        logits.div_(soft_cap).tanh_().mul_(soft_cap)
    return logits


def _through_soft_cap(gradient: Tensor, capped: Tensor, soft_cap: float) -> Tensor:
    """The gradient before the soft cap, from the one after it: 1 - tanh² of what was capped."""
    return gradient.mul_(1 - (capped / soft_cap).square())


def _add_head_gradient(total: Tensor, gradient: Tensor, hidden: Tensor, *, is_first: bool) -> None:
    """Add a chunk's gradient of the head; the first chunk writes, so that nothing is set to zero before."""
    if gradient.dtype == total.dtype:
        torch.addmm(total, gradient.t(), hidden, beta=0 if is_first else 1, out=total)
    elif is_first:
        total.copy_(gradient.t() @ hidden)
    else:
        total += gradient.t() @ hidden


def working_type(tensor: Tensor) -> torch.dtype:
    """The type in which sums are kept: float32, or float64 where that is computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def scaled_gradients(ctx: Any, total: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a forward pass left of gradients to hidden states and head, times the gradient of its sum."""
    hidden, head = ctx.saved_tensors
    return (
        None if hidden is None else hidden * total.to(hidden.dtype),
        None if head is None else (head * total).to(ctx.head_type),
    )


def _room(rows: int, kept: Tensor, head: Tensor, working: torch.dtype) -> Tensor:
    """Where the scores of every chunk go, one after the other."""
    return torch.empty(min(rows, len(kept)), head.shape[0], dtype=working, device=kept.device)


def _in_place(
    held: HeadRows, x: Tensor, head: Tensor, y: Tensor, weight: Tensor, soft_cap: float | None,
    z_loss: float, label_smoothing: float, wants: bool, buffer: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """What `score_terms.cross_entropy` says of a chunk, in one buffer, of a head that may be divided."""
    vocabulary = held.whole.shape[0]
    logits = _logits(x, head, soft_cap, buffer)
    target_logits = held.at_targets(logits, y)
    highest = held.largest(logits.amax(1))
    mean_logits = held.summed(logits.sum(1)) / vocabulary if label_smoothing else target_logits
    capped = logits.clone() if soft_cap is not None and wants else logits
    probabilities = logits.sub_(highest[:, None]).exp_()
    normaliser = held.summed(probabilities.sum(1))
    log_normaliser = normaliser.log() + highest
    losses = log_normaliser - (1 - label_smoothing) * target_logits - label_smoothing * mean_logits
    if z_loss:
        losses = losses + z_loss * log_normaliser.square()
    said = log_normaliser - target_logits, target_logits >= highest, torch.dot(losses, weight)
    if not wants:
        return *said, None
    scale = weight * (1 + 2 * z_loss * log_normaliser) / normaliser
    gradient = probabilities.mul_(scale[:, None])
    held.add_at_targets(gradient, y, (label_smoothing - 1) * weight[:, None])
    if label_smoothing:
        gradient.sub_((label_smoothing / vocabulary) * weight[:, None])
    if soft_cap is not None:
        gradient = _through_soft_cap(gradient, capped, soft_cap)
    return *said, gradient.to(x.dtype)


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        held: HeadRows,
        targets: Tensor,
        weights: Tensor,
        learned: Tensor | None,
        soft_cap: float | None,
        z_loss: float,
        label_smoothing: float,
        rows: int,
        want_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        working = working_type(hidden)
        head = head_weight.to(hidden.dtype)
        wants_hidden = want_gradient and ctx.needs_input_grad[0]
        wants_head = want_gradient and ctx.needs_input_grad[1]
        wants = wants_hidden or wants_head
        token_losses = torch.zeros(len(hidden), dtype=working, device=hidden.device)
        correct = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
        if learned is not None:
            kept, kept_targets, kept_weights = hidden[learned], targets[learned], weights[learned]
        else:
            kept, kept_targets, kept_weights = hidden, targets, weights
        kept_weights = kept_weights.to(working)
        note_product(len(kept), held.whole, 1 + wants_hidden + wants_head)
        head_gradient = torch.empty(head.shape, dtype=working, device=head.device) if wants_head else None
        hidden_gradient = torch.empty_like(kept) if wants_hidden else None
        if head_gradient is not None and not len(kept):
            head_gradient.zero_()
        losses = torch.empty(len(kept), dtype=working, device=hidden.device)
        hits = torch.empty(len(kept), dtype=torch.bool, device=hidden.device)
        total = torch.zeros((), dtype=working, device=hidden.device)
        wishes = soft_cap, z_loss, label_smoothing, wants
        fuses = held.mesh is None and gains(hidden.device)
        buffer = None if fuses else _room(rows, kept, head, working)
        for start in range(0, len(kept), rows):
            piece = slice(start, start + rows)
            x, y, weight = kept[piece], kept_targets[piece, None], kept_weights[piece]
            if buffer is None:
                found = compiled(cross_entropy)(x @ head.t(), y, weight, *wishes)
            else:
                found = _in_place(held, x, head, y, weight, *wishes, buffer)
            losses[piece], hits[piece], part, gradient = found
            total += part
            if gradient is None:
                continue
            if hidden_gradient is not None:
                torch.mm(gradient, head, out=hidden_gradient[piece])
            if head_gradient is not None:
                _add_head_gradient(head_gradient, gradient, x, is_first=start == 0)
        if learned is not None:
            token_losses[learned] = losses
            correct[learned] = hits
            if hidden_gradient is not None:
                hidden_gradient = torch.zeros_like(hidden).index_copy_(0, learned, hidden_gradient)
        else:
            token_losses, correct = losses, hits
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.head_type = head_weight.dtype
        ctx.mark_non_differentiable(token_losses, correct)
        return total, token_losses, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total_gradient: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        return *scaled_gradients(ctx, total_gradient), *[None] * 9


def token_log_probabilities(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Each target's log-probability (0 where there is none) and the entropy, both differentiable."""
    (hidden,) = in_product_type(hidden)
    rows = chunk or chunk_rows(head_weight.shape[0], hidden.device)
    head = rows_here(head_weight)
    log_probabilities, entropies = _TokenLogProbabilities.apply(
        head.entering(hidden), head.weight, head, targets, soft_cap, temperature, entropy, rows
    )
    return log_probabilities, (entropies if entropy else None)


def _gradient_in_place(
    held: HeadRows, x: Tensor, head: Tensor, y: Tensor, normalisers: Tensor, entropies: Tensor,
    to_chosen: Tensor, to_entropies: Tensor, soft_cap: float | None, temperature: float, entropy: bool,
    buffer: Tensor,
) -> Tensor:  # fmt: skip
    """What `score_terms.log_probabilities_gradient` gives for a chunk, in one buffer."""
    logits = _logits(x, head, soft_cap, buffer)
    capped = logits.clone() if soft_cap is not None else logits
    logits.div_(temperature).sub_(normalisers[:, None])
    if entropy:
        # d entropy / d logit = -p (log p + entropy)
        bracket = -(logits + entropies[:, None]) * to_entropies[:, None]
        gradient = logits.exp_().mul_(bracket.sub_(to_chosen[:, None]))
    else:
        gradient = logits.exp_().mul_(-to_chosen[:, None])
    held.add_at_targets(gradient, y, to_chosen[:, None])
    gradient.div_(temperature)
    if soft_cap is not None:
        gradient = _through_soft_cap(gradient, capped, soft_cap)
    return gradient.to(x.dtype)


class _TokenLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        held: HeadRows,
        targets: Tensor,
        soft_cap: float | None,
        temperature: float,
        entropy: bool,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        working = working_type(hidden)
        head = head_weight.to(hidden.dtype)
        learned = _learned(targets, None)
        kept, kept_targets = (hidden, targets) if learned is None else (hidden[learned], targets[learned])
        note_product(len(kept), held.whole)
        chosen = torch.empty(len(kept), dtype=working, device=hidden.device)
        entropies = torch.zeros(len(kept), dtype=working, device=hidden.device)
        normalisers = torch.empty(len(kept), dtype=working, device=hidden.device)
        fuses = held.mesh is None and gains(hidden.device)
        buffer = None if fuses else _room(rows, kept, head, working)
        for start in range(0, len(kept), rows):
            piece = slice(start, start + rows)
            if buffer is None:
                scores, wishes = kept[piece] @ head.t(), (soft_cap, temperature, entropy)
                said = compiled(log_probabilities)(scores, kept_targets[piece, None], *wishes)
                chosen[piece], entropies[piece], normalisers[piece] = said
                continue
            logits = _logits(kept[piece], head, soft_cap, buffer).div_(temperature)
            target_logits = held.at_targets(logits, kept_targets[piece, None])
            normalisers[piece] = held.log_sum_exp(logits)
            chosen[piece] = target_logits - normalisers[piece]
            if entropy:
                logits.sub_(normalisers[piece, None])
                entropies[piece] = -held.summed((logits.exp() * logits).sum(1))
        ctx.save_for_backward(hidden, head_weight, targets, learned, normalisers, entropies)
        ctx.soft_cap, ctx.temperature, ctx.entropy, ctx.rows = soft_cap, temperature, entropy, rows
        ctx.held, ctx.fuses = held, fuses
        if learned is None:
            # Views would tie the results to tensors that are saved for the backward pass.
            return chosen, entropies.clone()
        whole = torch.zeros(2, len(hidden), dtype=working, device=hidden.device)
        whole[0, learned], whole[1, learned] = chosen, entropies
        return whole[0].clone(), whole[1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, chosen_gradient: Tensor, entropy_gradient: Tensor) -> Any:  # type: ignore[override]
        hidden, head_weight, targets, learned, normalisers, entropies = ctx.saved_tensors
        working = normalisers.dtype
        head = head_weight.to(hidden.dtype)
        if learned is None:
            kept, kept_targets = hidden, targets
        else:
            kept, kept_targets = hidden[learned], targets[learned]
            chosen_gradient, entropy_gradient = chosen_gradient[learned], entropy_gradient[learned]
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        note_product(len(kept), ctx.held.whole, 1 + wants_hidden + wants_head)
        hidden_gradient = torch.empty_like(kept) if wants_hidden else None
        head_gradient = torch.zeros(head.shape, dtype=working, device=head.device) if wants_head else None
        wishes = ctx.soft_cap, ctx.temperature, ctx.entropy
        buffer = None if ctx.fuses else _room(ctx.rows, kept, head, working)
        for start in range(0, len(kept), ctx.rows):
            piece = slice(start, start + ctx.rows)
            x, y = kept[piece], kept_targets[piece, None]
            given = normalisers[piece], entropies[piece], chosen_gradient[piece], entropy_gradient[piece]
            if buffer is None:
                gradient = compiled(log_probabilities_gradient)(x @ head.t(), y, *given, *wishes)
            else:
                gradient = _gradient_in_place(ctx.held, x, head, y, *given, *wishes, buffer)
            if hidden_gradient is not None:
                torch.mm(gradient, head, out=hidden_gradient[piece])
            if head_gradient is not None:
                head_gradient += gradient.t() @ kept[piece]
        if hidden_gradient is not None and learned is not None:
            hidden_gradient = torch.zeros_like(hidden).index_copy_(0, learned, hidden_gradient)
        head_gradient = head_gradient.to(head_weight.dtype) if head_gradient is not None else None
        return hidden_gradient, head_gradient, *[None] * 6
