"""The head with its rows, one for each token of the vocabulary, on one process or divided among several.

Of divided rows a process computes its own scores alone. What a loss needs of all of them, the largest score,
a sum of exponentials and the target's score, is agreed upon with one small message each: [tokens], never
[tokens, vocabulary] (Megatron-LM, Shoeybi et al. 1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trivium.model.transformer import Transformer


@dataclass(frozen=True)
class HeadRows:
    """The rows of the head that this process holds."""

    weight: Tensor
    """[rows, width]."""
    whole: Tensor
    """The head that they are of, [vocabulary, width], as the model has it."""
    first: int = 0
    """The token whose row is the first."""
    mesh: Any = None
    """The processes that hold the others; None where this one holds all."""

    def entering(self, hidden: Tensor) -> Tensor:
        """Hidden states whose gradient will be the sum of what all parts of the head send back."""
        if self.mesh is None:
            return hidden
        from torch.distributed.tensor import DTensor, Partial, Replicate

        shared = DTensor.from_local(hidden, self.mesh, [Replicate()], run_check=False)
        return shared.to_local(grad_placements=[Partial()])

    def summed(self, values: Tensor) -> Tensor:
        """Add up, in place, what the parts of the vocabulary gave: [tokens]."""
        if self.mesh is not None:
            import torch.distributed as distributed

            distributed.all_reduce(values, group=self.mesh.get_group())
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The largest, in place, of what the parts of the vocabulary gave: [tokens]."""
        if self.mesh is not None:
            import torch.distributed as distributed

            distributed.all_reduce(values, op=distributed.ReduceOp.MAX, group=self.mesh.get_group())
        return values

    def log_sum_exp(self, logits: Tensor) -> Tensor:
        """Over the whole vocabulary: [tokens, rows] -> [tokens]."""
        mine = torch.logsumexp(logits, 1)
        if self.mesh is None:
            return mine
        highest = self.largest(mine.clone())
        return self.summed((mine - highest).exp_()).log_().add_(highest)

    def at_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The targets' scores: [tokens, rows], [tokens, 1] -> [tokens]."""
        if self.mesh is None:
            return logits.gather(1, targets).squeeze(1)
        places, inside = self._places(targets)
        return self.summed((logits.gather(1, places) * inside).squeeze(1))

    def add_at_targets(self, gradient: Tensor, targets: Tensor, values: Tensor) -> None:
        """Add values to the targets' places, in place: [tokens, rows], [tokens, 1], [tokens, 1]."""
        if self.mesh is None:
            gradient.scatter_add_(1, targets, values)
        else:
            places, inside = self._places(targets)
            gradient.scatter_add_(1, places, values * inside)

    def _places(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Where the targets' rows are among those here, and which of the targets are."""
        places = targets - self.first
        inside = (places >= 0) & (places < len(self.weight))
        return places.clamp(0, max(len(self.weight) - 1, 0)), inside


def rows_here(head_weight: Tensor) -> HeadRows:
    """The part of a head, [vocabulary, width], that this process holds."""
    mesh = getattr(head_weight, "device_mesh", None)
    if mesh is None:
        return HeadRows(head_weight, head_weight)
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(head_weight, DTensor)
    assert head_weight.placements == (Shard(0),)
    vocabulary = head_weight.shape[0]
    # As torch divides: equal parts, the last ones shorter.
    first = min(vocabulary, mesh.get_local_rank() * -(-vocabulary // mesh.size()))
    return HeadRows(head_weight.to_local(), head_weight, first, mesh)


def all_logits(model: Transformer, hidden: Tensor) -> Tensor:
    """The scores of the whole vocabulary, in float32: [tokens, width] -> [tokens, vocabulary]."""
    mesh = getattr(model.head_weight, "device_mesh", None)
    if mesh is None:
        return model.logits(hidden)
    from torch.distributed.tensor import DTensor, Replicate

    scores = model.logits(DTensor.from_local(hidden, mesh, [Replicate()], run_check=False))
    assert isinstance(scores, DTensor)
    return scores.full_tensor()
