"""Knowledge distillation as an objective: packed rows in, how far the student is from its teacher out."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from trivium.data.rows import Batch, PackedSequence
from trivium.learn.head_loss import fused_cross_entropy
from trivium.learn.holders import gathered
from trivium.learn.objective import Loss, Measure
from trivium.learn.objectives.distillation_losses import (
    DistillationNumbers,
    LiveTeacher,
    StoredTeacher,
    Teacher,
    fused_distillation,
)
from trivium.model.attention import Documents
from trivium.model.experts import Routing
from trivium.model.transformer import Transformer, hidden_at

TOKENS, LOGPROBS = "teacher_tokens", "teacher_logprobs"
"""The columns of a row that hold a stored teacher's likeliest tokens [tokens, k] and [tokens, k + 1]."""
SAMPLED = "sampled"
"""The fact that a document's answer was written by the student: there is no label to learn."""


class Distillation:
    """A divergence between student and teacher at every learned token, mixed with the label's loss.

    With `hidden_states` it is the mean squared difference of the final hidden states instead; where the
    teacher's width is another, the student's go through `extra`, a matrix learned along (FitNets, 1412.6550).
    """

    name = "distillation"

    def __init__(
        self,
        teacher: Transformer | None,
        numbers: DistillationNumbers,
        *,
        vocabulary: int | None = None,
        hidden_states: bool = False,
        projection: nn.Linear | None = None,
        permutation: Tensor | None = None,
    ) -> None:
        """Without a `teacher` the rows carry what it said, or labels alone are learned.

        `vocabulary` is how many tokens both models have, where families pad theirs to different numbers of
        rows. A `permutation` of them gives tokens each other's scores.
        """
        self.teacher, self.numbers, self.vocabulary = teacher, numbers, vocabulary
        self.hidden_states, self.extra, self.permutation = hidden_states, projection, permutation

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        return float(sum(row.weights.sum(dtype="float64") for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """The loss sum, the divergence, the cross-entropy, and how often the likeliest tokens agree."""
        places = (batch.weights != 0).nonzero().squeeze(1)
        experts = model.config.experts
        routing = Routing() if experts is not None and experts.balance else None
        hidden = _hidden(model, batch, places, routing)
        numbers = self.numbers
        if all(batch.facts.get(SAMPLED, [False])):
            numbers = replace(numbers, label_weight=0.0)
        targets, weights = batch.targets[places], batch.weights[places]
        if self.hidden_states or numbers.label_weight == 1:
            loss = self._without_divergence(model, batch, places, hidden, numbers)
        else:
            loss = self._divergence(model, hidden, targets, weights, numbers, self._says(batch, places))
        if experts is None or routing is None:
            return loss
        balance, total = routing.balance_loss(), weights.sum()
        metrics = {**loss.metrics, "aux_loss": (balance.detach() * total, total)}
        return Loss(loss.sum + experts.balance * balance * total, metrics)

    def _divergence(
        self,
        model: Transformer,
        hidden: Tensor,
        targets: Tensor,
        weights: Tensor,
        numbers: DistillationNumbers,
        says: Teacher,
    ) -> Loss:
        head = gathered(model.head_weight)
        if self.vocabulary is not None and self.vocabulary < len(head):
            head = head[: self.vocabulary]
        found = fused_distillation(
            hidden, head, says, targets, weights, numbers, soft_cap=model.final_soft_cap
        )
        total = weights.sum()
        return Loss(
            found.sum,
            {
                numbers.loss: ((found.divergence * weights).sum(), total),
                "cross_entropy": ((found.cross_entropy * weights).sum(), total),
                "mean_token_accuracy": ((found.correct * weights).sum(), total),
                "teacher_agreement": ((found.agrees * weights).sum(), total),
            },
        )

    def _says(self, batch: Batch, places: Tensor) -> Teacher:
        """What the teacher says at these places, now or when it was stored."""
        teacher, numbers = self.teacher, self.numbers
        if teacher is None:
            return StoredTeacher(batch.columns[TOKENS][places], batch.columns[LOGPROBS][places])
        with torch.no_grad():
            hidden = _hidden(teacher, batch, places)
        return LiveTeacher(hidden, self.head(), numbers.temperature, teacher.final_soft_cap)

    def head(self) -> Tensor:
        """The teacher's head, its rows in another order where tokens are permuted: [vocabulary, width]."""
        assert self.teacher is not None
        head = self.teacher.head_weight.detach()[: self.vocabulary]
        return head if self.permutation is None else head[self.permutation]

    def _without_divergence(
        self, model: Transformer, batch: Batch, places: Tensor, hidden: Tensor, numbers: DistillationNumbers
    ) -> Loss:
        """The labels' loss, and the distance of the hidden states where that is learned."""
        targets, weights = batch.targets[places], batch.weights[places]
        share, total = numbers.label_weight, weights.sum()
        with torch.set_grad_enabled(share > 0 and torch.is_grad_enabled()):
            labels = fused_cross_entropy(
                hidden, model.head_weight, targets, weights, soft_cap=model.final_soft_cap,
                z_loss=numbers.z_loss,
            )  # fmt: skip
        metrics: dict[str, Measure] = {
            "cross_entropy": ((labels.token_losses * weights).sum(), total),
            "mean_token_accuracy": ((labels.correct * weights).sum(), total),
        }
        summed = share * labels.sum
        if share < 1:
            assert self.teacher is not None
            with torch.no_grad():
                theirs = _hidden(self.teacher, batch, places).float()
            ours = hidden if self.extra is None else self.extra(hidden)
            apart = (ours.float() - theirs).square().mean(-1)
            summed = summed + (1 - share) * (apart * weights).sum()
            metrics["mse_hidden"] = ((apart.detach() * weights).sum(), total)
        return Loss(summed, metrics)


def _hidden(model: Transformer, batch: Batch, places: Tensor, routing: Routing | None = None) -> Tensor:
    """The final hidden states at these places: [places, width]."""
    documents = Documents(batch.lengths, batch.tokens.device)
    return hidden_at(model, batch.tokens, documents, places, routing)
