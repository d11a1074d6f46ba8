"""What a loss needs of a chunk of scores, as formulas for a compiler.

`head_loss` computes the same in place, operation by operation, which suits a processor's cache and a head
that is divided among processes. On a GPU each of those operations would read and write the whole chunk;
compiled, a chunk is read few times and its gradient written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trivium.model.compiling import allow_programs

_wanted = False


@contextmanager
def compiled_terms(wanted: bool) -> Iterator[None]:
    """Inside the block losses take the compiled formulas where these gain anything."""
    global _wanted
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def gains(device: torch.device) -> bool:
    """Whether compiled formulas are wanted now, and faster there."""
    return _wanted and device.type == "cuda"


@cache
def compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """A formula below, compiled at its first use."""
    allow_programs()
    return torch.compile(formula)


def capped(scores: Tensor, soft_cap: float | None) -> Tensor:
    """Scores [N, V] in at least float32, under the family's soft cap."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide if soft_cap is None else soft_cap * torch.tanh(wide / soft_cap)


def through_cap(gradient: Tensor, scores: Tensor, soft_cap: float | None) -> Tensor:
    """The gradient before the soft cap, of the gradient after it."""
    return gradient if soft_cap is None else gradient * (1 - (scores / soft_cap).square())


def is_target(scores: Tensor, targets: Tensor) -> Tensor:
    """Where the targets [N, 1] are: [N, V]."""
    return torch.arange(scores.shape[1], device=scores.device) == targets


def cross_entropy(
    found: Tensor, targets: Tensor, weights: Tensor, soft_cap: float | None, z_loss: float,
    label_smoothing: float, wants: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Of scores [N, V]: losses [N], whether targets are the likeliest [N], the weighted sum, its gradient."""
    scores = capped(found, soft_cap)
    at_target = scores.gather(1, targets).squeeze(1)
    highest = scores.amax(1)
    normaliser = (scores - highest[:, None]).exp().sum(1)
    log_normaliser = normaliser.log() + highest
    mean = scores.mean(1) if label_smoothing else at_target
    losses = log_normaliser - (1 - label_smoothing) * at_target - label_smoothing * mean
    losses = losses + z_loss * log_normaliser.square()
    total, gradient = torch.dot(losses, weights), None
    if wants:
        probabilities = (scores - log_normaliser[:, None]).exp()
        gradient = probabilities * (weights * (1 + 2 * z_loss * log_normaliser))[:, None]
        smooth = label_smoothing / scores.shape[1]
        aim = torch.where(is_target(scores, targets), 1 - label_smoothing + smooth, smooth)
        gradient = through_cap(gradient - aim * weights[:, None], scores, soft_cap).to(found.dtype)
    return log_normaliser - at_target, at_target >= highest, total, gradient


def log_probabilities(
    found: Tensor, targets: Tensor, soft_cap: float | None, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Of scores [N, V]: the targets' log-probabilities, entropies if wanted, and log-normalisers, all [N]."""
    scores = capped(found, soft_cap) / temperature
    normalisers = torch.logsumexp(scores, 1)
    chosen = scores.gather(1, targets).squeeze(1) - normalisers
    if not entropy:
        return chosen, torch.zeros_like(chosen), normalisers
    logs = scores - normalisers[:, None]
    return chosen, -(logs.exp() * logs).sum(1), normalisers


def log_probabilities_gradient(
    found: Tensor, targets: Tensor, normalisers: Tensor, entropies: Tensor, to_chosen: Tensor,
    to_entropies: Tensor, soft_cap: float | None, temperature: float, entropy: bool,
) -> Tensor:  # fmt: skip
    """The gradient to the scores [N, V], of the gradients to what `log_probabilities` gave."""
    scores = capped(found, soft_cap)
    logs = scores / temperature - normalisers[:, None]
    factor = -to_chosen[:, None]
    if entropy:
        # d entropy / d score = -p (log p + entropy)
        factor = factor - (logs + entropies[:, None]) * to_entropies[:, None]
    gradient = logs.exp() * factor + torch.where(is_target(scores, targets), to_chosen[:, None], 0.0)
    return through_cap(gradient / temperature, scores, soft_cap).to(found.dtype)
