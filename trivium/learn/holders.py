"""Who holds what: a process may have a part of a weight, or not have it at all.

Parts of a weight are torch's DTensors. Whole layers (pipelines) and whole experts are weights that some
processes have under their names and others have not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from trivium.kit.processes import all_reduce_sum, everyone, world
from trivium.learn.parallel import gradient_norm


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor, of which a process may hold a part; all that hold one call it together."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def is_divided(tensor: Tensor) -> bool:
    """Whether a process holds a part of it."""
    return hasattr(tensor, "placements")


class Holders:
    """Which processes have a tensor of each name; all processes make it, and call its methods, together."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        said = everyone({name: (tuple(one.shape), one.dtype) for name, one in tensors.items()})
        self.forms: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.first: dict[str, int] = {}
        """The first process that has it, by name."""
        for rank, theirs in enumerate(said):
            for name in theirs:
                self.first.setdefault(name, rank)
            self.forms |= theirs
        self.everywhere = {name for name in self.first if all(name in theirs for theirs in said)}
        """What every process has."""

    def whole(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that some process has, whole, one after the other, on all processes."""
        device = next((one.device for one in tensors.values()), torch.device("cpu"))
        for name in sorted(self.first):
            mine = tensors.get(name)
            whole = None if mine is None else gathered(mine.detach())
            if whole is None or name not in self.everywhere:
                whole = self._sent(name, whole, device)
            yield name, whole

    def _sent(self, name: str, whole: Tensor | None, device: torch.device) -> Tensor:
        """What the first process that has it sends to all."""
        import torch.distributed as distributed

        shape, kind = self.forms[name]
        sent = torch.empty(shape, dtype=kind, device=device)
        if whole is not None:
            sent.copy_(whole)
        distributed.broadcast(sent, self.first[name])
        return sent

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The length of the whole gradient; what no process is known for, all have."""
        shared, others = [], defaultdict(list)
        for name, one in parameters.items():
            if name in self.first and name not in self.everywhere:
                others[self.first[name]].append(one)
            else:
                shared.append(one)
        common = gradient_norm(shared)
        if len(self.everywhere) == len(self.first):
            return common
        lengths = {first: float(gradient_norm(theirs)) for first, theirs in sorted(others.items())}
        # What several processes have counts once.
        rest = all_reduce_sum(lengths.get(world().rank, 0.0) ** 2)
        return (common.double().square() + rest).sqrt()
