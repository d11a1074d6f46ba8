"""Tensor parallelism: every matrix is divided, so that a group of processes computes a pass together.

Queries, keys, values, gate and up lie by columns: a process has whole heads, and a part of the inner width.
Output and down lie by rows: what the processes make of them is added up (Shoeybi et al., 1909.08053). The
tables of tokens, embedding and head, are divided along the vocabulary. Norms, and whatever else has a vector
alone, every process holds whole. Between the layers each has a piece of the tokens, so that nothing is kept
or normed twice: to gather before columns and to scatter the sums after rows sends as much as adding up would
(Korthikanti et al., 2205.05198). The last layer, which may compute some of the tokens only, has all of them
everywhere. Of a mixture's experts each process has such parts as well, and the router whole. All of it is a
plan for torch's `parallelize_module`; the model's own code knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from trivium.kit.errors import TriviumError
from trivium.model.attention import Context
from trivium.model.experts import Mixture, Routing
from trivium.model.lora import adapted_layers
from trivium.model.transformer import Layer, Transformer


class Local(ParallelStyle):
    """Every process computes with what it holds of a module's weights as if it were alone."""

    def __init__(self, held: Placement, gradient: Placement) -> None:
        """`gradient` says what a backward pass gives each process of it: all, or a part of a sum."""
        super().__init__()
        self.held, self.gradient = held, gradient

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = distribute_tensor(parameter, device_mesh, [self.held], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(weight, requires_grad=parameter.requires_grad))
        held: dict[str, Tensor] = {}
        # In a pass its weights are plain tensors, for which the model's own operations are written.
        module.register_forward_pre_hook(partial(self._lend, held))
        module.register_forward_hook(partial(self._take_back, held), always_call=True)
        return module

    def _lend(self, held: dict[str, Tensor], module: nn.Module, inputs: Any) -> None:
        held.update((name, one) for name, one in module._parameters.items() if one is not None)
        for name, weight in held.items():
            assert isinstance(weight, DTensor)
            module._parameters[name] = weight.to_local(grad_placements=[self.gradient])  # type: ignore[assignment]

    def _take_back(self, held: dict[str, Tensor], module: nn.Module, inputs: Any, output: Any) -> None:
        module._parameters.update(held)  # type: ignore[arg-type]
        held.clear()


class Whole(Local):
    """Every process holds a module's weights whole."""

    def __init__(self, gradient: Placement) -> None:
        super().__init__(Replicate(), gradient)


class Pieces:
    """The tokens of a pass, of which each process of a group has a piece between the layers."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.tokens = 0
        """How many the pass has: a piece alone does not say it, as pieces need not be equal."""

    def split(self, stream: Tensor) -> Tensor:
        """This process's piece: [tokens, width] -> [piece, width]."""
        whole = DTensor.from_local(stream, self.mesh, [Replicate()], run_check=False)
        return whole.redistribute(placements=[Shard(0)]).to_local()

    def gathered(self, piece: Tensor) -> DTensor:
        """All tokens: [piece, width] -> [tokens, width]."""
        width = piece.shape[-1]
        pieces = DTensor.from_local(
            piece, self.mesh, [Shard(0)], run_check=False, shape=torch.Size((self.tokens, width)),
            stride=(width, 1),
        )  # fmt: skip
        return pieces.redistribute(placements=[Replicate()])


class Entered(ParallelStyle):
    """What is done to the first input of a module before it is called."""

    def __init__(self, enter: Callable[..., Tensor]) -> None:
        """`enter` makes the first input of all of them."""
        super().__init__()
        self.enter = enter

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, inputs: (self.enter(*inputs), *inputs[1:]))
        return module


class Parted:
    """A pass's routing that all processes of a group note: each sends back its part of the gradient."""

    def __init__(self, routing: Routing, size: int) -> None:
        self.routing, self.size = routing, size

    def note(self, probabilities: Tensor, counts: Tensor) -> None:
        part = probabilities / self.size
        self.routing.note(part + (probabilities - part).detach(), counts)


