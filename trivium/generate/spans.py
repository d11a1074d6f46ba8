"""Attention over the cache for the next few tokens of every row at once, as a draft is verified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.generate.attention import NEVER, CacheContext, mix
from trivium.generate.kv_cache import CacheSlot, in_blocks, reach_for
from trivium.model.attention import Scoring


class Span:
    """Neighbouring rows of one pool and the next few tokens of each: `counts` of them, flat in this order."""

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        counts: Sequence[int],
        windows: Sequence[int | None],
        offset: int,
        *,
        lone: bool,
        together: bool,
    ) -> None:
        pool = slots[0].pool
        assert pool is not None
        self.pool, self.start, self.counts = pool, offset, counts
        self.end, self.together = offset + sum(counts), together
        self.lengths = [slot.length for slot in slots]
        self._first = slots[0].slot
        device = pool.shape.device
        self.row_of = torch.repeat_interleave(torch.arange(len(slots)), torch.tensor(counts)).to(device)
        first = torch.tensor([0, *counts[:-1]]).cumsum(0)
        within = torch.arange(sum(counts)) - first[self.row_of.cpu()]
        self.positions = torch.tensor(self.lengths, device=device)[self.row_of] + within.to(device)
        longest = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        self.reach = min(reach_for(longest, lone=lone), pool.capacity)
        self.masks = {window: self._mask(window) for window in dict.fromkeys(windows)}
        # where in the pool's flat storage each token's keys and values go
        self._places = (self.row_of + self._first) * pool.capacity + self.positions
        # many rows with few tokens each are read token by token, few rows with many row by row
        self._columns: list[Tensor] = []
        if together and len(slots) > max(counts) > 0:
            last = torch.tensor(counts) - 1
            steps = torch.arange(max(counts))[:, None]
            self._columns = list((first + torch.minimum(steps, last)).to(device))
            self._picked = (within * len(slots) + self.row_of.cpu()).to(device)

    def _mask(self, window: int | None) -> Tensor:
        """What each token sees, [tokens, 1, 1, reach]."""
        distance = self.positions[:, None] - torch.arange(self.reach, device=self.positions.device)
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        mask = torch.zeros(hidden.shape, dtype=self.pool.shape.dtype, device=self.positions.device)
        return mask.masked_fill_(hidden, NEVER)[:, None, None]

    def store(self, layer: int, key_value: Tensor) -> None:
        """Cache the keys and values of the span's tokens, [tokens, 2 * K * D]."""
        flat = self.pool.storage[layer].flatten(0, 1).flatten(1)
        flat.index_copy_(0, self._places, key_value)

    def read(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        """What queries [tokens, K, G, D] see: [tokens, K * G * D]."""
        rows = slice(self._first, self._first + len(self.counts))
        cached = self.pool.storage[layer, rows, : self.reach].transpose(1, 3)
        keys, values, mask = cached[:, :, 0], cached[:, :, 1], self.masks[scoring.window]
        if self._columns:
            seen = [
                mix(
                    query.index_select(0, column), keys, values, mask.index_select(0, column),
                    scoring.scale, scoring.soft_cap,
                )
                for column in self._columns
            ]  # fmt: skip
            return torch.cat(seen).flatten(1).index_select(0, self._picked)
        outputs, offset = [], 0
        for row, count in enumerate(self.counts):
            here = slice(offset, offset + count)
            texts = [part[row].expand(count, -1, -1, -1) for part in (keys, values)]
            if self.together:
                outputs.append(
                    mix(query[here], texts[0], texts[1], mask[here], scoring.scale, scoring.soft_cap)
                )
            else:
                outputs += self._apart(row, query[here], texts, mask[here], scoring)
            offset += count
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)

    def _apart(
        self, row: int, query: Tensor, texts: list[Tensor], mask: Tensor, scoring: Scoring
    ) -> list[Tensor]:
        """Each of a row's tokens in a call of its own, as far as the text before it is long."""
        outputs = []
        for token in range(len(query)):
            here, reach = slice(token, token + 1), min(in_blocks(self.lengths[row] + token + 1), self.reach)
            keys, values = (part[here, :, :reach] for part in texts)
            outputs.append(
                mix(query[here], keys, values, mask[here, ..., :reach], scoring.scale, scoring.soft_cap)
            )
        return outputs


class SpanContext(CacheContext):
    """The next few tokens of some rows; rows may have unlike numbers of them.

    Every token is a lone query under a mask of its own, in a call of the kernel that has the shape of a
    decode step's, so the same bits come out. Nothing here changes a row's length: what is stored past it
    counts only once the tokens are accepted.
    """

    def __init__(
        self,
        slots: Sequence[CacheSlot],
        counts: Sequence[int],
        windows: Sequence[int | None],
        reserved: Tensor | int,
        *,
        lone: bool,
        together: bool = True,
    ) -> None:
        """`counts` tokens of each row follow those it has cached; the rest is as for decode steps."""
        self.tokens, self.longest = sum(counts), reserved
        self._spans: list[Span] = []
        begin, offset = 0, 0
        for end in range(1, len(slots) + 1):
            if end < len(slots) and _neighbours(slots[end - 1], slots[end]):
                continue
            part = counts[begin:end]
            self._spans.append(Span(slots[begin:end], part, windows, offset, lone=lone, together=together))
            begin, offset = end, offset + sum(part)
        self.positions = torch.cat([span.positions for span in self._spans])
        self.furthest = max(slot.length + count for slot, count in zip(slots, counts, strict=True))

    @property
    def pairs(self) -> int:
        return sum((span.end - span.start) * span.reach for span in self._spans)

    def store(self, layer: int, key_value: Tensor) -> None:
        for span in self._spans:
            span.store(layer, key_value[span.start : span.end])

    def read(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        outputs = [span.read(layer, query[span.start : span.end], scoring) for span in self._spans]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _neighbours(one: CacheSlot, other: CacheSlot) -> bool:
    return one.pool is other.pool and other.slot == one.slot + 1
