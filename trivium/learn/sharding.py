"""How processes share a training: each holds all of it, or a copy of the model is divided among them.

FSDP2 divides what is kept between passes; tensor parallelism divides the passes, too, and both go together.

What is divided: weights, gradients, moments and the running mean. The stage's own model is what validation,
samples, the engine of reinforcement learning and checkpoints look at, which need not know how it is trained.
It is whole while one of them looks, and in between holds nothing; where rollouts may look at any time, it
stays whole on every process and follows after each step.
"""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trivium.data.rows import PackedSequence
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import short
from trivium.kit.processes import broadcast, largest_of_all, world
from trivium.learn.holders import Holders, is_divided
from trivium.learn.parallel import gradient_norm, sum_gradients
from trivium.learn.settings import GROUPS, Parallel
from trivium.model.compiling import compile_between_hooks, compiled
from trivium.model.config import ModelConfig
from trivium.model.experts import Mixture
from trivium.model.initialise import Put, give_room
from trivium.model.quantize import is_quantised
from trivium.model.transformer import Transformer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

TRAINING_BYTES = 16
"""Of a float32 parameter: itself, its gradient and two moments."""
Fill = Callable[[Transformer, Put], None]
"""Fills a model's weights, of which this process may hold a part."""
LossOf = Callable[[Any, int], Tensor]
"""The loss of a step's pass, by its number, under a model; what is measured on the way is noted."""
ROOMY = 0.5
"""Where training needs no more than this share of the free memory, `auto` divides nothing."""


class Replicas:
    """Every process holds the whole model, and gradients are summed before a step."""

    divided = False
    """Whether a process holds a part of the model, so that none can do a pass by itself."""
    peers: Mapping[str, Any] = {}
    """The group of processes that hold a parameter, of those that not all hold, by name."""
    group = 1
    """So many processes, one after the other, do the same passes together, each a part of all of them."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @property
    def place(self) -> tuple[int, int]:
        """Which of how many readers this process is: those of a group read the same rows."""
        return world().rank // self.group, world().size // self.group

    @property
    def speaks(self) -> bool:
        """Whether this process says for its group what was measured."""
        return world().rank % self.group == 0

    def compiled(self) -> Transformer:
        """The model with compiled layers, where this layout allows it."""
        return compiled(self.model)

    def passes(self, own: int) -> int:
        """How many passes a step has on this process, which has rows for `own`."""
        return own

    def budget(self, rows: Sequence[PackedSequence], budget: int) -> int:
        """How many tokens a pass over some of these rows may have, of as many as memory allows."""
        return budget

    def accumulate(self, forward: Any, passes: int, loss_of: LossOf) -> None:
        """Do a step's passes, forward and backward, one after the other."""
        for number in range(passes):
            self.before_backward(number == passes - 1)
            loss = loss_of(forward, number)
            if loss.requires_grad:
                loss.backward()

    def operations(self, passes: float, beside: float) -> float:
        """What all computed in a step, where this one counted so many; of passes each counts its group's."""
        return passes * self.place[1] + beside * world().size

    def before_backward(self, last: bool) -> None:
        """Nothing is sent before all passes of a step are done."""

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over all processes what their rows gave."""
        sum_gradients(parameters)

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The length of the whole gradient."""
        return gradient_norm(parameters.values())

    def follow(self) -> None:
        """The model that is trained is the stage's own."""

    def show(self, *, to_all: bool = True) -> None:
        """The stage's own model is always whole."""

    def release(self) -> None:
        """And stays so."""


