"""A faster way to run the same model: layers fused and buffers laid out once, derived from the modules.

`FusedForward` computes what `Transformer.forward` computes (a test holds the two together) in float32 on a
CPU, where much of a step of one row is spent on dispatching small operations. It differs in form only:

- the projections of one input are one matrix, stored transposed; products are computed for numbers of rows
  that were found to give every row the same bits (`exactness`), so a row's numbers do not depend on the
  other rows. A pass of fewer rows is padded, unless the engine has only one;
- a norm's scale is multiplied into the matrix that follows it;
- heads are stored with their two halves interleaved, so that rotating them is one complex multiplication.

A lone adapter and the values of rounded matrices are multiplied out once; what a plan does not cover
(experts, several adapters, rounded rows, GPUs) runs through the modules themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.generate.attention import CacheContext
from trivium.generate.exactness import BIT_EXACT, CLOSE, Exactness, InVerifiedSizes, of_model, of_modules
from trivium.generate.matrices import (
    WIDEST,
    WIDEST_REORDERED,
    Blocks,
    FusedLayer,
    Matrix,
    Scale,
    covers,
    layouts,
    versions,
)
from trivium.generate.packed import HalfBlocks, PackedBlocks, PackedMatrix, packed_head
from trivium.generate.stacked import StackedModel, gains
from trivium.kit.errors import TriviumError
from trivium.model.arithmetic import note_pass, note_product
from trivium.model.compiling import compiled
from trivium.model.lora import selection_of
from trivium.model.positions import Rotary
from trivium.model.quantize import rounds_rows
from trivium.model.transformer import Layer, Transformer


class ForwardPass(Protocol):
    """What the engine needs of a model."""

    exactness: Exactness
    """What was found of the numbers that these passes compute on this machine."""
    hidden: Tensor
    """The states behind the scores of the last `decode`, [N, width]; the next pass may overwrite them."""

    def forward(self, tokens: Tensor, context: CacheContext) -> Tensor:
        """Hidden states after the last norm, [N, width]."""

    def prefill(self, tokens: Tensor, context: CacheContext) -> None:
        """Cache the tokens' keys and values and compute no more than that takes."""

    def decode(self, tokens: Tensor, context: CacheContext) -> Tensor:
        """Scores over the vocabulary after each token, [N, V]."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary of hidden states."""

    def rotate_keys(self, keys: Tensor, layer: int, places: int) -> Tensor:
        """Cached keys of one layer, rotated as if they stood further back."""

    def refresh(self) -> None:
        """Take over the weights as they are now."""

    def refresh_if_changed(self) -> None:
        """Take over the weights if an optimiser has stepped since."""


