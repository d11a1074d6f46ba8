"""Matrices as a processor reads them fastest: in few bits and never multiplied out, or in another order.

One row times a matrix takes as long as the matrix takes to be read. torch's kernels read 8 or 4 bits of a
weight and multiply with rows in bfloat16, so that is what the rows are rounded to; sums are kept in
float32. The head, which the files keep unrounded, is rounded to 8 bits here: it is a fifth of what a small
model reads for a token.

Matrices in bfloat16 or float16 are held in float16, each row times the power of two that brings its largest
weight just below 2^15, and multiplied with rows in float32 by FBGEMM (Khudia et al. 2021). Float16 then holds
every weight of either type: one below 2^-31 of its row's largest is off by 2^-39 of that largest at most,
where float32 rounds the largest to 2^-25. So a model in float32 whose weights were published in 16 bits is
held like that too, in half the memory and time, and its numbers stay those of float32.

Other matrices in float32 are laid out in the blocks that oneDNN reads, where BLAS is MKL on an AMD processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trivium.kit.errors import TriviumError
from trivium.kit.kernels import processor
from trivium.model.quantize import GROUP, is_quantised, quantised_as, rounds_rows
from trivium.model.transformer import Layer, Transformer

MOST_8, MIDDLE_4 = 127, 8
EXPONENT_16, BITS_BEYOND_16 = 15, 0x1FFF
"""The power of two below which a row's largest weight is scaled (float16 ends at 2^16), and the bits of a
float32 that are 0 in what was a float16 or a bfloat16."""
KERNELS = ("AVX2", "AVX512")
"""The instructions that torch has these kernels for; elsewhere they are slower than what they replace."""
PROBED = 256
WHOLE_ROWS = 16
"""The kernel for 4 bits packs so many rows together."""


@dataclass(frozen=True)
class Product:
    """Rows [N, inputs] times a matrix, in the layout and the form in which a pass computes it."""

    inputs: int
    outputs: int
    form: str
    """`mm`, or `addmm` onto what is there, or with a `bias`: the matrix lies as [inputs, outputs].
    `linear`, `linear bias`: it lies as [outputs, inputs]. `onednn`, `fbgemm`: as that library reads it."""


def packs(model: Transformer) -> bool:
    """Whether all matrices of a model are quantised in a form, and of a shape, that a kernel here takes."""
    if torch.backends.cpu.get_cpu_capability() not in KERNELS or quantised_as(model) not in ("int8", "int4"):
        return False
    return all(
        type(linear) is nn.Linear
        and is_quantised(linear.weight)
        and not rounds_rows(linear.weight)
        and linear.out_features % WHOLE_ROWS == 0
        and linear.in_features % GROUP == 0
        for layer in model.layers
        if isinstance(layer, Layer)
        for linear in layer.modules()
        if isinstance(linear, nn.Linear)
    )


class PackedMatrix:
    """A quantised matrix [out, in], or several one under the other, with a bias."""

    products: Sequence[Product] = ()
    """The products whose bits may depend on the number of rows: none."""

    def __init__(
        self, weights: Sequence[Any], orders: Sequence[Tensor | None] = (), biases: Sequence[Tensor] = ()
    ) -> None:
        """`orders` are the rows of each weight in the order in which they shall stand, if in another."""
        self.bias = torch.cat(list(biases)) if biases else None
        values, scales = [], []
        for index, weight in enumerate(weights):
            order = orders[index] if orders else None
            own, scale = weight.qdata.cpu(), weight.scale.cpu().view(len(weight.qdata), -1)
            values.append(own if order is None else own[order])
            scales.append(scale if order is None else scale[order])
        # A matrix that stands alone is held once, by the model and here.
        whole = values[0] if len(values) == 1 else torch.cat(values)
        self._pack(whole, torch.cat(scales).to(torch.bfloat16))

    def _pack(self, values: Tensor, scales: Tensor) -> None:
        """Lay out values [out, in] with scales [out, groups]; a single group means 8 bits."""
        self.width = len(values)
        self.groups = scales.shape[1]
        if self.groups == 1:
            self.values, self.scales = values.contiguous(), scales.flatten()
            return
        raised = (values.to(torch.int32) + MIDDLE_4).contiguous()
        self.values = torch.ops.aten._convert_weight_to_int4pack_for_cpu(raised, 1)
        steps = scales.t().contiguous()
        # The kernel adds a number to each group's weights: none of theirs is off the middle.
        self.scales = torch.stack([steps, torch.zeros_like(steps)], -1).contiguous()

    def product(self, rows: Tensor) -> Tensor:
        """Rows [N, in] times the matrix, bias included: bfloat16, [N, out]."""
        rows = rows.to(torch.bfloat16)
        if self.groups == 1:
            found = torch.ops.aten._weight_int8pack_mm(rows, self.values, self.scales)
        else:
            found = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.values, GROUP, self.scales)
        return found if self.bias is None else found.add_(self.bias)

    def multiply(
        self, rows: Tensor, out: Tensor, cuts: Sequence[slice], added: Tensor | None = None
    ) -> Tensor:
        """Write rows [N, in] times the matrix, plus what is added, to `out`."""
        product = self.product(rows)
        return out.copy_(product) if added is None else torch.add(added, product, out=out)


class PackedBlocks(PackedMatrix):
    """A packed matrix where others are cut into blocks of columns: one block holds all of them."""

    def split(self, out: Tensor) -> tuple[Tensor, ...]:
        """Where the products go in `out`, [N, out]."""
        return (out,)

    def multiply(self, rows: Tensor, out: Any, cuts: Sequence[slice], added: Tensor | None = None) -> Tensor:
        return super().multiply(rows, out[0], cuts, added)


def holds_halves(model: Transformer) -> bool:
    """Whether all matrices are in 16 bits, in a model and on a processor that these are packed for."""
    if model.dtype not in (torch.bfloat16, torch.float16) or not has_fbgemm(model):
        return False
    return model.config.norm == "rms" and model.modalities is None


def has_fbgemm(model: Transformer) -> bool:
    """Whether FBGEMM multiplies where this model is."""
    return (
        model.device.type == "cpu"
        and torch.backends.cpu.get_cpu_capability() in KERNELS
        and "fbgemm" in torch.backends.quantized.supported_engines
    )


def scaled(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix [out, in] with each row times a power of two, for float16, and what undoes that, [out]."""
    largest = matrix.abs().amax(1)
    if largest.isinf().any():
        raise TriviumError("this model has infinite weights, which float16 cannot hold: open it in float32.")
    shift = (EXPONENT_16 - torch.frexp(largest).exponent).clamp(max=126)
    return torch.ldexp(matrix, shift[:, None]), torch.ldexp(torch.ones_like(largest), -shift)