class Divided(Replicas):
    """A copy of a model whose parts lie on several processes, trained in the stage's own model's place."""

    divided = True
    root: "FSDPModule | None" = None
    """The whole copy, where FSDP2 divides its weights."""

    def __init__(self, model: Transformer, copied: Transformer, watched: bool) -> None:
        """`watched` says that something may look at the stage's own model at any time."""
        super().__init__(copied)
        self.whole, self.watched = model, watched
        self.device = device_of(model)
        self.released = False

    def compiled(self) -> Transformer:
        """The model as it is: what its layers are made of is divided."""
        return self.model

    def passes(self, own: int) -> int:
        """All processes take part in every pass: as many as the one with the most rows needs."""
        return int(largest_of_all(own))

    def before_backward(self, last: bool) -> None:
        """Only a step's last backward pass sends gradients."""
        if self.root is not None:
            self.root.set_requires_gradient_sync(last)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The last backward pass has summed those of divided weights; of a head every process has all."""
        sum_gradients([one for one in parameters if not is_divided(one)])

    @cached_property
    def trained(self) -> Holders:
        """Which processes have each of the trained weights; asked for by all of them together."""
        return Holders(trained_parameters(self.model))

    def norm(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The length of the whole gradient."""
        return self.trained.norm(parameters)

    @torch.no_grad()
    def follow(self) -> None:
        """Bring the stage's own model up to date, if it is whole now; all processes call it together."""
        if self.released:
            return
        own = dict(self.whole.named_parameters())
        for name, weight in self.trained.whole(trained_parameters(self.model)):
            own[name].copy_(weight)

    @torch.no_grad()
    def show(self, *, to_all: bool = True) -> None:
        """Make the stage's own model whole, one tensor after the other: on every process, or on the first,
        in main memory, as no device need have room for all of it."""
        if not self.released:
            return
        own = dict(self.whole.named_parameters())
        parameters = dict(self.model.named_parameters())
        for name, weight in Holders(parameters).whole(parameters):
            if to_all or world().leads:
                own[name].data = weight if to_all else weight.cpu()
        self.released = not (to_all or world().leads)

    def release(self) -> None:
        """Free the stage's own model until it is looked at; what reads it meanwhile reads no numbers."""
        if self.watched:
            return
        self.released = True
        for module in self.whole.modules():
            for name, one in module.named_parameters(recurse=False):
                nothing = torch.full((), torch.nan, dtype=one.dtype, device=self.device).expand(one.shape)
                if one.is_meta:
                    setattr(module, name, nn.Parameter(nothing, requires_grad=one.requires_grad))
                else:
                    one.data = nothing


