"""The weights the engine multiplies with: a copy in its type, fused, folded and transposed matrices."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trivium.generate.packed import (
    HalfBlocks,
    HalfMatrix,
    PackedBlocks,
    PackedMatrix,
    Product,
    has_16_bits,
    has_fbgemm,
    holds_halves,
    onednn_is_faster,
    packs,
    reordered,
    reordered_product,
)
from trivium.kit.errors import TriviumError
from trivium.kit.machine import compute_dtype
from trivium.model.initialise import build
from trivium.model.layers import Inner, RMSNorm
from trivium.model.lora import AdaptedLinear, selection_of, whole
from trivium.model.masks import is_masked
from trivium.model.positions import Rotary
from trivium.model.quantize import is_quantised, rounds_rows
from trivium.model.transformer import Layer, Transformer

Versions = list[tuple[int, int] | str | None]


def engine_dtype(model: Transformer) -> torch.dtype:
    """The type the engine computes in by default: float32 weights are rounded where that is faster."""
    best = compute_dtype(str(model.device))
    return best if model.dtype == torch.float32 and can_be_copied(model) else model.dtype


def can_be_copied(model: Transformer) -> bool:
    """Whether a plain model can stand for this one: one adapter at most, and nothing that rounds rows."""
    selection = selection_of(model)
    if selection is not None and selection.names != [selection.active]:
        return False
    return all(
        type(module) in (nn.Linear, AdaptedLinear)
        and not (is_quantised(module.weight) and rounds_rows(module.weight))
        and not module._forward_pre_hooks
        and not module._forward_hooks
        for module in model.modules()
        if isinstance(module, nn.Linear)
    )


def versions(model: Transformer) -> Versions:
    """What changes whenever an optimiser steps; writes through `.data` leave no trace."""
    weights = [one for one in model.parameters() if not is_quantised(one)]
    selection = selection_of(model)
    seen = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]
    return [*seen, None if selection is None else selection.active]


def cache_dtype(model: Transformer, dtype: torch.dtype) -> torch.dtype:
    """The type of keys and values that an engine of this type caches: a fused pass computes in float32."""
    return torch.float32 if dtype == model.dtype and covers(model) else dtype


class EngineWeights:
    """A model in the type the engine computes in: the model itself, or a plain copy that follows it."""

    def __init__(self, source: Transformer, dtype: torch.dtype | None = None) -> None:
        self.source = source
        self.dtype = dtype or engine_dtype(source)
        self.copied = self.dtype != source.dtype
        self.model = source
        if self.copied:
            if not can_be_copied(source):
                raise TriviumError(
                    f"an engine cannot compute in {str(self.dtype).removeprefix('torch.')} with this model, "
                    "which holds several adapters or rounds what it multiplies; load it in that type."
                )
            self.model = build(source.config, dtype=self.dtype, device=str(source.device)).eval()
            self.model.modalities = copy.deepcopy(source.modalities)
            if self.model.modalities is not None:
                self.model.modalities.to(dtype=self.dtype)
            self.model.requires_grad_(False)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the weights as they are now."""
        if not self.copied:
            return
        self.seen = versions(self.source)
        for name, target in self.model.named_parameters():
            path, _, leaf = name.rpartition(".")
            target.copy_(_value(self.source.get_submodule(path), leaf))

    def refresh_if_changed(self) -> None:
        """Take over the weights if an optimiser has stepped since."""
        if self.copied and versions(self.source) != self.seen:
            self.refresh()


def _value(module: nn.Module, leaf: str) -> Tensor:
    """A weight of the model as a plain model would hold it."""
    if leaf == "weight" and isinstance(module, nn.Linear):
        return matrix_of(module)
    value: Tensor = getattr(module, leaf)
    return value.detach()


WIDEST, WIDEST_REORDERED = 768, 3072
LEAST_WIDTH, LEAST_REORDERED = 256, 2**17
"""The width of a model, and the weights of a matrix, from which another library's call is repaid."""


