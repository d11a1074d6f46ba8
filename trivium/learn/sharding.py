"""How processes share a training: each holds all of it, or a copy of the model is divided among them.

FSDP2 divides what is kept between passes; tensor parallelism divides the passes, too, and both go together.

The stage's own model stays whole on every process and follows after each step, so that what looks at it
(validation, samples, the engine of reinforcement learning, what is saved) need not know how it is trained.
What is divided is what training adds: gradients, moments, the running mean, and the weights it works on.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.kit.processes import broadcast, largest_of_all, world
from trivium.learn.parallel import sum_gradients
from trivium.learn.settings import Parallel
from trivium.model.config import ModelConfig
from trivium.model.quantize import is_quantised
from trivium.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

TRAINING_BYTES = 16
"""Of a float32 parameter: itself, its gradient and two moments."""
ROOMY = 0.5
"""Where training needs no more than this share of the free memory, `auto` divides nothing."""


class Replicas:
    """Every process holds the whole model, and gradients are summed before a step."""

    divided = False
    """Whether a process holds a part of the model, so that none can do a pass by itself."""
    group = 1
    """So many processes, one after the other, do the same passes together, each a part of all of them."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def passes(self, own: int) -> int:
        """How many passes a step has on this process, which has rows for `own`."""
        return own

    def before_backward(self, last: bool) -> None:
        """Nothing is sent before all passes of a step are done."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over all processes what their rows gave."""
        sum_gradients(parameters)

    def follow(self) -> None:
        """The model that is trained is the stage's own."""


class Shards:
    """A copy of a model whose parts lie on several processes, trained in the model's place."""

    divided = True
    group = 1

    def __init__(self, model: Transformer, shard: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        replicas = world().size // shard
        shape, names = ((replicas, shard), ("replicate", "shard")) if replicas > 1 else ((shard,), ("shard",))
        mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=names)
        self.whole = model
        self.model = copy.deepcopy(model)
        self.root = shard_layers(self.model, mesh)

    def passes(self, own: int) -> int:
        """All processes take part in every pass: as many as the one with the most rows needs."""
        return int(largest_of_all(own))

    def before_backward(self, last: bool) -> None:
        """Only a step's last backward pass sends gradients."""
        self.root.set_requires_gradient_sync(last)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The last backward pass has summed them."""

    def follow(self) -> None:
        """Bring the whole model up to date; all processes call it together."""
        follow(self.whole, self.model)


class Tensors:
    """A copy of a model whose every matrix is divided among a group of processes, which see the same rows.

    With `shard` the parts are divided once more, among as many groups.
    """

    divided = True

    def __init__(self, model: Transformer, tensor: int, shard: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        from trivium.learn.tensor_parallel import divide, refuse_other_layers

        refuse_indivisible(model.config, tensor)
        refuse_other_layers(model)
        self.group = tensor
        shape = (world().size // (tensor * shard), shard, tensor)
        # The ranks of a group are neighbours, as what they send in every layer needs the fastest links.
        mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=("replicate", "shard", "tensor"))
        self.replicas = mesh["replicate"]
        self.whole = model
        self.model = copy.deepcopy(model)
        divide(self.model, mesh["tensor"])
        data = mesh["replicate", "shard"] if shape[0] > 1 else mesh["shard"]
        self.root = shard_layers(self.model, data) if shard > 1 else None
        if shard > 1:
            # That a gather over both takes two messages is no news at every start.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)

    def passes(self, own: int) -> int:
        """A group does its own passes, all groups the same number where they also divide weights."""
        return own if self.root is None else int(largest_of_all(own))

    def before_backward(self, last: bool) -> None:
        """Only a step's last backward pass sends gradients to other groups."""
        if self.root is not None:
            self.root.set_requires_gradient_sync(last)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over all groups, and inside of a group what its processes have parts of."""
        if self.root is not None:
            return
        from torch.distributed.tensor import DTensor

        parameters = list(parameters)
        for one in parameters:
            if one.grad is not None:
                assert isinstance(one, DTensor)
                assert isinstance(one.grad, DTensor)
                one.grad = one.grad.redistribute(placements=one.placements)
        sum_gradients(parameters, self.replicas.get_group())

    def follow(self) -> None:
        """Bring the whole model up to date; all processes call it together."""
        follow(self.whole, self.model)


Layout = Replicas | Shards | Tensors


def shard_layers(model: Transformer, mesh: "DeviceMesh") -> "FSDPModule":
    """Divide each layer, and what is beside the layers, over a mesh with FSDP2, in place."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    # The root's own weights stay gathered after a pass: the loss reads the head's outside of it.
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # The loss was divided by the weight of all processes' rows, so gradients are summed.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    assert isinstance(model, FSDPModule)
    return model


@torch.no_grad()
def follow(whole: nn.Module, divided_copy: nn.Module) -> None:
    """Bring the whole model up to date with the copy that is trained; all processes call it together."""
    own = dict(whole.named_parameters())
    for name, parameter in divided_copy.named_parameters():
        if parameter.requires_grad:
            own[name].copy_(gathered(parameter.detach()))


