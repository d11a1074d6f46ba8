"""The model's own operations with their gradients written out.

Between two matrix products everything is limited by memory, so each of these touches its tensors as few
times as torch's kernels allow and keeps nothing for the backward pass that it can cheaply make again. The
plain formulas stand beside them: they are what a compiler is given, and what other precisions use."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model import float8

Saved = Any


def by_hand(*tensors: Tensor) -> bool:
    """Whether the hand-written gradients apply: float32 throughout, and no compiler that fuses better."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(tensors[0].device.type):
        return False
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def in_product_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The factors of a product that autocast has no rule for, in the type it would have brought them to."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


class SharedInput(torch.autograd.Function):
    """Several matrices applied to the same rows; their gradients to the rows add up inside the products."""

    @staticmethod
    def forward(ctx: Saved, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rows, *weights)
        return tuple(torch.mm(rows, weight.t()) for weight in weights)

    @staticmethod
    def backward(ctx: Saved, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, *weights = ctx.saved_tensors
        to_rows = None
        if ctx.needs_input_grad[0]:
            to_rows = torch.mm(gradients[0], weights[0])
            for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
                torch.addmm(to_rows, gradient, weight, out=to_rows)
        wanted = ctx.needs_input_grad[1:]
        to_weights = [
            torch.mm(gradient.t(), rows) if want else None
            for gradient, want in zip(gradients, wanted, strict=True)
        ]
        return to_rows, *to_weights


def is_plain(linear: nn.Module) -> bool:
    """Whether a projection is nothing but its matrix: no adapter, no quantised or sharded weight, no hook."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )


class Stack(nn.Module):
    """Several projections as one matrix; it stands in the place of the first of them."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> None:
        super().__init__()
        self.weight, self.bias, self.sizes = weight, bias, list(sizes)

    def forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        return F.linear(rows, self.weight, self.bias).split(self.sizes, -1)


def multiply(rows: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The same rows through several projections, each as it is, or in float8 where a pass says so."""
    if isinstance(linears[0], Stack):
        found: tuple[Tensor, ...] = linears[0](rows)
        return found
    if all(float8.applies(linear) for linear in linears):
        return float8.project_in_float8(rows, *linears)
    return tuple(linear(rows) for linear in linears)


def project(rows: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The same rows through several projections, which share a gradient to the rows."""
    if torch.is_grad_enabled() and by_hand(rows) and all(is_plain(linear) for linear in linears):
        return SharedInput.apply(rows, *(linear.weight for linear in linears))
    return multiply(rows, *linears)


def inverse_root_mean_square(rows: Tensor, epsilon: float) -> Tensor:
    """One number per row, in one pass."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm.square_().div_(rows.shape[-1]).add_(epsilon).rsqrt_()


class Normalise(torch.autograd.Function):
    """Rows over their root mean square, times a weight."""

    @staticmethod
    def forward(ctx: Saved, rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        inverse = inverse_root_mean_square(rows, epsilon)
        ctx.save_for_backward(rows, weight, inverse)
        return torch.mul(rows, inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Saved, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weight, inverse = ctx.saved_tensors
        return *normalise_backward(gradient.contiguous(), rows, weight, inverse), None


def normalise_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to the rows and to the weight."""
    width = rows.shape[-1:]
    # Layer norm's kernel with a mean of zero gives this norm's gradient but for one term, the gradient
    # through the mean that is not there: added back, this is twice as fast as the formula in tensors.
    mean = torch.zeros_like(inverse)
    to_rows, to_weight, _ = torch.ops.aten.native_layer_norm_backward(
        gradient, rows, width, mean, inverse, weight, None, (True, True, False)
    )
    through_mean = torch.matmul(gradient, weight).unsqueeze(-1).mul_(inverse).div_(rows.shape[-1])
    return to_rows.add_(through_mean), to_weight


def normalise(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square norm; other precisions are computed in float32, and rounded once the weight is in."""
    if by_hand(rows, weight) and rows.device.type == "cpu":
        return Normalise.apply(rows, weight, epsilon)
    wide = rows.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    if weight.dtype == rows.dtype:
        # A model in 16 bits multiplies in them, as its family does.
        return normal.to(rows.dtype) * weight
    return (normal * weight).to(rows.dtype)


def turn(heads: Tensor, cosine: Tensor, sine: Tensor, sign: float) -> Tensor:
    """Each head's two halves turned against each other, forwards or back."""
    half = heads.shape[-1] // 2
    turned = torch.empty_like(heads, memory_format=torch.contiguous_format)
    first, second = heads[..., :half], heads[..., half:]
    torch.mul(first, cosine, out=turned[..., :half]).addcmul_(second, sine, value=-sign)
    torch.mul(second, cosine, out=turned[..., half:]).addcmul_(first, sine, value=sign)
    return turned


class Rotate(torch.autograd.Function):
    """Rotary positions: the gradient is the turn backwards."""

    @staticmethod
    def forward(ctx: Saved, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return turn(heads, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Saved, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return turn(gradient, cosine, sine, -1.0), None, None


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the halves of [N, H, D] by [N, 1, D/2]."""
    if by_hand(heads, cosine):
        return Rotate.apply(heads, cosine, sine)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class GatedInner(torch.autograd.Function):
    """The SwiGLU network whole: it keeps two of its three wide tensors and makes the third again."""

    @staticmethod
    def forward(
        ctx: Saved, rows: Tensor, gate_weight: Tensor, up_weight: Tensor, down_weight: Tensor
    ) -> Tensor:
        gate, up = torch.mm(rows, gate_weight.t()), torch.mm(rows, up_weight.t())
        ctx.save_for_backward(rows, gate, up, gate_weight, up_weight, down_weight)
        return torch.mm(F.silu(gate).mul_(up), down_weight.t())

    @staticmethod
    def backward(ctx: Saved, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        wants_rows, wants_gate, wants_up, wants_down = ctx.needs_input_grad
        # Writing to memory that is not in a cache costs more than the arithmetic: two buffers serve all.
        active = F.silu(gate)
        inner = torch.mul(active, up)
        to_down = torch.mm(gradient.t(), inner) if wants_down else None
        to_inner = torch.mm(gradient, down_weight, out=inner)
        to_up = active.mul_(to_inner)
        to_gate = to_inner.mul_(up)
        torch.ops.aten.silu_backward.grad_input(to_gate, gate, grad_input=to_gate)
        to_rows = None
        if wants_rows:
            to_rows = torch.mm(to_gate, gate_weight)
            torch.addmm(to_rows, to_up, up_weight, out=to_rows)
        return (
            to_rows,
            torch.mm(to_gate.t(), rows) if wants_gate else None,
            torch.mm(to_up.t(), rows) if wants_up else None,
            to_down,
        )


def gated_inner(rows: Tensor, gate: nn.Module, up: nn.Module, down: nn.Module) -> Tensor:
    """down(silu(gate(rows)) * up(rows))."""
    if torch.is_grad_enabled() and by_hand(rows) and is_plain(gate) and is_plain(up) and is_plain(down):
        return GatedInner.apply(rows, gate.weight, up.weight, down.weight)
    before, beside = multiply(rows, gate, up)
    return multiply(F.silu(before) * beside, down)[0]