def fixed(module: nn.Module | None) -> bool:
    """Whether a module is absent or a linear layer that one matrix can stand for."""
    if module is None:
        return True
    if type(module) not in (nn.Linear, AdaptedLinear):
        return False
    assert isinstance(module, nn.Linear)
    plain = type(module.weight) is nn.Parameter or (
        is_quantised(module.weight) and not rounds_rows(module.weight)
    )
    return plain and not module._forward_pre_hooks and not module._forward_hooks


def covers(model: Transformer) -> bool:
    """Whether a fused pass can stand for this model."""
    if not holds_halves(model) and (model.dtype != torch.float32 or model.device.type != "cpu"):
        return False
    config, selection = model.config, selection_of(model)
    if (config.residual_scale, config.logit_divisor) != (1.0, 1.0) or is_masked(model):
        return False
    if config.query_key_norm != "none" and config.norm != "rms":
        return False
    # rows under different adapters need different matrices; a lone adapter is part of its layer's
    if selection is not None and selection.names != [selection.active]:
        return False
    for layer in model.layers:
        assert isinstance(layer, Layer)
        attention, inner = layer.attention, layer.mlp
        if type(inner) is not Inner:
            return False
        parts = (attention.query, attention.key, attention.value, attention.output)
        if not all(fixed(part) for part in (*parts, inner.gate, inner.up, inner.down)):
            return False
    return fixed(model.head)


def matrix_of(linear: nn.Linear) -> Tensor:
    """The one matrix that does what a layer does: its adapter added, its whole numbers multiplied out."""
    if isinstance(linear, AdaptedLinear) and linear.original is None:
        return linear.merged(linear.selection.active)
    return whole(linear.weight)


def layouts(model: Transformer) -> list[str]:
    """How this model's matrices may be held here, the fastest way first: `integers`, or a library's name."""
    if packs(model):
        return ["integers"]
    if model.dtype != torch.float32:
        return ["fbgemm"]
    others = ["onednn", "blas"] if onednn_is_faster() else ["blas"]
    return ["fbgemm", *others] if _was_in_16_bits(model) else others


def _was_in_16_bits(model: Transformer) -> bool:
    """Whether 16 bits hold all matrices of a model in float32, of a size that repays it."""
    if model.config.width < LEAST_WIDTH or not has_fbgemm(model):
        return False
    linears = [one for layer in model.layers for one in layer.modules() if isinstance(one, nn.Linear)]
    # One matrix after the other: of a model trained in float32 the first already says no.
    return all(has_16_bits(matrix_of(one)) for one in linears) and has_16_bits(model.head_weight.detach())


class Matrix:
    """A matrix [in, out] of a fused pass: the one place where the kernel of a product is chosen."""

    def __init__(self, weight: Tensor, layout: str = "blas") -> None:
        self.inputs, self.outputs = weight.shape
        self.reordered = layout == "onednn" and weight.numel() >= LEAST_REORDERED
        self.weight = reordered(weight.t()) if self.reordered else weight.contiguous()

    def multiply(
        self, rows: Tensor, out: Tensor, cuts: Sequence[slice], added: Tensor | None = None
    ) -> Tensor:
        """Write rows [N, in] times the matrix, plus what is added, to `out`, some rows at a time."""
        for cut in cuts:
            mine, here = (rows, out) if len(cuts) == 1 else (rows[cut], out[cut])
            plus = added if added is None or added.dim() == 1 or len(cuts) == 1 else added[cut]
            if self.reordered:
                product = reordered_product(mine, self.weight)
                here.copy_(product) if plus is None else torch.add(plus, product, out=here)
            elif plus is None:
                torch.mm(mine, self.weight, out=here)
            else:
                torch.addmm(plus, mine, self.weight, out=here)
        return out

    def product(self, form: str) -> Product:
        """What `multiply` computes, for the probe of this machine's kernels."""
        return Product(self.inputs, self.outputs, "onednn" if self.reordered else form)


