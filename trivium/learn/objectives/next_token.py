"""Next-token prediction: the objective of pre-training, mid-training and supervised fine-tuning."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.data.rows import Batch, PackedSequence
from trivium.learn.head_loss import fused_cross_entropy
from trivium.learn.objective import Loss, Measure
from trivium.learn.objectives.near_parent import Guard, Seen
from trivium.model.attention import Documents
from trivium.model.experts import Routing
from trivium.model.transformer import Transformer

WORTH_LEAVING_OUT = 0.75
"""The share of learned tokens below which the last layer computes only theirs."""


def noise_for(model: Transformer, batch: Batch, strength: float) -> Tensor:
    """Uniform noise [tokens, width] up to strength / sqrt(length × width) of the document (NEFTune, 2023)."""
    width, device = model.config.width, batch.tokens.device
    lengths = torch.tensor(batch.lengths, device=device)
    largest = batch.spread(strength / (lengths * width).sqrt())[:, None]
    noise = torch.empty(len(batch.tokens), width, dtype=model.dtype, device=device).uniform_(-1, 1)
    return noise * largest.to(noise.dtype)


def learned_places(batch: Batch) -> Tensor | None:
    """Where something is learned, if that is so little of the batch that leaving out the rest pays."""
    few = batch.learned is not None and len(batch.learned) < WORTH_LEAVING_OUT * len(batch.tokens)
    return batch.learned if few else None


class NextToken:
    """The weighted negative log-likelihood of each next token."""

    name = "next_token"
    extra = None

    def __init__(
        self,
        *,
        sources: Sequence[str] = (),
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        noise: float = 0.0,
        guards: Sequence[Guard] = (),
    ) -> None:
        self.sources = tuple(sources)
        self.z_loss = z_loss
        self.label_smoothing = label_smoothing
        self.noise = noise
        self.guards = tuple(guards)

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        return float(sum(row.weights.sum(dtype="float64") for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """The loss sum, the share of right guesses, and the loss of every source."""
        documents = Documents(batch.lengths, batch.tokens.device)
        # The model adds it in the pass: outside of it the table may lie in parts on several processes.
        noise = noise_for(model, batch, self.noise) if self.noise else None
        experts = model.config.experts
        routing = Routing() if experts is not None and experts.balance else None
        wanted = learned_places(batch) if experts is None else None
        targets, weights = batch.targets, batch.weights
        if wanted is None:
            hidden = model(batch.tokens, documents, noise=noise, routing=routing)
        else:
            hidden = model(batch.tokens, documents, noise=noise, wanted=wanted)
            targets, weights = targets[wanted], weights[wanted]
        result = fused_cross_entropy(
            hidden, model.head_weight, targets, weights,
            soft_cap=model.final_soft_cap, z_loss=self.z_loss, label_smoothing=self.label_smoothing,
            learned="all" if wanted is not None or batch.learned is None else batch.learned,
        )  # fmt: skip
        losses = result.token_losses * weights
        total = weights.sum()
        metrics: dict[str, Measure] = {
            "loss": (losses.sum(), total),
            "mean_token_accuracy": ((result.correct * weights).sum(), total),
        }
        if len(self.sources) > 1:
            source = batch.spread(torch.tensor(batch.sources, device=losses.device))
            source = source if wanted is None else source[wanted]
            for index, name in enumerate(self.sources):
                mine = source == index
                metrics[f"loss/{name}"] = ((losses * mine).sum(), (weights * mine).sum())
        loss = result.sum
        if experts is not None and routing is not None:
            balance = routing.balance_loss()
            # The balance of a pass is a mean; its weight makes it count like the tokens it was taken over.
            loss = loss + experts.balance * balance * total
            metrics["aux_loss"] = (balance.detach() * total, total)
        for guard in self.guards:
            pull = guard.loss(model, batch, Seen(hidden, weights, wanted))
            loss = loss + pull.sum
            metrics |= pull.metrics
        return Loss(loss, metrics)