class ModuleForward:
    """The model as it is, or its layers compiled for steps of constant shape."""

    def __init__(self, model: Transformer, *, compiles: bool = False) -> None:
        self.model = model
        self._stacked = StackedModel(model) if gains(model.device) else None
        self._compiles = compiles
        self._compiled: Transformer | None = None
        self.exactness = of_model(model, of_modules(model))
        rounds = any(isinstance(one, nn.Linear) and rounds_rows(one.weight) for one in model.modules())
        if self.exactness.promise == BIT_EXACT and (model.config.experts is not None or rounds):
            # the sum over a token's experts, and products of rows in whole numbers, are not probed
            self.exactness = replace(self.exactness, promise=CLOSE)
        if compiles and self.exactness.promise == BIT_EXACT:
            # what a compiler makes of them is not probed
            self.exactness = Exactness()

    @property
    def _fast(self) -> Transformer:
        return self.model if self._stacked is None else self._stacked.model

    def _in_sizes(self) -> AbstractContextManager:
        rows = self.exactness.rows
        return InVerifiedSizes(rows) if rows.sizes else nullcontext()

    def forward(self, tokens: Tensor, context: CacheContext) -> Tensor:
        with self._in_sizes():
            return self._fast(tokens, context)

    def prefill(self, tokens: Tensor, context: CacheContext) -> None:
        self.forward(tokens, context)

    def decode(self, tokens: Tensor, context: CacheContext) -> Tensor:
        if self._compiles:
            if self._compiled is None:
                self._compiled = compiled(self._fast)
            self.hidden = self._compiled(tokens, context)
        else:
            self.hidden = self.forward(tokens, context)
        return self.logits(self.hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        with self._in_sizes():
            return self.model.logits(hidden)

    def rotate_keys(self, keys: Tensor, layer: int, places: int) -> Tensor:
        raise TriviumError("this model's positions cannot slide: choose another way to fit the conversation.")

    def refresh(self) -> None:
        """Nothing is copied, so nothing is stale but what has moved."""
        before = self._fast
        if self._stacked is not None:
            self._stacked.follow()
        if self._fast is not before:
            self._compiled = None

    def refresh_if_changed(self) -> None:
        self.refresh()


@dataclass
class Buffers:
    """Everything a pass over N tokens writes to, with the views it needs, made once per N."""

    stream: Tensor
    long: Tensor | None
    """The stream with the element that a norm adds under the root, where all norms add the same."""
    rows: Tensor
    lengths: Tensor
    projected: Tensor
    projected_parts: tuple[Tensor, ...]
    rotating: Tensor
    queries_keys: Tensor
    query: Tensor
    query_flat: Tensor
    key_flat: Tensor
    key_value: Tensor
    head_lengths: Tensor
    mixed: Tensor
    entered_parts: tuple[Tensor, ...]
    gate: Tensor
    inner: Tensor
    up: Tensor
    tokens: Tensor
    positions: Tensor
    rotations: Tensor
    cuts: list[slice]
    """The rows of each product."""
    logits: Tensor | None = None
    logits_parts: tuple[Tensor, ...] = ()


class FusedForward:
    """A model's forward pass for generation."""

    def __init__(self, model: Transformer, *, alone: bool = False) -> None:
        """With `alone` a single row is computed as one: faster, not bit for bit as among others."""
        assert covers(model)
        self.model, self.alone = model, alone
        self._selection = selection_of(model)
        self._rows = 0
        self._rotation: dict[int, Tensor | None] = {id(None): None}
        self._storage: dict[str, Tensor] = {}
        self._buffers: dict[int, Buffers] = {}
        self._tables: dict[int, Tensor] = {}
        self.layout = ""
        self.refresh()
        self._logits = torch.empty(0, self.head.width)

    def refresh(self) -> None:
        with torch.inference_mode():
            self._seen = versions(self.model)
            self._tables.clear()
            for layout in layouts(self.model):
                self._hold(layout)
                products = [product for layer in self.layers for product in layer.products]
                self.exactness = of_model(self.model, [*products, *self.head.products], torch.float32)
                if self.exactness.promise == BIT_EXACT:
                    break
            if layout != self.layout:
                # their views follow the blocks of the matrices, and their cuts what is bit-exact
                self.layout = layout
                self._buffers.clear()

    def _hold(self, layout: str) -> None:
        """Lay the weights out in one of the model's `layouts`."""
        if layout == "onednn":
            widest = WIDEST_REORDERED
        else:
            # one row reads each matrix once, in order, however wide it is
            widest = sys.maxsize if self.alone else WIDEST
        with torch.inference_mode():
            self.layers = [
                FusedLayer(layer, self.model, widest, layout)
                for layer in self.model.layers
                if isinstance(layer, Layer)
            ]
            self.last = Scale(self.model.norm, self.model.config.width)
            norms = [
                self.last,
                *(one.before for one in self.layers),
                *(one.inner_before for one in self.layers),
            ]
            leasts = {float(one.least) if one.rms else None for one in norms if one is not None}
            # rows that do not lie end to end are divided more slowly, unless there is only one
            self.least = leasts.pop() if self.alone and len(leasts) == 1 else None
            head = self.model.head_weight.detach()
            if layout == "fbgemm":
                self.head: HalfBlocks | PackedBlocks | Blocks = HalfBlocks([head])
            elif layout == "integers":
                self.head = packed_head(head)
            else:
                self.head = Blocks([head], widest=widest, layout=layout)
            self.rotaries = list({id(one.rotary): one.rotary for one in self.layers if one.rotary}.values())

    def refresh_if_changed(self) -> None:
        """Take over the weights if an optimiser has stepped since; writes through `.data` need `refresh`."""
        if versions(self.model) != self._seen:
            self.refresh()

    def _room(self, count: int) -> Buffers:
        """The buffers of a pass over `count` tokens: the first rows of storage that all passes share."""
        if count > self._rows:
            self._rows = count
            self._storage.clear()
            self._buffers.clear()
        if count not in self._buffers:
            self._buffers[count] = self._lay_out(count)
        return self._buffers[count]

    def _logits_of(self, room: Buffers) -> Tensor:
        """Where a pass writes its scores: the first rows of one storage, as many as decode at once."""
        count = len(room.stream)
        if count > len(self._logits):
            self._logits = torch.zeros(count, self.head.width)
            for other in self._buffers.values():
                other.logits = None
        if room.logits is None:
            room.logits = self._logits[:count]
            room.logits_parts = self.head.split(room.logits)
        return room.logits

    def _space(self, name: str, count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if name not in self._storage:
            self._storage[name] = torch.zeros(self._rows, width, dtype=dtype)
        return self._storage[name][:count]

    def _lay_out(self, count: int) -> Buffers:
        config = self.model.config
        heads, key_heads, head_width = config.heads, config.key_value_heads, config.head_width
        rotating = heads + key_heads
        projected = self._space("projected", count, (rotating + key_heads) * head_width)
        queries_keys = projected[:, : rotating * head_width]
        entered = self._space("entered", count, (2 if config.gated else 1) * config.inner_width)
        halves = queries_keys.view(count, rotating, -1, 2) if config.positions == "rope" else None
        query = projected[:, : heads * head_width]
        long = None
        stream = self._space("stream", count, config.width + (0 if self.least is None else 16))
        if self.least is not None:
            long, stream = stream, stream[:, : config.width]
            long[:, config.width] = self.least
        return Buffers(
            stream=stream,
            long=long,
            rows=self._space("rows", count, config.width),
            lengths=self._space("lengths", count, 1),
            projected=projected,
            projected_parts=self.layers[0].projection.split(projected),
            rotating=torch.view_as_complex(halves) if halves is not None else queries_keys,
            queries_keys=queries_keys.view(count, rotating, head_width),
            query=query.view(count, key_heads, heads // key_heads, head_width),
            query_flat=query,
            key_flat=projected[:, heads * head_width : rotating * head_width],
            key_value=projected[:, heads * head_width :],
            head_lengths=self._space("head_lengths", count, rotating).unsqueeze(-1),
            mixed=self._space("mixed", count, heads * head_width),
            entered_parts=self.layers[0].entry.split(entered),
            gate=entered[:, : config.inner_width],
            up=entered[:, -config.inner_width :],
            inner=self._space("inner", count, config.inner_width),
            tokens=torch.zeros(count, dtype=torch.long),
            positions=torch.zeros(count, dtype=torch.long),
            rotations=self._space("rotations", count, head_width // 2, torch.complex64),
            cuts=self.exactness.rows.cuts(count),
        )

    def _rotations(
        self, rotary: Rotary, context: CacheContext, positions: Tensor, out: Tensor | None
    ) -> Tensor:
        """Complex numbers of length `factor` by which each token's pairs are rotated, [N, 1, D / 2]."""
        if rotary.grows:
            longest = context.longest
            if isinstance(longest, Tensor) and len(longest) < len(positions):
                longest = F.pad(longest, (0, len(positions) - len(longest)), value=1)
            angles = rotary.angles(positions, longest)
            return torch.polar(torch.full_like(angles, rotary.factor), angles)[:, None]
        table = self._tables.get(id(rotary))
        if table is None or table.shape[0] < context.furthest:
            size = max(2 * context.furthest, 256)
            angles = rotary.angles(torch.arange(size), 0)
            table = self._tables[id(rotary)] = torch.polar(torch.full_like(angles, rotary.factor), angles)
        return torch.index_select(table, 0, positions, out=out)[:, None]

    def forward(self, tokens: Tensor, context: CacheContext) -> Tensor:
        """Hidden states after the last norm, [N, width]; the next call may overwrite them."""
        note_pass(self.model, self._padded(len(tokens)), context, merged=True)
        room = self._forward(tokens, context, self.layers)
        return self.last.whole(room.stream, room.rows, room.lengths, room.long)[: len(tokens)]

    def prefill(self, tokens: Tensor, context: CacheContext) -> None:
        note_pass(self.model, self._padded(len(tokens)), context, filling=True, merged=True)
        room = self._forward(tokens, context, self.layers[:-1])
        self._project(self.layers[-1], room, self._rotation[id(self.layers[-1].rotary)])
        context.store(len(self.layers) - 1, room.key_value[: len(tokens)])

    def decode(self, tokens: Tensor, context: CacheContext) -> Tensor:
        """Scores over the vocabulary after each token, [N, V]; the next call may overwrite them."""
        note_pass(self.model, self._padded(len(tokens)), context, merged=True)
        note_product(self._padded(len(tokens)), self.model.head_weight)
        room = self._forward(tokens, context, self.layers)
        hidden = self.last.whole(room.stream, room.rows, room.lengths, room.long)
        logits = self._logits_of(room)
        self.head.multiply(hidden, room.logits_parts, room.cuts)
        scores = self._capped(logits)
        count = tokens.shape[0]
        self.hidden = hidden[:count]
        return scores if scores.shape[0] == count else scores[:count]

    def _padded(self, count: int) -> int:
        """How many rows are computed for so many tokens."""
        return count if self.alone and count == 1 else self.exactness.rows.padded(count)

    def _forward(self, tokens: Tensor, context: CacheContext, layers: Sequence[FusedLayer]) -> Buffers:
        count, model, positions = tokens.shape[0], self.model, context.positions
        padded = self._padded(count)
        room = self._room(padded)
        if count < padded:
            room.tokens[:count].copy_(tokens)
            room.positions[:count].copy_(positions)
            tokens, positions = room.tokens, room.positions
        found = None if model.modalities is None else model.modalities.places(tokens)
        if found is not None:
            tokens = tokens.index_fill(0, found[0], 0)
        if model.dtype == room.stream.dtype:
            stream = torch.index_select(model.embedding.weight, 0, tokens, out=room.stream)
        else:
            stream = room.stream.copy_(torch.index_select(model.embedding.weight, 0, tokens))
        if model.config.embedding_scale != 1.0:
            stream.mul_(model.config.embedding_scale)
        if found is not None:
            stream.index_copy_(0, *found)
        if model.position_embedding is not None:
            stream.add_(model.position_embedding.weight.index_select(0, positions))
        for index, rotary in enumerate(self.rotaries):
            self._rotation[id(rotary)] = self._rotations(
                rotary, context, positions, None if index else room.rotations
            )
        for layer in layers:
            self._project(layer, room, self._rotation[id(layer.rotary)])
            self._attend(layer, room, context, count)
            self._inner(layer, room)
        return room

    def _project(self, layer: FusedLayer, room: Buffers, rotations: Tensor | None) -> None:
        """Queries, keys and values of one layer, normalised and rotated."""
        rows = self._normalised(layer, layer.before, room)
        layer.projection.multiply(rows, room.projected_parts, room.cuts)
        if layer.norms == "head":
            layer.head_scales[0].divide(room.queries_keys, room.queries_keys, room.head_lengths)
        elif layer.norms == "full":
            layer.head_scales[0].divide(room.query_flat, room.query_flat, room.lengths)
            layer.head_scales[1].divide(room.key_flat, room.key_flat, room.lengths)
        if layer.norms != "none":
            room.queries_keys.mul_(layer.head_weight)
        if rotations is not None:
            room.rotating.mul_(rotations)

    def _attend(self, layer: FusedLayer, room: Buffers, context: CacheContext, count: int) -> None:
        stream = room.stream
        context.store(layer.index, room.key_value)
        mixed = context.read(layer.index, room.query, layer.scoring)
        if mixed.shape[0] < stream.shape[0]:
            room.mixed[:count].copy_(mixed)
            mixed = room.mixed
        self._add(stream, mixed, layer.output, layer.output_bias, layer.after, room)

    def _inner(self, layer: FusedLayer, room: Buffers) -> None:
        stream = room.stream
        rows = self._normalised(layer, layer.inner_before, room)
        layer.entry.multiply(rows, room.entered_parts, room.cuts)
        gate = room.gate
        if layer.activation == "silu":
            active = F.silu(gate, inplace=True)
        else:
            active = F.gelu(gate, approximate="tanh" if layer.activation == "gelu_tanh" else "none")
        if layer.gated:
            active = torch.mul(active, room.up, out=room.inner)
        self._add(stream, active, layer.exit, layer.exit_bias, layer.inner_after, room)

    @staticmethod
    def _normalised(layer: FusedLayer, norm: Scale | None, room: Buffers) -> Tensor:
        """The stream as a sub-layer reads it: a packed matrix has no norm's scale in it, others do."""
        if norm is None:
            return room.stream
        divide = norm.whole if layer.packed else norm.divide
        return divide(room.stream, room.rows, room.lengths, room.long)

    def _add(
        self,
        stream: Tensor,
        rows: Tensor,
        weight: Matrix | PackedMatrix,
        bias: Tensor | None,
        norm: Scale | None,
        room: Buffers,
    ) -> None:
        """Add a sub-layer's result to the stream."""
        if norm is None:
            weight.multiply(rows, stream, room.cuts, stream)
            if bias is not None:
                stream.add_(bias)
            return
        result = weight.multiply(rows, room.rows, room.cuts)
        if bias is not None:
            result.add_(bias)
        stream.add_(norm.whole(result, room.rows, room.lengths))

    def logits(self, hidden: Tensor) -> Tensor:
        count = len(hidden)
        padded = self.exactness.rows.padded(count)
        note_product(padded, self.model.head_weight)
        if count < padded:
            hidden = F.pad(hidden, (0, 0, 0, padded - count))
        scores = hidden.new_empty(padded, self.head.width)
        self.head.multiply(hidden, self.head.split(scores), self.exactness.rows.cuts(padded))
        return self._capped(scores)[:count]

    def _capped(self, scores: Tensor) -> Tensor:
        cap = self.model.config.final_soft_cap
        return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)

    def rotate_keys(self, keys: Tensor, layer: int, places: int) -> Tensor:
        """Cached keys [..., D] of one layer, rotated as if they stood `places` further back."""
        rotary = self.layers[layer].rotary
        if rotary is None:
            return keys
        angles = rotary.angles(torch.tensor([places]), 0)[0]
        pairs = torch.view_as_complex(keys.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), -angles)).flatten(-2)


def forward_pass_of(model: Transformer, rows: int, *, compiles: bool = False) -> ForwardPass:
    """The fastest way to run this model that computes the same for up to this many rows at once.

    With `compiles`, layers that run through modules are compiled for steps of constant shape.
    """
    if covers(model):
        return FusedForward(model, alone=rows == 1)
    return ModuleForward(model, compiles=compiles)
