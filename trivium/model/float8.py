"""Matrix products in float8, with one scale for a whole tensor, measured anew in every pass.

Micikevicius et al., 2209.05433: what a layer reads and its weights are rounded to e4m3 (4 bits of exponent,
3 of fraction), the gradients that come back to e5m2, which reaches further. A GPU with float8 multiplies such
numbers twice as fast as 16-bit ones; rounding costs a pass over the numbers, so that only wide matrices gain.
Weights, moments and sums of gradients stay in float32, and attention, norms and the head are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Sides of the matrices are multiples of this."""
_now = False


@contextmanager
def float8_products(wanted: bool) -> Iterator[None]:
    """Inside the block the layers' matrices are multiplied in float8."""
    global _now
    before, _now = _now, wanted
    try:
        yield
    finally:
        _now = before


def as_now(function: Any) -> Any:
    """The function, with products as they are computed now, whenever it is called."""
    if not _now or torch.compiler.is_compiling():
        return function
    return functools.partial(_with_float8, function)


def _with_float8(function: Any, *arguments: Any) -> Any:
    with float8_products(True):
        return function(*arguments)


def applies(linear: nn.Module) -> bool:
    """Whether this projection is computed in float8 now: a plain matrix whose sides the kernels take."""
    return (
        _now
        and type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and torch.is_autocast_enabled(linear.weight.device.type)
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and linear.in_features % MULTIPLE == linear.out_features % MULTIPLE == 0
    )


def rounded(numbers: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """The numbers in float8, and what to multiply them by: the largest becomes the type's largest."""
    largest = torch.finfo(kind).max
    scale = numbers.abs().max().float().clamp_min(1e-12) / largest
    # Beyond its largest number the type has none, or NaN.
    return (numbers.float() / scale).clamp(-largest, largest).to(kind), scale


def product(first: Tensor, second: Tensor, scales: tuple[Tensor, Tensor], **options: Any) -> Tensor:
    """first [N, K] times second [K, M] of column-major layout, summed in float32."""
    # Autocast would round the scales, too.
    with torch.autocast(first.device.type, enabled=False):
        return torch._scaled_mm(first, second, scale_a=scales[0], scale_b=scales[1], **options)


def column_major(matrix: Tensor) -> Tensor:
    """The same matrix with its columns one after the other in memory, as the second factor lies."""
    return matrix.t().contiguous().t()


class Float8Products(torch.autograd.Function):
    """Several matrices applied to the same rows, which are rounded once."""

    @staticmethod
    def forward(ctx: Any, kind: torch.dtype, rows: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        small, scale = rounded(rows, FORWARD)
        found, kept = [], []
        for weight in weights:
            small_weight, weight_scale = rounded(weight, FORWARD)
            scales = scale, weight_scale
            found.append(product(small, small_weight.t(), scales, out_dtype=kind, use_fast_accum=True))
            kept += [small_weight, weight_scale]
        ctx.save_for_backward(small, scale, *kept)
        ctx.kinds = rows.dtype, [weight.dtype for weight in weights]
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        small, scale, *kept = ctx.saved_tensors
        _, wants_rows, *wanted = ctx.needs_input_grad
        kind, kinds = ctx.kinds
        to_rows, to_weights = None, []
        for index, gradient in enumerate(gradients):
            weight, weight_scale = kept[2 * index : 2 * index + 2]
            slope, slope_scale = rounded(gradient, BACKWARD)
            if wants_rows:
                scales = slope_scale, weight_scale
                part = product(slope, column_major(weight), scales, out_dtype=gradient.dtype)
                to_rows = part if to_rows is None else to_rows + part
            to_weight = None
            if wanted[index]:
                scales = slope_scale, scale
                turned = slope.t().contiguous()
                to_weight = product(turned, column_major(small), scales, out_dtype=torch.float32)
                to_weight = to_weight.to(kinds[index])
            to_weights.append(to_weight)
        return None, None if to_rows is None else to_rows.to(kind), *to_weights


def project_in_float8(rows: Tensor, *linears: nn.Module) -> tuple[Tensor, ...]:
    """The same rows [N, inputs] through several projections."""
    count = len(rows)
    if missing := -count % MULTIPLE:
        # The gradient of a weight sums over the rows.
        rows = F.pad(rows, (0, 0, 0, missing))
    kind = torch.get_autocast_dtype(rows.device.type)
    found: tuple[Tensor, ...] = Float8Products.apply(kind, rows, *(linear.weight for linear in linears))
    parts = tuple(part[:count] if missing else part for part in found)
    biases = (linear.get_parameter("bias") if linear.bias is not None else None for linear in linears)
    return tuple(
        part if bias is None else part + bias.to(part.dtype) for part, bias in zip(parts, biases, strict=True)
    )


def refusal(device: torch.device | str) -> str | None:
    """Why this device cannot multiply in float8, in a few words; None if it can."""
    place = torch.device(device)
    if place.type == "cuda" and torch.cuda.get_device_capability(place) < (8, 9):
        return f"{torch.cuda.get_device_name(place)} has no float8 (an L4, H100 or newer has)"
    one, scale = torch.ones(MULTIPLE, MULTIPLE, device=place).to(FORWARD), torch.ones((), device=place)
    try:
        product(one, one.t(), (scale, scale), out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    return None
