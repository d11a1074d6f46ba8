"""Guards against forgetting: pulls towards the model training started from, beside a loss.

L2-SP (Xuhong et al. 2018) for the weights; learning without forgetting (Li & Hoiem 2016) for what is said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trivium.data.rows import Batch
from trivium.kit.settings import Settings
from trivium.learn.head_loss import chunk_rows
from trivium.learn.holders import gathered
from trivium.learn.objective import Loss
from trivium.learn.objectives.distillation_losses import capped, kl, scores_of
from trivium.model.arithmetic import note_product
from trivium.model.attention import Documents
from trivium.model.lora import adapted_layers, selected
from trivium.model.transformer import Transformer


class NearParent(Settings):
    """How strongly training is held to the model it starts from."""

    weights: float = Field(default=0.0, ge=0)
    """Half of this times the squared distance of all weights to the parent's is added to the mean loss."""
    kl: float = Field(default=0.0, ge=0)
    """This times KL(parent || model) of each learned token is added to the token's loss."""
    on: list[str] = []
    """The sources whose tokens the divergence holds, such as the replayed ones; empty is all."""

    @model_validator(mode="after")
    def _pulls(self) -> NearParent:
        if not self.weights and not self.kl:
            raise ValueError("give `weights` or `kl` a number above 0, or leave `near_parent` out")
        if self.on and not self.kl:
            raise ValueError("`on` says which sources `kl` holds; give `kl` a number above 0")
        return self


@dataclass(frozen=True)
class Seen:
    """What the objective computed already: the final hidden states and the weights of these places."""

    hidden: Tensor
    weights: Tensor
    wanted: Tensor | None
    """The places of the batch these are, or None for all of them."""


class Guard(Protocol):
    """A term beside the loss that, like it, is a sum to be divided by the weight of the step's tokens."""

    def loss(self, model: Transformer, batch: Batch, seen: Seen) -> Loss:
        """The sum over a batch, with what to log."""


class NearWeights:
    """Half the squared distance to the parent's weights, which an adapter's product is by itself."""

    def __init__(self, model: Transformer, strength: float) -> None:
        self.strength = strength
        self.changes: list[Callable[[], Tensor]] = []
        layers = adapted_layers(model)
        self.changes += [layer.change for layer in layers.values()]
        inside = {id(one) for layer in layers.values() for one in layer.parameters()}
        for parameter in model.parameters():
            if parameter.requires_grad and id(parameter) not in inside:
                self.changes.append(_difference(parameter, parameter.detach().clone()))

    def loss(self, model: Transformer, batch: Batch, seen: Seen) -> Loss:
        """The distance counts as often as the pass has learned tokens, so that dividing leaves it once."""
        squared = torch.stack([change().square().sum() for change in self.changes]).sum()
        total = batch.weights.sum()
        distance = squared.detach().sqrt() * total
        return Loss(self.strength / 2 * squared * total, {"distance_to_parent": (distance, total)})


def _difference(parameter: Tensor, before: Tensor) -> Callable[[], Tensor]:
    return lambda: parameter - before


class NearPredictions:
    """KL(parent || model) at the learned tokens; without a `reference`, of the adapter switched off."""

    def __init__(
        self, strength: float, reference: Transformer | None = None, sources: tuple[int, ...] = ()
    ) -> None:
        self.strength = strength
        self.reference = reference
        self.sources = sources

    def loss(self, model: Transformer, batch: Batch, seen: Seen) -> Loss:
        """The weighted sum of the divergences."""
        weights = seen.weights * self._held(batch, seen)
        places = weights.nonzero().squeeze(1)
        total = weights.sum()
        there = places if seen.wanted is None else seen.wanted[places]
        parent = model if self.reference is None else self.reference
        with torch.no_grad(), selected(model, None) if self.reference is None else nullcontext():
            before = parent(batch.tokens, Documents(batch.lengths, batch.tokens.device))[there]
        apart = divergence(
            seen.hidden[places], gathered(model.head_weight), before, gathered(parent.head_weight.detach()),
            weights[places], soft_cap=model.final_soft_cap,
        )  # fmt: skip
        return Loss(self.strength * apart, {"kl_to_parent": (apart.detach(), total)})

    def _held(self, batch: Batch, seen: Seen) -> Tensor:
        """1 for the tokens of the sources that are held, 0 for the others."""
        if not self.sources:
            return torch.ones_like(seen.weights)
        device = seen.weights.device
        held = torch.tensor([float(one in self.sources) for one in batch.sources], device=device)
        held = batch.spread(held)
        return held if seen.wanted is None else held[seen.wanted]


def divergence(
    hidden: Tensor,
    head: Tensor,
    parent_hidden: Tensor,
    parent_head: Tensor,
    weights: Tensor,
    *,
    soft_cap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The weighted sum of KL(parent || model) over all tokens; logits are made again in the backward pass."""

    def of_chunk(x: Tensor, head: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        ours = torch.log_softmax(capped(scores_of(x, head), soft_cap), -1)
        theirs = torch.log_softmax(capped(scores_of(y, parent_head), soft_cap), -1)
        return (kl(theirs, ours) * weight).sum()

    # Ours is computed twice and differentiated, the parent's computed twice.
    note_product(len(hidden), head, 6)
    rows = chunk or chunk_rows(head.shape[0], hidden.device)
    total = hidden.sum() * 0.0
    for start in range(0, len(hidden), rows):
        piece = slice(start, start + rows)
        total = total + checkpoint(
            of_chunk, hidden[piece], head, parent_hidden[piece], weights[piece], use_reentrant=False
        )
    return total
