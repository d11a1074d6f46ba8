"""Several processes as one: every one holds the whole model, and gradients are summed over all."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trivium.kit.processes import everyone, world
from trivium.learn.objective import Maximum, Measure, Minimum, accumulate

BUCKET_ELEMENTS = 2**24


def sum_gradients(parameters: Iterable[nn.Parameter], group: Any = None) -> None:
    """Sum the gradients of all processes in place, in a few large messages; the loss was divided before.

    With a `group` of processes, those of a group alone, which hold the same parts of divided parameters.
    """
    if world().size == 1:
        return
    import torch.distributed as distributed

    if group is not None and group.size() == 1:
        return
    parameters = list(parameters)
    bucket: list[Tensor] = []
    filled = 0

    def send() -> None:
        nonlocal filled
        if not bucket:
            return
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        distributed.all_reduce(flat, group=group)
        for gradient, piece in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(piece.view_as(gradient))
        bucket.clear()
        filled = 0

    for parameter, takes_part in zip(parameters, _reached(parameters, group), strict=True):
        # What no row of the step reached, such as the eyes in a step of text, has no gradient in one process.
        if not takes_part:
            continue
        # A process without a document of some kind still has to take its part in the sum.
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        mine = _own_part(parameter.grad)
        bucket.append(mine)
        filled += mine.numel()
        if filled >= BUCKET_ELEMENTS:
            send()
    send()


@torch.no_grad()
def _own_part(gradient: Tensor) -> Tensor:
    """What of a gradient lies on this process, in the same memory."""
    to_local = getattr(gradient, "to_local", None)
    return gradient if to_local is None else to_local()


def _reached(parameters: Sequence[nn.Parameter], group: Any) -> list[bool]:
    """For each parameter whether some process has a gradient of it."""
    import torch.distributed as distributed

    has = torch.tensor([float(one.grad is not None) for one in parameters])
    distributed.all_reduce(has, group=group)
    return [one > 0 for one in has.tolist()]


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The length of the whole gradient."""
    # Of divided tensors and whole ones a list operation takes one kind at a time.
    norms = []
    for gradients in alike(parameter.grad for parameter in parameters if parameter.grad is not None):
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        norms.append(norm if type(norm) is Tensor else norm.full_tensor())
    if not norms:
        # Nothing that is trained took part, as where a step holds text alone and only a new encoder learns.
        return torch.zeros(())
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))


def alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Whole tensors apart from divided ones, these by the processes that share them; no list is empty."""
    kinds: dict[Any, list[Tensor]] = {}
    for one in tensors:
        kinds.setdefault(getattr(one, "device_mesh", None), []).append(one)
    return list(kinds.values())


def clip(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Shorten the gradient to `limit` where it is longer."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradients in alike(parameter.grad for parameter in parameters if parameter.grad is not None):
        # A gradient of which a process holds a part takes a plain number alone.
        torch._foreach_mul_(gradients, factor if type(gradients[0]) is Tensor else factor.item())


def measures_of_all(measures: Mapping[str, Measure]) -> dict[str, tuple[float, float]]:
    """What all processes have measured as one, in plain numbers; not every one need have measured it all."""
    parts = [torch.as_tensor(part).detach().double() for measure in measures.values() for part in measure]
    # One transfer from the device for all of them, not one for each.
    device = max((part.device for part in parts), key=lambda device: device.type != "cpu", default="cpu")
    table = torch.stack([part.to(device) for part in parts]).cpu().view(-1, 2).tolist()
    known: dict[str, Measure] = {
        name: measure._replace(value=value) if isinstance(measure, Minimum | Maximum) else (value, weight)
        for (name, measure), (value, weight) in zip(measures.items(), table, strict=True)
    }
    if world().size > 1:
        said = everyone(known)
        known = {}
        for theirs in said:
            accumulate(known, theirs)
    return {name: (float(known[name][0]), float(known[name][1])) for name in sorted(known)}