def has_16_bits(matrix: Tensor) -> bool:
    """Whether all weights of a matrix in float32 are finite and were in bfloat16 or float16 before."""
    bits = matrix.contiguous().view(torch.int32)
    if (bits & BITS_BEYOND_16).any():
        return False
    return bool(torch.linalg.vector_norm(matrix, torch.inf).isfinite())


class HalfMatrix(PackedMatrix):
    """A matrix [out, in] in float16, or several one under the other, with a bias."""

    def __init__(
        self, weights: Sequence[Tensor], orders: Sequence[Tensor | None] = (), biases: Sequence[Tensor] = ()
    ) -> None:
        ordered = [
            one if not orders or orders[index] is None else one[orders[index]]
            for index, one in enumerate(weights)
        ]
        matrix, self.scales = scaled(torch.cat([one.detach() for one in ordered]).float())
        self.bias = torch.cat([one.detach() for one in biases]).float() if biases else None
        self.width, self.bytes = len(matrix), 2 * matrix.numel()
        self.values = torch.ops.quantized.linear_prepack_fp16(matrix, None)
        # columns are multiplied sixteen at a time, all alike: a part of a head shows what the head does
        self.products = [Product(matrix.shape[1], min(self.width, PROBED), "fbgemm")]

    def product(self, rows: Tensor) -> Tensor:
        """Rows [N, in] times the matrix, bias included: float32, [N, out]."""
        found = self._unscaled(rows).mul_(self.scales)
        return found if self.bias is None else found.add_(self.bias)

    def _unscaled(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.quantized.linear_dynamic_fp16(rows, self.values)
        return product

    def multiply(
        self, rows: Tensor, out: Tensor, cuts: Sequence[slice], added: Tensor | None = None
    ) -> Tensor:
        for cut in cuts:
            mine, here = (rows, out) if len(cuts) == 1 else (rows[cut], out[cut])
            if added is None:
                torch.mul(self._unscaled(mine), self.scales, out=here)
            else:
                plus = added if len(cuts) == 1 else added[cut]
                torch.addcmul(plus, self._unscaled(mine), self.scales, out=here)
        return out if self.bias is None else out.add_(self.bias)


class HalfBlocks(PackedBlocks, HalfMatrix):
    """Such a matrix where others are cut into blocks of columns: one block holds all of them."""


def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies in float32 faster than BLAS: MKL is made for other processors than AMD's.

    On one of Intel's oneDNN took a quarter to a half longer.
    """
    return (
        processor().startswith("AuthenticAMD")
        and torch.backends.cpu.get_cpu_capability() in KERNELS
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def reordered(weight: Tensor) -> Tensor:
    """A matrix [out, in] in float32 in the blocks that oneDNN reads."""
    blocks: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    return blocks


def reordered_product(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows [N, in] times such a matrix, [N, out]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, blocks, None, "none", [], "")
    return product


def packed_head(weight: Tensor) -> PackedBlocks:
    """A head [vocabulary, width] rounded to 8 bits, a scale for each token."""
    matrix = PackedBlocks.__new__(PackedBlocks)
    matrix.bias = None
    scales = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / MOST_8
    scales = scales.to(torch.bfloat16)
    values = torch.round(weight / scales.float()).clamp_(-MOST_8, MOST_8).to(torch.int8)
    matrix._pack(values, scales)
    return matrix
