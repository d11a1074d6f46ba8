"""Tensor parallelism: every matrix is divided, so that a group of processes computes a pass together.

Queries, keys, values, gate and up lie by columns: a process has whole heads, and a part of the inner width.
Output and down lie by rows: what the processes make of them is added up (Shoeybi et al., 1909.08053). The
tables of tokens, embedding and head, are divided along the vocabulary. Norms, and whatever else has a vector
alone, every process holds whole. All of it is a plan for torch's `parallelize_module`; the model's own code
knows nothing of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import Placement

from trivium.kit.errors import TriviumError
from trivium.model.transformer import Layer, Transformer


class Whole(ParallelStyle):
    """Every process holds a module's weights whole and computes with them as if it were alone."""

    def __init__(self, gradient: Placement) -> None:
        """`gradient` says what a backward pass gives each process: all of it, or a part of a sum."""
        super().__init__()
        self.gradient = gradient

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            weight = distribute_tensor(parameter, device_mesh, [Replicate()], src_data_rank=None)
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


def divide(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide a model's matrices, in place, among the processes of a one-dimensional mesh."""
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "norm": Whole(Replicate()),
    }
    if model.head is not None:
        plan["head"] = ColwiseParallel()
    if model.position_embedding is not None:
        plan["position_embedding"] = Whole(Replicate())
    for number, layer in enumerate(model.layers):
        plan |= {f"layers.{number}.{name}": style for name, style in _plan_of(layer).items()}
    # All processes have the same weights at hand, so nothing has to be sent.
    parallelize_module(model, mesh, plan, src_data_rank=None)


def _plan_of(layer: nn.Module) -> dict[str, ParallelStyle]:
    """How one layer is divided."""
    assert isinstance(layer, Layer)
    # Entered once for all columns, so that their gradients to the rows travel in one message.
    entered = PrepareModuleInput(
        input_layouts=(Replicate(), None, None, None), desired_input_layouts=(Replicate(), None, None, None)
    )
    plan: dict[str, ParallelStyle] = {
        "attention": entered,
        "mlp": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Replicate()),
        "attention.output": RowwiseParallel(),
        "mlp.down": RowwiseParallel(),
    }
    plan |= {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    columns = ("up",) if layer.mlp.gate is None else ("gate", "up")
    plan |= {f"mlp.{name}": ColwiseParallel() for name in columns}
    if layer.attention.norm_kind == "head":
        # A process norms its own heads alone, so that its gradient is what these give.
        plan |= {f"attention.{name}": Whole(Partial()) for name in ("query_norm", "key_norm")}
    for name in ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm"):
        if getattr(layer, name) is not None:
            plan[name] = Whole(Replicate())
    return plan


def refuse_other_layers(model: Transformer) -> None:
    """Only plain matrices have a plan."""
    if any(isinstance(one, nn.Linear) and type(one) is not nn.Linear for one in model.layers.modules()):
        raise TriviumError("`parallel.tensor` cannot divide `adapter` or `qat`; divide by `shard`.")