class MixtureParallel(ParallelStyle):
    """A mixture that has a part of each expert: all processes route all tokens, and add up what they make.

    What an expert's output weighs multiplies a part of that output, so that every gradient in here, the
    router's and the rows' too, is a part of a sum.
    """

    def __init__(self, pieces: Pieces | None) -> None:
        """With `pieces` a process has a piece of the tokens before and after, else all."""
        super().__init__()
        self.pieces = pieces

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.mesh = device_mesh
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)
        return module

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, Routing | None]) -> Any:
        rows, routing = inputs
        if self.pieces is None:
            everywhere = DTensor.from_local(rows, self.mesh, [Replicate()], run_check=False)
        else:
            everywhere = self.pieces.gathered(rows)
        noted = None if routing is None else Parted(routing, self.mesh.size())
        return everywhere.to_local(grad_placements=[Partial()]), noted

    def _leave(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        made = DTensor.from_local(output, self.mesh, [Partial()], run_check=False)
        result = Replicate() if self.pieces is None else Shard(0)
        return made.redistribute(placements=[result]).to_local()


class _Parted:
    """A matrix of a layer and, if it carries adapters, both matrices of each, which follow it."""

    places: Mapping[str, Placement]
    """How the weight, the bias and each adapter's `down` and `up` lie."""

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        # Called for the layer, and for the dictionaries in it that hold its adapters' matrices.
        for key, one in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(one, device_mesh, [self.places[name or key]], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(part, requires_grad=one.requires_grad))


class Columns(_Parted, ColwiseParallel):
    """Outputs are divided: the narrow rows of an adapter every process has."""

    places: Mapping[str, Placement] = {
        "weight": Shard(0), "bias": Shard(0), "down": Replicate(), "up": Shard(0),
    }  # fmt: skip


class Rows(_Parted, RowwiseParallel):
    """Inputs are divided: what an adapter makes of them is added up with the rest."""

    places: Mapping[str, Placement] = {
        "weight": Shard(1), "bias": Replicate(), "down": Shard(1), "up": Replicate(),
    }  # fmt: skip


def divide_tables(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide embedding and head, in place, along the vocabulary."""
    plan: dict[str, ParallelStyle] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
    if model.head is not None:
        plan["head"] = ColwiseParallel()
    parallelize_module(model, mesh, plan, src_data_rank=None)


def divide(model: Transformer, mesh: DeviceMesh, tables: DeviceMesh | None = None) -> None:
    """Divide a model's matrices, in place, among the processes of a one-dimensional mesh.

    Those of `tables`, if they are others, divide embedding and head."""
    divide_tables(model, mesh if tables is None else tables)
    plan: dict[str, ParallelStyle] = {"norm": Whole(Replicate())}
    if model.position_embedding is not None:
        plan["position_embedding"] = Whole(Replicate())
    pieces, last = Pieces(mesh), len(model.layers) - 1
    for number, layer in enumerate(model.layers):
        styles = _plan_of(layer, None if number == last else pieces)
        if last:
            styles[""] = _between(pieces, is_first=number == 0, is_last=number == last)
        plan |= {f"layers.{number}.{name}".rstrip("."): style for name, style in styles.items()}
    # All processes have the same weights at hand, so nothing has to be sent.
    parallelize_module(model, mesh, plan, src_data_rank=None)


def _between(pieces: Pieces, *, is_first: bool, is_last: bool) -> Entered:
    """What a layer does with the stream it is given: the first splits it, the last gathers it."""

    def enter(stream: Tensor, context: Context, *others: Any) -> Tensor:
        pieces.tokens = len(context.positions)
        if is_first:
            return pieces.split(stream)
        return pieces.gathered(stream).to_local() if is_last else stream

    return Entered(enter)


def _plan_of(layer: nn.Module, pieces: Pieces | None) -> dict[str, ParallelStyle]:
    """How one layer is divided, and with `pieces` the tokens of what it adds to."""
    assert isinstance(layer, Layer)
    # Entered once for all columns, so that their gradients to the rows travel in one message.
    if pieces is None:
        layouts = (Replicate(), None, None, None)
        plan: dict[str, ParallelStyle] = {
            "attention": PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts),
            "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
        }
    else:
        gathered = pieces.gathered
        plan = {name: Entered(lambda rows, *others: gathered(rows)) for name in ("attention", "mlp")}
    result = Replicate() if pieces is None else Shard(0)
    plan["attention.output"] = Rows(output_layouts=result)
    plan |= {f"attention.{name}": Columns() for name in ("query", "key", "value")}
    if isinstance(layer.mlp, Mixture):
        plan |= {"mlp": MixtureParallel(pieces), "mlp.router": Whole(Partial())}
        plan |= {f"mlp.experts.*.{name}": Local(Shard(0), Shard(0)) for name in ("gate", "up")}
        plan["mlp.experts.*.down"] = Local(Shard(1), Shard(1))
    else:
        plan["mlp.down"] = Rows(output_layouts=result)
        plan |= {f"mlp.{name}": Columns() for name in ("gate", "up") if getattr(layer.mlp, name)}
    if layer.attention.norm_kind == "head":
        # A process norms its own heads alone, so that its gradient is what these give.
        plan |= {f"attention.{name}": Whole(Partial()) for name in ("query_norm", "key_norm")}
    for name in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
        if getattr(layer, name) is not None:
            plan[name] = Whole(Replicate() if pieces is None else Partial())
    return plan


def refuse_other_layers(model: Transformer) -> None:
    """Plain matrices have a plan, and such with adapters that only add to them."""
    adapted = adapted_layers(model)
    for name, one in model.named_modules():
        if not isinstance(one, nn.Linear) or type(one) is nn.Linear or not name.startswith("layers."):
            continue
        adds = name in adapted and not adapted[name].taken and ".experts." not in name
        if not adds or any(shape.normed for shape in adapted[name].shapes.values()):
            raise TriviumError(
                "`parallel.tensor` cannot divide `qat`, adapters of the kinds dora and pissa, and those on "
                "experts; divide by `shard`."
            )
