"""How far a student's next-token distributions are from its teacher's, in chunks of tokens.

With p the teacher's distribution and q the student's, both softmax(logits / T):

    forward_kl   sum p (log p - log q)                 Hinton et al. 2015: q covers all that p holds possible
    reverse_kl   sum q (log q - log p)                 MiniLLM, 2306.08543: q keeps to what p is sure of
    js           b KL(p || m) + (1 - b) KL(q || m)     GKD, 2306.13649: m = b p + (1 - b) q

Nothing is multiplied by T^2, as in TRL's GKD, so a temperature above 1 also makes this part smaller.

Of a teacher that was stored only the k largest probabilities are known, and what is left for all other tokens
together. The student's distribution is then brought to the same k + 1 outcomes. That is a divergence of its
own, never larger than the whole one, and the student's mass outside of the k tokens is held to the teacher's
rest; renormalising the k probabilities instead would teach the student that nothing else is possible.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from trivium.learn.head_loss import chunk_rows, scaled_gradients, working_type
from trivium.model.arithmetic import note_product
from trivium.model.operations import in_product_type

Divergence = Literal["forward_kl", "reverse_kl", "js"]


class Teacher(Protocol):
    """What a teacher says at some places, as log-probabilities of outcomes."""

    def log_probabilities(self, piece: slice) -> Tensor:
        """Those of the places in a piece: [places, outcomes]."""

    def outcomes(self, log_probabilities: Tensor, piece: slice) -> Tensor:
        """The student's log-probabilities [places, vocabulary] as those of the same outcomes."""

    def likeliest(self, log_probabilities: Tensor, piece: slice) -> Tensor:
        """The teacher's likeliest token at every place: [places]."""


@dataclass(frozen=True)
class LiveTeacher:
    """A teacher whose final hidden states were computed just now: every token is an outcome."""

    hidden: Tensor
    """[places, teacher's width]"""
    head: Tensor
    """[vocabulary, teacher's width]"""
    temperature: float = 1.0
    soft_cap: float | None = None

    def log_probabilities(self, piece: slice) -> Tensor:
        note_product(len(self.hidden[piece]), self.head)
        logits = capped(scores_of(self.hidden[piece], self.head), self.soft_cap)
        return torch.log_softmax(logits / self.temperature, -1)

    def outcomes(self, log_probabilities: Tensor, piece: slice) -> Tensor:
        return log_probabilities

    def likeliest(self, log_probabilities: Tensor, piece: slice) -> Tensor:
        return log_probabilities.argmax(-1)


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher whose k likeliest tokens at every place were stored, and what is left for the others."""

    tokens: Tensor
    """[places, k], likeliest first"""
    logprobs: Tensor
    """[places, k + 1]; the last is that of all other tokens together"""

    def log_probabilities(self, piece: slice) -> Tensor:
        """Those of the k tokens and of the rest: [places, k + 1]."""
        return self.logprobs[piece]

    def outcomes(self, log_probabilities: Tensor, piece: slice) -> Tensor:
        """The student's of the same k tokens, and of all others together: [places, k + 1]."""
        return with_rest(log_probabilities, self.tokens[piece].long())

    def likeliest(self, log_probabilities: Tensor, piece: slice) -> Tensor:
        """The first of each row."""
        return self.tokens[piece, 0].long()