class Shards(Divided):
    """Weights are divided and gathered layer by layer for each pass (FSDP2)."""

    def __init__(
        self, model: Transformer, shard: int, *, watched: bool = True, fill: Fill | None = None
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        assert fill is None or not watched
        # The copy has the same weights until they are divided, so that they are in memory once.
        super().__init__(model, copy.deepcopy(model, {id(one): one for one in model.parameters()}), watched)
        replicas = world().size // shard
        shape, names = ((replicas, shard), ("replicate", "shard")) if replicas > 1 else ((shard,), ("shard",))
        mesh = init_device_mesh(self.device.type, shape, mesh_dim_names=names)
        self.root = shard_layers(self.model, mesh)
        if fill is not None:
            self.model.to_empty(device=self.device)
            fill(self.model, put_part)
        self.release()

    def compiled(self) -> Transformer:
        """The model with its layers compiled: each is whole while it computes."""
        compile_between_hooks(self.model)
        return self.model


class Groups(Divided):
    """A copy of a model whose passes a group of processes computes together, all on the same rows.

    They divide every matrix (`tensor`), the tokens (`context`), or both: then those that have the same tokens
    divide matrices. With `shard` weights, gradients and moments are divided besides, among as many groups.
    """

    def __init__(
        self, model: Transformer, tensor: int, shard: int, *, context: int = 1, watched: bool = True
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        from trivium.learn.context_parallel import divide_context
        from trivium.learn.tensor_parallel import divide, refuse_other_layers

        refuse_indivisible(model.config, tensor)
        if tensor > 1:
            refuse_other_layers(model)
        self.group = tensor * context
        shape = (world().size // (self.group * shard), shard, context, tensor)
        # The ranks of a group are neighbours, as what they send in every layer needs the fastest links.
        names = ("replicate", "shard", "context", "tensor")
        mesh = init_device_mesh(model.device.type, shape, mesh_dim_names=names)
        self.replicas = mesh["replicate"]
        super().__init__(model, copy.deepcopy(model), watched)
        self.by_rows = shard > 1
        """Whether what is beside the layers is divided by FSDP2 as well."""
        self.beside: Any = None
        """The processes that have the same parts of the matrices, and other tokens."""
        if tensor > 1:
            everyone = mesh["context", "tensor"]._flatten("group") if context > 1 else mesh["tensor"]
            divide(self.model, mesh["tensor"], everyone)
        if context > 1:
            divide_context(self.model, mesh["context"], weights=tensor == 1)
            self.beside = mesh["context"].get_group() if tensor > 1 else None
        if shard * context > 1:
            self.root = self._share_layers(mesh)
            # That a gather over both takes two messages is no news at every start.
            logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        self.release()

    def _share_layers(self, mesh: "DeviceMesh") -> "FSDPModule":
        """Divide layers among all that have other rows or other tokens, and what is beside them by rows."""
        replicas, shard, context = (mesh[name].size() for name in ("replicate", "shard", "context"))
        parts = "shard" if context == 1 else "context"
        if shard > 1 and context > 1:
            mesh["shard", "context"]._flatten(parts := "parts")
        every = mesh["replicate", parts] if replicas > 1 else mesh[parts]
        by_rows = mesh["replicate", "shard"] if replicas > 1 else mesh["shard"]
        if shard > 1:
            return shard_layers(self.model, every, beside=by_rows)
        layers = {id(one) for one in self.model.layers.parameters()}
        return shard_layers(
            self.model, every, [one for one in self.model.parameters() if id(one) not in layers]
        )

    def passes(self, own: int) -> int:
        """A group does its own passes, all groups the same number where they also divide weights."""
        return own if self.root is None else int(largest_of_all(own))

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum over all groups, and inside of a group what its processes have parts of."""
        from torch.distributed.tensor import DTensor

        whole, parameters = [], list(parameters)
        for one in parameters:
            if one.grad is not None and not is_divided(one):
                # A head of which every process has all: in a group they have the same gradient, too.
                one.grad /= self.group
                whole.append(one)
        sum_gradients(whole)
        layers = {id(one) for one in self.model.layers.parameters()}
        # What FSDP2 divides it has summed.
        left = [one for one in parameters if is_divided(one) and not (self.root and id(one) in layers)]
        if self.beside is not None:
            # All processes of a group divide the tables of tokens; of these each has rows of its own.
            tables = {id(self.model.embedding.weight), id(self.model.head_weight)}
            sum_gradients([one for one in left if id(one) not in tables], self.beside)
        if self.by_rows:
            return
        for one in left:
            if one.grad is not None:
                assert isinstance(one, DTensor)
                assert isinstance(one.grad, DTensor)
                one.grad = one.grad.redistribute(placements=one.placements)
        sum_gradients(left, self.replicas.get_group())


def shard_layers(
    model: Transformer,
    mesh: "DeviceMesh",
    apart: Iterable[nn.Parameter] = (),
    *,
    beside: "DeviceMesh | None" = None,
    stays: bool = False,
) -> "FSDPModule":
    """Divide each layer, and what is beside the layers, over a mesh with FSDP2, in place.

    What is `apart` is left as it is; what is beside the layers may have a mesh of its own. Where it `stays`,
    a layer is whole from its first pass in a step to the last, as in a pipeline: the next follows at once.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    ignored = set(apart)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=not stays, ignored_params=ignored)
    # The root's own weights stay gathered after a pass: the loss reads the head's outside of it.
    fully_shard(model, mesh=beside or mesh, reshard_after_forward=False, ignored_params=ignored)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            # The loss was divided by the weight of all processes' rows, so gradients are summed.
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    assert isinstance(model, FSDPModule)
    return model


def layout_of(
    model: Transformer,
    wish: Parallel,
    *,
    has_extra: bool,
    reshapes: bool,
    pulls: bool = False,
    asks_twice: bool = False,
    watched: bool = True,
    fill: Fill | None = None,
    say: Callable[[str], None],
) -> Replicas:
    """How the processes there are share this model's training; `fill` has the numbers of an empty model."""
    size, tensor, group = world().size, wish.tensor, wish.tensor * wish.context * wish.pipeline
    groups = size if size == 1 else _groups(size, group * wish.expert) * wish.expert
    if size > 1 and wish.expert > 1:
        refuse_indivisible_experts(model.config, wish.expert)
    shard, why = wish.shard if isinstance(wish.shard, int) else groups, ""
    if wish.shard == "auto" and groups > 1:
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        needed = TRAINING_BYTES * (trained - _elsewhere(model, wish.expert)) // (tensor * wish.pipeline)
        # The first process decides for all: each of them sees another amount of free memory.
        free = broadcast(machine.free_on(device_of(model)))
        shard = 1 if needed <= ROOMY * free else groups
        why = f", since {short(needed)}B to train are more than half of the {short(free)}B that are free"
    if size == 1 or shard == group == wish.expert == 1:
        _fill_whole(model, fill)
        return Replicas(model)
    refused = {
        "a stage that trains a head of its own": has_extra and wish.context > 1,
        "`grow`": reshapes,
        "`near_parent.weights`": pulls,
        "what asks the model twice in a pass, as with its adapter off": asks_twice and wish.pipeline > 1,
        # FSDP2 sends no gradient of what a process's rows did not reach, and the others would wait for it.
        "a model that sees or hears": model.modalities is not None,
        "quantised weights": any(is_quantised(one) for one in model.parameters()),
    }
    if reason := next((what for what, is_so in refused.items() if is_so), None):
        key = next((key for key in GROUPS if getattr(wish, key) > 1), "shard")
        raise TriviumError(f"`parallel` cannot divide {reason}; leave `parallel.{key}` out, or say 1.")
    if groups % shard:
        what = "processes there are" if group == 1 else f"groups of {group} processes there are"
        raise TriviumError(f"`parallel.shard` is {shard}, which does not divide the {groups} {what}.")
    if wish.pipeline > 1:
        from trivium.learn.pipeline_parallel import Pipelines

        _fill_whole(model, fill)
        say(f"the layers are divided among {wish.pipeline} processes, which train on the same rows")
        if shard > 1:
            say(f"weights, gradients and moments are divided among {shard} such groups{why}")
        return Pipelines(model, wish.pipeline, shard, watched=watched)
    if group > 1:
        _fill_whole(model, fill)
        layout = Groups(model, tensor, shard, context=wish.context, watched=watched)
        parts = ["every matrix"] * (tensor > 1) + ["the tokens of every pass"] * (wish.context > 1)
        what = f"{' and '.join(parts)} {'is' if parts == ['every matrix'] else 'are'}"
        say(f"{what} divided among {group} processes, which train on the same rows")
        if shard > 1:
            say(f"weights, gradients and moments are divided among {shard} such groups{why}")
        return layout
    if wish.expert > 1:
        from trivium.learn.expert_parallel import ExpertGroups

        say(f"the experts of a layer are divided among {wish.expert} processes, each with rows of its own")
        if shard > 1:
            say(f"weights, gradients and moments are divided among {shard} processes{why}")
        _fill_whole(model, fill)
        return ExpertGroups(model, wish.expert, shard, watched=watched)
    say(f"weights, gradients and moments are divided among {shard} processes{why}")
    return Shards(model, shard, watched=watched, fill=fill)


def _fill_whole(model: Transformer, fill: Fill | None) -> None:
    """Give a model the numbers that it was made without."""
    if fill is not None:
        give_room(model, str(device_of(model)))
        fill(model, Tensor.copy_)


def device_of(model: Transformer) -> torch.device:
    """Where a model is, or will be once it has numbers."""
    return torch.device(machine.device()) if model.device.type == "meta" else model.device


def _groups(size: int, group: int) -> int:
    """How many groups of so many processes there are."""
    if size % group:
        raise TriviumError(
            f"`parallel` wants groups of {group} processes, which do not divide the {size} that there are."
        )
    return size // group


def refuse_indivisible(config: ModelConfig, tensor: int) -> None:
    """Say what of a model's matrices cannot be divided among so many processes."""
    parts = {"heads": config.heads, "key/value heads": config.key_value_heads}
    if config.experts is not None:
        parts["columns of an expert"] = config.experts.inner_width
    if not all(config.is_mixture(layer) for layer in range(config.layers)):
        parts["columns of the inner network"] = config.inner_width
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


def refuse_indivisible_experts(config: ModelConfig, expert: int) -> None:
    """Say why the experts of a model's layers cannot be divided among so many processes."""
    if config.experts is None:
        raise TriviumError(
            "`parallel.expert` divides the experts of a mixture, and this model has none; leave it out."
        )
    if config.experts.count % expert:
        raise TriviumError(
            f"`parallel.expert` is {expert}, which does not divide the model's {config.experts.count} "
            "experts; choose a number that divides them."
        )


def refuse_short(config: ModelConfig, pipeline: int) -> None:
    """Say why a model's layers cannot lie on so many processes."""
    if config.layers < pipeline:
        raise TriviumError(
            f"`parallel.pipeline` is {pipeline}, and the model has {config.layers} layers; choose no more."
        )
    if config.experts is not None:
        raise TriviumError(
            "`parallel.pipeline` cannot divide a mixture of experts, whose balance all layers make; divide "
            "by `expert`, `tensor` or `shard`."
        )


def _elsewhere(model: Transformer, expert: int) -> int:
    """How many trained numbers of a model's experts lie on the other ones of so many processes."""
    mixtures = [layer.mlp.experts for layer in model.layers if isinstance(layer.mlp, Mixture)]
    trained = sum(one.numel() for part in mixtures for one in part.parameters() if one.requires_grad)
    return trained - trained // expert


class Extent(NamedTuple):
    """Which part of a divided tensor this process holds."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    """Where the part begins in the whole tensor."""


def extent_of(tensor: Tensor) -> Extent:
    """Which part of a divided tensor [...] this process holds."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return Extent(tuple(shape), tuple(offset))


def is_first(tensor: Tensor, first: int) -> bool:
    """Whether no process of a lower rank has this one's part of a tensor; `first` is the first with any."""
    if not is_divided(tensor):
        return world().rank == first
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate() or ()
    alike = [at for at, placement in zip(place, tensor.placements, strict=True) if placement.is_replicate()]
    # Of groups that are alike, each with a mesh of its own, one has the first process.
    return not any(alike) and first in mesh.mesh


def put_part(weight: Tensor, values: Tensor) -> None:
    """Write this process's part of whole numbers [...] into a divided weight [...]; nothing is sent."""
    weight.copy_(divided_as(values, weight))


def gathered_by_first(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, one by one; what not every process has whole the first alone has, in main memory."""
    holders = Holders(tensors)
    found = {}
    for name, whole in holders.whole(tensors):
        if name in holders.everywhere and not is_divided(tensors[name]):
            found[name] = tensors[name]
        elif world().leads:
            found[name] = whole.cpu()
    return found


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


def shared_out(stack: Tensor, work: Callable[[Tensor], Tensor], group: Any = None) -> Tensor:
    """What `work` makes of a stack [n, ...] that all processes have: each does a part, all get the whole.

    With a `group` of processes, those of a group alone."""
    if world().size == 1:
        return work(stack)
    import torch.distributed as distributed

    rank, size = distributed.get_rank(group), distributed.get_world_size(group)
    each = -(-len(stack) // size)
    mine = stack[rank * each : (rank + 1) * each]
    made = stack.new_zeros((each, *stack.shape[1:]))
    if len(mine):
        made[: len(mine)] = work(mine)
    parts = [torch.empty_like(made) for _ in range(size)]
    distributed.all_gather(parts, made, group=group)
    return torch.cat(parts)[: len(stack)]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a model trains, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}
