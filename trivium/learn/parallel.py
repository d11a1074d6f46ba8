"""Several processes as one: every one holds the whole model, and gradients are summed over all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from trivium.kit.processes import world

BUCKET_ELEMENTS = 2**24


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum the gradients of all processes in place, in a few large messages; the loss was divided before."""
    if world().size == 1:
        return
    import torch.distributed as distributed

    bucket: list[Tensor] = []
    filled = 0

    def send() -> None:
        nonlocal filled
        if not bucket:
            return
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat)
        for gradient, piece in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(piece.view_as(gradient))
        bucket.clear()
        filled = 0

    for parameter in parameters:
        # A process without a document of some kind still has to take its part in the sum.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        filled += parameter.grad.numel()
        if filled >= BUCKET_ELEMENTS:
            send()
    send()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The length of the whole gradient."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Shorten the gradient to `limit` where it is longer."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


def sum_measures(measures: Mapping[str, Sequence[Tensor | float]]) -> dict[str, tuple[float, float]]:
    """The (sum, weight) pairs of all processes added up; every process must have measured the same things."""
    names = sorted(measures)
    if world().size > 1:
        import torch.distributed as distributed

        everyone: list[list[str]] = [[] for _ in range(world().size)]
        distributed.all_gather_object(everyone, names)
        names = sorted(set().union(*everyone))
    parts = [part for name in names for part in measures.get(name, (0.0, 0.0))]
    # One transfer from the device for all of them, not one for each.
    stacked = [torch.as_tensor(part).detach().double() for part in parts]
    device = max((part.device for part in stacked), key=lambda device: device.type != "cpu", default="cpu")
    table = torch.stack([part.to(device) for part in stacked]).cpu().view(-1, 2)
    if world().size > 1:
        import torch.distributed as distributed

        distributed.all_reduce(table)
    return {name: (row[0], row[1]) for name, row in zip(names, table.tolist())}