class Blocks:
    """A matrix [in, out] and its bias in blocks of columns.

    A wide matrix's rows lie pages apart: blocks of columns are read in order, in a tenth less time.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] = (),
        widest: int = WIDEST,
        layout: str = "blas",
    ) -> None:
        weight = torch.cat(list(weights)).t()
        count = -(-weight.shape[1] // widest)
        self.columns = -(-weight.shape[1] // (16 * count)) * 16
        self.width = weight.shape[1]
        self.blocks = [Matrix(block, layout) for block in weight.split(self.columns, 1)]
        self.biases: list[Tensor] = []
        if biases:
            self.biases = list(torch.cat(list(biases)).split(self.columns))

    def split(self, out: Tensor) -> tuple[Tensor, ...]:
        """Where each block's products go in `out`, [N, out]."""
        return out.split(self.columns, 1)

    def multiply(self, rows: Tensor, parts: Sequence[Tensor], cuts: Sequence[slice]) -> None:
        """Write the products of rows [N, in], cut into some at a time, into the parts of an output."""
        biases: Sequence[Tensor | None] = self.biases or [None] * len(self.blocks)
        for bias, block, part in zip(biases, self.blocks, parts, strict=True):
            block.multiply(rows, part, cuts, bias)

    @property
    def products(self) -> list[Product]:
        """What `multiply` computes."""
        return [block.product("bias" if self.biases else "mm") for block in self.blocks]


class Scale:
    """A norm of a fused pass: RMS norms divide only, since their scale lies in the next matrix."""

    def __init__(self, norm: nn.Module, width: int) -> None:
        self.norm, self.width = norm, width
        self.rms = isinstance(norm, RMSNorm)
        if isinstance(norm, RMSNorm):
            weight = 1.0 + norm.weight.float() if norm.plus_one else norm.weight.float()
            # x / sqrt(mean(x^2) + e) = sqrt(width) * x / hypot(|x|, sqrt(width * e)): half the operations
            self.weight = weight.detach() * math.sqrt(width)
            self.least = torch.full((1,), math.sqrt(width * norm.epsilon))

    def divide(self, rows: Tensor, out: Tensor, lengths: Tensor, long: Tensor | None = None) -> Tensor:
        """The normalised rows without their scale (RMS), or entirely (layer norm).

        `long` is the rows with sqrt(width * e) as one more element: its length needs no hypot.
        """
        if not self.rms:
            return self.norm(rows)
        if long is not None:
            torch.linalg.vector_norm(long, dim=-1, keepdim=True, out=lengths)
        else:
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, out=lengths)
            torch.hypot(lengths, self.least, out=lengths)
        return torch.div(rows, lengths, out=out)

    def whole(self, rows: Tensor, out: Tensor, lengths: Tensor, long: Tensor | None = None) -> Tensor:
        """The normalised rows with their scale."""
        normal = self.divide(rows, out, lengths, long)
        return normal.mul_(self.weight) if self.rms else normal

    def fold(self, weight: Tensor) -> Tensor:
        """The next matrix [out, in] with this norm's scale in it."""
        return weight * self.weight if self.rms else weight


