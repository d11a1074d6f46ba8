"""Documents that go on from a shared beginning: a prompt is computed once for all its answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trivium.model.attention import (
    Documents,
    Scoring,
    borders_of,
    bound,
    masked_attention,
    note_no_kernel,
    padded_length,
    share_heads,
)
from trivium.model.config import ModelConfig
from trivium.model.operations import in_product_type
from trivium.model.uncompiled import uncompiled
from trivium.model.varlen import varlen_kernel


def prompts_can_be_shared(config: ModelConfig) -> bool:
    """Whether a prompt is the same whatever follows it: not under rope that knows a text's whole length."""
    return config.rope.get("rope_type") not in ("dynamic", "longrope")


class Branches:
    """Packed rows in which a document may see the whole of an earlier one as its own beginning.

    `back[i]` says how many documents before document i its beginning lies; 0 is a document of its own.
    Not where `prompts_can_be_shared` denies it: there answers would disagree about their prompt.
    """

    def __init__(
        self, lengths: Sequence[int], back: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        assert len(lengths) == len(back)
        assert all(0 <= steps <= index for index, steps in enumerate(back))
        self.device = torch.device(device)
        sizes = torch.tensor(lengths)
        starts = sizes.cumsum(0) - sizes
        before = torch.tensor(
            [lengths[index - steps] if steps else 0 for index, steps in enumerate(back)], dtype=torch.long
        )
        offsets = torch.arange(int(sizes.sum())) - starts.repeat_interleave(sizes)
        self.positions = (offsets + before.repeat_interleave(sizes)).to(self.device)
        self.longest: int | Tensor = (sizes + before).repeat_interleave(sizes).to(self.device)
        self.alone: Documents | None = Documents(lengths, device) if not any(back) else None
        self.kernel = varlen_kernel(self.device) if self.alone is None else None
        self.groups: list[tuple[int, int, int, Tensor, Tensor, Tensor, Tensor]] = []
        self.layout = sizes, starts, before, list(back)
        if self.kernel is not None:
            self._plan_kernel()
        elif self.alone is None:
            self._plan_groups()

    def _plan_kernel(self) -> None:
        """Which keys each document reads, laid end to end: those of its beginning, then its own."""
        sizes, starts, before, back = self.layout
        parents = starts[torch.arange(len(sizes)) - torch.tensor(back)]
        totals = before + sizes
        owner = torch.arange(len(sizes)).repeat_interleave(totals)
        place = torch.arange(len(owner)) - (totals.cumsum(0) - totals)[owner]
        shared = place < before[owner]
        keys = torch.where(shared, parents[owner] + place, starts[owner] + place - before[owner])
        self.keys = keys.to(self.device)
        self.borders = borders_of(sizes, self.device), borders_of(totals, self.device)
        self.longest_bounds = bound(int(sizes.max())), bound(int(totals.max()))
        self.seen = int((sizes * totals).sum())

    def _plan_groups(self) -> None:
        """Decide once for all layers which documents are computed together, and what each token sees."""
        sizes, starts, before, back = self.layout
        together: dict[tuple[int, int], list[int]] = {}
        for index in range(len(sizes)):
            head = padded_length(int(before[index])) if back[index] else 0
            together.setdefault((head, padded_length(int(sizes[index]))), []).append(index)
        inverse = torch.empty(int(sizes.sum()), dtype=torch.long)
        row = 0
        for (head, length), members in sorted(together.items()):
            own, first = torch.arange(length)[None], starts[members][:, None]
            real = own < sizes[members][:, None]
            queries = torch.where(real, first + own, first)
            places = torch.arange(row, row + queries.numel()).view_as(queries)
            inverse[queries[real]] = places[real]
            row += queries.numel()
            parents = starts[[index - back[index] for index in members]][:, None]
            shared = torch.arange(head)[None]
            has = shared < before[members][:, None]
            keys = torch.cat((torch.where(has, parents + shared, parents), queries), 1)
            there = torch.cat((has, real), 1)
            place = torch.cat((shared.expand_as(has), own + before[members][:, None]), 1)
            asks = own + before[members][:, None]
            distance = asks[:, :, None] - place[:, None, :]
            # A padded query sees itself, so that no row of the softmax is empty.
            padded = ~real[:, :, None] & (torch.arange(head + length) == (head + own)[:, :, None])
            seen = (distance >= 0) & there[:, None, :] | padded
            self.groups.append(
                (
                    len(members),
                    length,
                    head + length,
                    queries.flatten().to(self.device),
                    keys.flatten().to(self.device),
                    seen[:, None].to(self.device),
                    distance[:, None].to(self.device),
                )
            )
        self.inverse = inverse.to(self.device)

    @property
    def pairs(self) -> int:
        """Every answer's length times what it may see."""
        if self.alone is not None:
            return self.alone.pairs
        if self.kernel is not None:
            return self.seen
        return sum(count * length * keys for count, length, keys, *_ in self.groups)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        if self.alone is not None:
            return self.alone.attend(layer, query, key, value, scoring)
        if self.kernel is not None:
            (rounded,) = in_product_type(query)
            if scoring.soft_cap is None and self.kernel.takes(rounded):
                # Gathered before they are rounded: the gradients of a shared prompt add up in float32.
                key, value = in_product_type(*(rows.index_select(0, self.keys) for rows in (key, value)))
                return self.kernel(
                    rounded, key, value, self.borders, self.longest_bounds,
                    scale=scoring.scale, window=scoring.window,
                )  # fmt: skip
            note_no_kernel(rounded, scoring.soft_cap)
        return self.attend_groups(query, key, value, scoring)

    # The groups change with every batch: compiled code would be specialised to each of them and thrown away.
    @uncompiled
    def attend_groups(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Branches of like lengths computed together: gathered, attended, put back in their places."""
        if not self.groups:
            self._plan_groups()
        heads, width = query.shape[1:]
        outputs = []
        for count, length, keys, asks, answers, seen, distance in self.groups:
            q = query.index_select(0, asks).view(count, length, heads, width).transpose(1, 2)
            k, v = (
                share_heads(rows.index_select(0, answers).view(count, keys, -1, width).transpose(1, 2), heads)
                for rows in (key, value)
            )
            q, k, v = in_product_type(q, k, v)
            plain = keys == length and scoring.window is None and scoring.soft_cap is None
            near = seen if scoring.window is None else seen & (distance < scoring.window)
            out = masked_attention(q, k, v, None if plain else near, scoring)
            outputs.append(out.transpose(1, 2).reshape(-1, heads, width))
        return torch.cat(outputs).index_select(0, self.inverse)
