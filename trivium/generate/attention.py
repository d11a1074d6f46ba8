"""Attention over the cache: the model's `Context` for a chunk of prompts, and for one more token each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.generate.kv_cache import BLOCK, WHOLE_BLOCKS, CacheSlot, Pool, in_blocks, reach_for
from trivium.model.attention import Scoring

NEVER = float("-inf")


def mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, cap: float | None) -> Tensor:
    """Attention of queries [M, K, Q, D] over cached keys and values [M, K, L, D] under an additive mask."""
    if cap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / cap) * cap + mask
    weights = scores.float().softmax(-1).to(value.dtype)
    # part by part, as the fused kernel does: how one longer product is cut depends on all of its length
    parts = zip(weights.split(WHOLE_BLOCKS, -1), value.split(WHOLE_BLOCKS, -2), strict=True)
    first, *others = (torch.matmul(*part) for part in parts)
    return sum(others, start=first)


class CacheContext:
    """What both contexts share: `attend`, as the model's modules call it, is `store`, then `read`."""

    positions: Tensor
    longest: int | Tensor
    tokens: int
    furthest: int
    """One past the highest position among the tokens."""

    @property
    def pairs(self) -> int:
        """How many scores each head computes: queries times the part of the cache that is read."""
        raise NotImplementedError

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Cache keys and values [N, K, D] and let queries [N, H, D] look at all that came before."""
        heads, key_heads, width = query.shape[1], key.shape[1], query.shape[2]
        self.store(layer, torch.stack((key, value), dim=1).flatten(1))
        grouped = query.reshape(-1, key_heads, heads // key_heads, width)
        return self.read(layer, grouped, scoring).view(-1, heads, width)

    def store(self, layer: int, key_value: Tensor) -> None:
        """Cache [N, 2 * K * D]: each token's keys, then its values."""
        raise NotImplementedError

    def read(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """What queries [N, K, G, D] see: [N, K * G * D]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Piece:
    """The next tokens of one row's prompt, which begin at cache place `start`; `count` is whole blocks."""

    slot: CacheSlot
    start: int
    count: int


@dataclass(frozen=True)
class Run:
    """Pieces of neighbouring rows that have the same shape and are attended in one call."""

    pool: Pool
    slot: int
    rows: int
    start: int
    count: int
    offset: int


class PrefillContext(CacheContext):
    """A chunk of prompts: each piece sees its own row's cache and itself."""

    def __init__(
        self, pieces: Sequence[Piece], reserved: Tensor | int, last_position: int, *, together: bool = True
    ) -> None:
        """Pieces in batch order; positions past a learned table (padding only) are held at its end.

        Unless `together`, each block of each row is attended to in a call of its own, whose shape depends on
        where the block lies in its text and on nothing else.
        """
        self.runs: list[Run] = []
        self._together = together
        offset, places = 0, []
        for piece in pieces:
            pool = piece.slot.pool
            assert pool is not None
            places.append(torch.arange(piece.start, piece.start + piece.count))
            last = self.runs[-1] if self.runs else None
            if (
                last is not None
                and (last.pool, last.start, last.count) == (pool, piece.start, piece.count)
                and piece.slot.slot == last.slot + last.rows
            ):
                self.runs[-1] = Run(pool, last.slot, last.rows + 1, last.start, last.count, last.offset)
            else:
                self.runs.append(Run(pool, piece.slot.slot, 1, piece.start, piece.count, offset))
            offset += piece.count
        device = self.runs[0].pool.shape.device
        self.positions = torch.cat(places).clamp(max=last_position).to(device)
        self.longest, self.tokens = reserved, offset
        self.furthest = max(run.start + run.count for run in self.runs)
        self._masks: dict[tuple[int, int, int, int | None], Tensor] = {}
        self._calls = self.runs if together else [block for run in self.runs for block in _blocks(run)]

    def _reach(self, run: Run) -> int:
        end = run.start + run.count
        return min(reach_for(end) if self._together else in_blocks(end), run.pool.capacity)

    @property
    def pairs(self) -> int:
        return sum(run.rows * run.count * self._reach(run) for run in self._calls)

    def _mask(self, run: Run, group: int, window: int | None) -> Tensor:
        key = (run.start, run.count, group, window)
        if key not in self._masks:
            end = run.start + run.count
            reach = self._reach(run)
            distance = torch.arange(run.start, end)[:, None] - torch.arange(reach)[None, :]
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            shape = run.pool.shape
            mask = torch.zeros(run.count, reach, dtype=shape.dtype).masked_fill_(hidden, NEVER)
            self._masks[key] = mask.repeat(group, 1).to(shape.device)
        return self._masks[key]

    def store(self, layer: int, key_value: Tensor) -> None:
        for run in self.runs:
            rows = run.pool.storage[layer, run.slot : run.slot + run.rows, run.start : run.start + run.count]
            part = key_value[run.offset : run.offset + run.rows * run.count]
            rows.copy_(part.view(rows.shape))

    def read(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        _, heads, group, width = query.shape
        outputs = []
        for run in self._calls:
            mask = self._mask(run, group, scoring.window)
            cached = run.pool.storage[layer, run.slot : run.slot + run.rows, : mask.shape[1]]
            keys, values = (part.transpose(1, 2) for part in cached.unbind(2))
            part = query[run.offset : run.offset + run.rows * run.count]
            part = part.view(run.rows, run.count, heads, group, width)
            # the query heads that share a key head lie along the query dimension
            part = part.permute(0, 2, 3, 1, 4).reshape(run.rows, heads, group * run.count, width)
            out = mix(part, keys, values, mask, scoring.scale, scoring.soft_cap)
            out = out.reshape(run.rows, heads, group, run.count, width).permute(0, 3, 1, 2, 4)
            outputs.append(out.reshape(run.rows * run.count, heads * group * width))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _blocks(run: Run) -> list[Run]:
    """The blocks of a run's rows, one by one."""
    return [
        Run(run.pool, run.slot + row, 1, run.start + start, BLOCK, run.offset + row * run.count + start)
        for row in range(run.rows)
        for start in range(0, run.count, BLOCK)
    ]


@dataclass
class PoolRows:
    """The rows of one pool that decode: a slice of the batch and a slice of the pool."""

    pool: Pool
    start: int
    end: int
    lengths: list[int]
    """How long each row was when the context was made."""
    longest: int
    reach: int
    cached: list[tuple[Tensor, Tensor]]
    masks: dict[int | None, Tensor]
    """Per window an additive mask over the whole capacity, led by as many columns as the window is wide."""
    seen: dict[int | None, Tensor]
    """The part of each mask that attention reads now, [rows, 1, 1, reach]."""


class DecodeContext(CacheContext):
    """One more token for every row that decodes; kept from step to step while the set of rows is the same."""

    def __init__(
        self,
        pools: Sequence[Pool],
        windows: Sequence[int | None],
        reserved: Tensor | int,
        *,
        lone: bool,
        together: bool = True,
    ) -> None:
        """`lone` says that each head of the cache has one query and not several.

        Unless `together`, each row is attended to in a call of its own, as far as it is long.
        """
        pools = [pool for pool in pools if pool.decoding]
        device = pools[0].shape.device
        lengths = [slot.length for pool in pools for slot in pool.slots[: pool.decoding]]
        self.tokens, self.longest, self._lone = len(lengths), reserved, lone
        self._together, self._steps = together, 0
        self._windows = list(dict.fromkeys(windows))
        # what grows by one with every token lies in one tensor: positions, places, a mark for each window
        self._growing = torch.zeros(2 + len(self._windows), self.tokens, dtype=torch.long, device=device)
        self.positions, self._places, *marks = self._growing.unbind(0)
        self._marks = dict(zip(self._windows, marks, strict=True))
        self.positions.copy_(torch.tensor(lengths))
        self.furthest = max(lengths) + 1
        self._slices: list[PoolRows] = []
        start = 0
        for pool in pools:
            part = lengths[start : start + pool.decoding]
            self._slices.append(PoolRows(pool, start, start + len(part), part, max(part) + 1, 0, [], {}, {}))
            start += len(part)
        for pool_rows in self._slices:
            self._mark(pool_rows)
        self._flat = [pool_rows.pool.storage.flatten(1, 2).flatten(2).unbind(0) for pool_rows in self._slices]
        self.stored = 0
        for pool_rows in self._slices:
            self._extend(pool_rows)

    def _mark(self, pool_rows: PoolRows) -> None:
        """Where in the pool's flat storage the next keys and values go, and where in each mask."""
        device, now = self.positions.device, self.positions[pool_rows.start : pool_rows.end, None]
        lines = torch.arange(pool_rows.end - pool_rows.start, device=device)
        places = torch.arange(pool_rows.pool.capacity, device=device)
        self._places[pool_rows.start : pool_rows.end] = lines * pool_rows.pool.capacity + now[:, 0]
        for window in self._windows:
            lead = window or 0
            hidden = places > now
            if window is not None:
                hidden |= places <= now - window
            shape = pool_rows.pool.shape
            wide = torch.zeros(
                pool_rows.end - pool_rows.start,
                lead + pool_rows.pool.capacity,
                dtype=shape.dtype,
                device=shape.device,
            )
            # the columns ahead of the first place let the trailing edge be marked before it has entered
            wide[:, lead:].masked_fill_(hidden, NEVER)
            pool_rows.masks[window] = wide
            self._marks[window][pool_rows.start : pool_rows.end] = lines * wide.shape[1] + now[:, 0]

    def _extend(self, pool_rows: PoolRows) -> None:
        pool_rows.reach = min(reach_for(pool_rows.longest, lone=self._lone), pool_rows.pool.capacity)
        rows = (
            pool_rows.pool.storage[:, : pool_rows.end - pool_rows.start, : pool_rows.reach]
            .transpose(2, 4)
            .unbind(0)
        )
        pool_rows.cached = [(layer[:, :, 0], layer[:, :, 1]) for layer in rows]
        for window, mask in pool_rows.masks.items():
            pool_rows.seen[window] = mask[:, None, None, (window or 0) : (window or 0) + pool_rows.reach]

    def advance(self) -> None:
        """Move to the next token; every row's length has grown by pool_rows."""
        self._growing += 1
        self._steps += 1
        self.furthest += 1
        for pool_rows in self._slices:
            pool_rows.longest += 1
            for window, marks in self._marks.items():
                wide, mark = pool_rows.masks[window].view(-1), marks[pool_rows.start : pool_rows.end]
                if window is None:
                    wide.index_fill_(0, mark, 0.0)
                else:
                    wide.index_fill_(0, mark, NEVER)
                    wide.index_fill_(0, mark + window, 0.0)
            if pool_rows.longest > pool_rows.reach:
                self._extend(pool_rows)

    def synchronise_lengths(self) -> None:
        """Write the sequences' lengths back, before any of them moves; the context is then invalid."""
        for pool_rows in self._slices:
            for slot in pool_rows.pool.slots[: pool_rows.pool.decoding]:
                slot.length += self.stored

    @property
    def pairs(self) -> int:
        return sum((pool_rows.end - pool_rows.start) * pool_rows.reach for pool_rows in self._slices)

    def store(self, layer: int, key_value: Tensor) -> None:
        if len(self._slices) == 1 and key_value.shape[0] == self.tokens:
            self._flat[0][layer].index_copy_(0, self._places, key_value)
            return
        for pool_rows, flat in zip(self._slices, self._flat, strict=True):
            flat[layer].index_copy_(
                0, self._places[pool_rows.start : pool_rows.end], key_value[pool_rows.start : pool_rows.end]
            )

    def read(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        outputs = []
        for pool_rows in self._slices:
            keys, values = pool_rows.cached[layer]
            part = (
                query
                if query.shape[0] == pool_rows.end - pool_rows.start
                else query[pool_rows.start : pool_rows.end]
            )
            mask = pool_rows.seen[scoring.window]
            if self._together:
                out = mix(part, keys, values, mask, scoring.scale, scoring.soft_cap)
                outputs.append(out.reshape(pool_rows.end - pool_rows.start, -1))
                continue
            for row, length in enumerate(pool_rows.lengths):
                here, reach = slice(row, row + 1), min(in_blocks(length + self._steps + 1), pool_rows.reach)
                texts = (keys[here, :, :reach], values[here, :, :reach], mask[here, ..., :reach])
                outputs.append(mix(part[here], *texts, scoring.scale, scoring.soft_cap).reshape(1, -1))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