def _interleaved(rows: Tensor, head_width: int) -> Tensor:
    """Heads [H * D, ...] with element i of the first half beside element i of the second."""
    halves = rows.unflatten(0, (-1, 2, head_width // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _bias(module: nn.Linear) -> Tensor | None:
    return None if module.bias is None else module.bias.detach().float()


class FusedLayer:
    """One layer's matrices as a fused pass multiplies with them, in one of the `layouts` of its model."""

    def __init__(self, layer: Layer, model: Transformer, widest: int = WIDEST, layout: str = "blas") -> None:
        config, attention, inner = model.config, layer.attention, layer.mlp
        assert isinstance(inner, Inner)
        width, head_width = config.width, config.head_width
        self.index, self.scoring = attention.layer, attention.scoring
        self.rotary: Rotary | None = None
        if attention.rotates:
            self.rotary = model.local_rotary if self.scoring.window and model.local_rotary else model.rotary
        self.before = Scale(layer.attention_norm, width) if layer.attention_norm is not None else None
        self.after = (
            Scale(layer.attention_post_norm, width) if layer.attention_post_norm is not None else None
        )
        self.inner_before = Scale(layer.mlp_norm, width) if layer.mlp_norm is not None else None
        self.inner_after = Scale(layer.mlp_post_norm, width) if layer.mlp_post_norm is not None else None

        def rotated(values: Tensor) -> Tensor:
            return _interleaved(values, head_width) if attention.rotates else values

        def fold(norm: Scale | None, weight: Tensor) -> Tensor:
            return norm.fold(weight) if norm is not None else weight

        biases: list[Tensor] = []
        if attention.query.bias is not None:
            parts = (rotated(attention.query.bias), rotated(attention.key.bias), attention.value.bias)
            biases = [bias.detach() for bias in parts]
        three = (attention.query, attention.key, attention.value)
        entries = [inner.up] if inner.gate is None else [inner.gate, inner.up]
        entry_biases = [bias for one in entries if (bias := _bias(one)) is not None]
        self.packed = layout in ("integers", "fbgemm")
        self.projection: Blocks | PackedBlocks
        self.entry: Blocks | PackedBlocks
        self.output: Matrix | PackedMatrix
        self.exit: Matrix | PackedMatrix
        if self.packed:
            halves = layout == "fbgemm"
            blocks, matrix = (HalfBlocks, HalfMatrix) if halves else (PackedBlocks, PackedMatrix)
            held = matrix_of if halves else lambda linear: linear.weight
            query, key = (rotated(torch.arange(one.out_features)) for one in three[:2])
            self.projection = blocks([held(one) for one in three], (query, key, None), biases)
            self.output = matrix([held(attention.output)])
            self.entry = blocks([held(one) for one in entries], biases=entry_biases)
            self.exit = matrix([held(inner.down)])
        else:
            query, key = rotated(matrix_of(attention.query)), rotated(matrix_of(attention.key))
            projections = [fold(self.before, weight) for weight in (query, key, matrix_of(attention.value))]
            self.projection = Blocks(projections, biases, widest, layout)
            self.output = Matrix(matrix_of(attention.output).t(), layout)
            entered = [fold(self.inner_before, matrix_of(one)) for one in entries]
            self.entry = Blocks(entered, entry_biases, widest, layout)
            self.exit = Matrix(matrix_of(inner.down).t(), layout)
        self.norms = attention.norm_kind
        if self.norms != "none":
            norms = (attention.query_norm, attention.key_norm)
            counts = (config.heads, config.key_value_heads)
            span = (
                [head_width, head_width] if self.norms == "head" else [head_width * count for count in counts]
            )
            self.head_scales = [Scale(norm, size) for norm, size in zip(norms, span, strict=True)]
            repeats = counts if self.norms == "head" else (1, 1)
            scales = [one.weight.repeat(times) for one, times in zip(self.head_scales, repeats, strict=True)]
            self.head_weight = torch.cat([rotated(one) for one in scales]).view(-1, head_width)
        self.output_bias = _bias(attention.output)
        self.exit_bias = _bias(inner.down)
        self.gated, self.activation = inner.gate is not None, inner.activation

    @property
    def products(self) -> list[Product]:
        """The products of rows with matrices that the layer takes."""
        last = [(self.output, self.after), (self.exit, self.inner_after)]
        added = [
            product
            for matrix, norm in last
            for product in (
                [matrix.product("addmm" if norm is None else "mm")]
                if isinstance(matrix, Matrix)
                else matrix.products
            )
        ]
        return [*self.projection.products, *self.entry.products, *added]