def layout_of(
    model: Transformer,
    wish: Parallel,
    *,
    has_extra: bool,
    reshapes: bool,
    pulls: bool = False,
    say: Callable[[str], None],
) -> Layout:
    """How the processes there are share this model's training."""
    size, tensor = world().size, wish.tensor
    groups = size if size == 1 else _groups(size, tensor)
    shard, why = wish.shard if isinstance(wish.shard, int) else groups, ""
    if wish.shard == "auto" and groups > 1:
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        needed = TRAINING_BYTES * trained // tensor
        # The first process decides for all: each of them sees another amount of free memory.
        free = broadcast(_free_memory(model.device))
        shard = 1 if needed <= ROOMY * free else groups
        why = f", since {short(needed)}B to train are more than half of the {short(free)}B that are free"
    if size == 1 or shard == tensor == 1:
        return Replicas(model)
    refused = {
        "a stage that trains a head of its own": has_extra,
        "`grow`": reshapes,
        "`near_parent.weights`": pulls,
        # FSDP2 sends no gradient of what a process's rows did not reach, and the others would wait for it.
        "a mixture of experts": model.config.experts is not None,
        "a model that sees or hears": model.modalities is not None,
        "quantised weights": any(is_quantised(one) for one in model.parameters()),
    }
    if reason := next((what for what, is_so in refused.items() if is_so), None):
        key = "tensor" if tensor > 1 else "shard"
        raise TriviumError(f"`parallel` cannot divide {reason}; leave `parallel.{key}` out, or say 1.")
    if groups % shard:
        what = "processes there are" if tensor == 1 else f"groups of {tensor} processes there are"
        raise TriviumError(f"`parallel.shard` is {shard}, which does not divide the {groups} {what}.")
    if tensor > 1:
        layout = Tensors(model, tensor, shard)
        say(f"every matrix is divided among {tensor} processes, which train on the same rows")
        if shard > 1:
            say(f"each part of it, with gradients and moments, is divided among {shard} such groups{why}")
        return layout
    say(f"weights, gradients and moments are divided among {shard} processes{why}")
    return Shards(model, shard)


def _groups(size: int, tensor: int) -> int:
    """How many groups of so many processes there are."""
    if size % tensor:
        raise TriviumError(
            f"`parallel.tensor` is {tensor}, which does not divide the {size} processes there are."
        )
    return size // tensor


def refuse_indivisible(config: ModelConfig, tensor: int) -> None:
    """Say what of a model's matrices cannot be divided among so many processes."""
    parts = {
        "heads": config.heads,
        "key/value heads": config.key_value_heads,
        "columns of the inner network": config.inner_width,
    }
    for what, count in parts.items():
        if count % tensor:
            raise TriviumError(
                f"`parallel.tensor` is {tensor}, which does not divide the model's {count} {what}; "
                "choose a number that divides them, or divide by `shard`."
            )
    if config.query_key_norm == "full":
        raise TriviumError(
            f"`parallel.tensor` cannot divide models of the family {config.family}, which norm queries of "
            "all heads together; divide by `shard`."
        )


def _free_memory(device: torch.device) -> int:
    """What is free on the device now, in bytes."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else machine.free_memory()


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor, of which every process may hold a part; all of them call it together."""
    whole = getattr(tensor, "full_tensor", None)
    return tensor if whole is None else whole()


def is_divided(tensor: Tensor) -> bool:
    """Whether a process holds a part of it."""
    return hasattr(tensor, "placements")


class Extent(NamedTuple):
    """Which part of a divided tensor this process holds."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where the part begins in the whole tensor."""
    is_first: bool
    """Whether no process of a lower rank holds the same."""


def extent_of(tensor: Tensor) -> Extent:
    """Which part of a divided tensor [...] this process holds."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    mesh, placements = tensor.device_mesh, tensor.placements
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    place = mesh.get_coordinate() or ()
    alike = [at for at, placement in zip(place, placements, strict=True) if placement.is_replicate()]
    # Of groups that are alike, each with a mesh of its own, one has the first process.
    return Extent(tuple(shape), tuple(offset), not any(alike) and 0 in mesh.mesh)


def divided_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has at hand, divided as another one is; nothing is sent."""
    if not is_divided(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    whole = tensor.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def divided(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, each divided as the one of its name is."""
    found = dict(tensors)
    for name, one in like.items():
        if name in tensors and tensors[name].shape == one.shape:
            found[name] = divided_as(tensors[name], one)
    return found


def shared_out(stack: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """What `work` makes of a stack [n, ...] that all processes have: each does a part, all get the whole."""
    import torch.distributed as distributed

    here = world()
    each = -(-len(stack) // here.size)
    mine = stack[here.rank * each : (here.rank + 1) * each]
    made = stack.new_zeros((each, *stack.shape[1:]))
    if len(mine):
        made[: len(mine)] = work(mine)
    parts = [torch.empty_like(made) for _ in range(here.size)]
    distributed.all_gather(parts, made)
    return torch.cat(parts)[: len(stack)]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model trains, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}