def with_rest(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of these tokens [places, k], and of all others together: [places, k + 1]."""
    # The rest is summed, not taken from 1: what is left beside a sure token is far below one's last digit.
    others = log_probabilities.scatter(1, tokens, float("-inf")).logsumexp(1, keepdim=True)
    return torch.cat((log_probabilities.gather(1, tokens), others), 1)


def token_divergence(student: Tensor, teacher: Tensor, loss: Divergence, js_weight: float) -> Tensor:
    """The divergence of each row of log-probabilities [places, outcomes]: [places]."""
    if loss == "forward_kl":
        return kl(teacher, student)
    if loss == "reverse_kl":
        return kl(student, teacher)
    share = torch.tensor(js_weight, dtype=student.dtype, device=student.device)
    mixed = torch.logaddexp(teacher + share.log(), student + (-share).log1p())
    return js_weight * kl(teacher, mixed) + (1 - js_weight) * kl(student, mixed)


def kl(one: Tensor, other: Tensor) -> Tensor:
    """KL(one || other) of each row of log-probabilities [places, outcomes]: [places]."""
    return (one.exp() * (one - other)).sum(-1)


class Distilled(NamedTuple):
    """The differentiable sum of a distillation loss, and what the metrics need of each place (detached)."""

    sum: Tensor
    divergence: Tensor
    """[places]"""
    cross_entropy: Tensor
    """[places] in nats, at temperature 1."""
    correct: Tensor
    """[places], whether the target was the student's likeliest token."""
    agrees: Tensor
    """[places], whether student and teacher have the same likeliest token."""


@dataclass(frozen=True)
class DistillationNumbers:
    """Which divergence, and what counts beside it."""

    loss: Divergence = "forward_kl"
    js_weight: float = 0.5
    temperature: float = 1.0
    label_weight: float = 0.0
    """The share of the cross-entropy of the labels; the divergence has the rest."""
    z_loss: float = 0.0


def fused_distillation(
    hidden: Tensor,
    head_weight: Tensor,
    teacher: Teacher,
    targets: Tensor,
    weights: Tensor,
    numbers: DistillationNumbers,
    *,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> Distilled:
    """The weighted sum over places: (1 - label_weight) divergence + label_weight cross-entropy.

    `hidden` is [places, width], `head_weight` [vocabulary, width], `targets` and `weights` are [places].
    Gradients are made in the forward pass, chunk by chunk, so no places × vocabulary tensor ever exists.
    """
    (hidden,) = in_product_type(hidden)
    rows = chunk or chunk_rows(head_weight.shape[0], hidden.device)
    return Distilled(
        *_FusedDistillation.apply(
            hidden, head_weight, teacher, targets, weights, numbers, soft_cap, rows, torch.is_grad_enabled()
        )
    )


def scores_of(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits in at least float32: [places, vocabulary]."""
    logits = hidden @ head.to(hidden.dtype).t()
    return logits if logits.dtype == torch.float64 else logits.float()


def capped(logits: Tensor, soft_cap: float | None) -> Tensor:
    """Logits below the limit that some families have."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)


def _token_losses(
    logits: Tensor, teacher: Teacher, piece: slice, targets: Tensor, numbers: DistillationNumbers
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, divergence, cross-entropy, and whether the likeliest tokens agree, of each place: [places]."""
    theirs = teacher.log_probabilities(piece)
    ours = torch.log_softmax(logits / numbers.temperature, -1)
    apart = token_divergence(
        teacher.outcomes(ours, piece), theirs.to(ours.dtype), numbers.loss, numbers.js_weight
    )
    normaliser = logits.logsumexp(-1)
    labels = normaliser - logits.gather(1, targets[:, None]).squeeze(1)
    loss = (1 - numbers.label_weight) * apart
    if numbers.label_weight:
        loss = loss + numbers.label_weight * labels
    if numbers.z_loss:
        loss = loss + numbers.z_loss * normaliser.square()
    return loss, apart, labels, teacher.likeliest(theirs, piece)


class _FusedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        teacher: Teacher,
        targets: Tensor,
        weights: Tensor,
        numbers: DistillationNumbers,
        soft_cap: float | None,
        rows: int,
        want_gradient: bool,
    ) -> tuple[Tensor, ...]:
        working = working_type(hidden)
        head = head_weight.to(hidden.dtype)
        wants_hidden = want_gradient and ctx.needs_input_grad[0]
        wants_head = want_gradient and ctx.needs_input_grad[1]
        note_product(len(hidden), head, 1 + wants_hidden + wants_head)
        hidden_gradient = torch.empty_like(hidden) if wants_hidden else None
        head_gradient = torch.zeros(head.shape, dtype=working, device=head.device) if wants_head else None
        total = torch.zeros((), dtype=working, device=hidden.device)
        measures = torch.zeros(2, len(hidden), dtype=working, device=hidden.device)
        hits = torch.zeros(2, len(hidden), dtype=torch.bool, device=hidden.device)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = scores_of(hidden[piece], head).requires_grad_(wants_hidden or wants_head)
            with torch.set_grad_enabled(logits.requires_grad):
                scores = capped(logits, soft_cap)
                losses, apart, labels, likeliest = _token_losses(
                    scores, teacher, piece, targets[piece], numbers
                )
                loss = torch.dot(losses, weights[piece].to(working))
            total += loss.detach()
            measures[0, piece], measures[1, piece] = apart.detach(), labels.detach()
            ours = scores.detach().argmax(-1)
            hits[0, piece], hits[1, piece] = ours == targets[piece], ours == likeliest
            if not logits.requires_grad:
                continue
            (gradient,) = torch.autograd.grad(loss, logits)
            gradient = gradient.to(hidden.dtype)
            if hidden_gradient is not None:
                torch.mm(gradient, head, out=hidden_gradient[piece])
            if head_gradient is not None:
                head_gradient += gradient.t() @ hidden[piece]
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.head_type = head_weight.dtype
        found = (measures[0].clone(), measures[1].clone(), hits[0].clone(), hits[1].clone())
        ctx.mark_non_differentiable(*found)
        return total, *found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, total_gradient: Tensor, *_: Tensor) -> Any:  # type: ignore[override]
        return *scaled_gradients(ctx, total_gradient), *[None] * 7
