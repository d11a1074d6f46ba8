"""What each token may look at: the only part of the model that knows where one document ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.model.operations import in_product_type
from trivium.model.uncompiled import uncompiled
from trivium.model.varlen import HALF, varlen_kernel, without


class Scoring(NamedTuple):
    """How a layer turns queries and keys into weights."""

    scale: float
    """What scores are multiplied by."""
    window: int | None = None
    """How many tokens are seen, the own one among them; None sees all before it."""
    soft_cap: float | None = None
    """What scores are squeezed below by a tanh."""


class Context(Protocol):
    """The tokens around a token: packed documents in training, a key/value cache in generation."""

    positions: Tensor
    """[N]: the place of each token inside its document."""
    longest: int | Tensor
    """The length of the documents: one number, or [N] when each token's own document differs.

    Only dynamic and long rope read it. A cache gives the length it has reserved, so that the
    angles of keys that are already stored stay those of the keys to come."""

    @property
    def pairs(self) -> int:
        """How many scores each head computes: queries times keys, with what is masked."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Causal attention: query [N, H, D], key and value [N, K, D], already rotated -> [N, H, D]."""


def share_heads(keys: Tensor, heads: int) -> Tensor:
    """Repeat [B, K, T, D] to one key-value head per query head: [B, H, T, D]."""
    return keys if keys.shape[1] == heads else keys.repeat_interleave(heads // keys.shape[1], dim=1)


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a token (row) sees another (column): itself and at most `window - 1` before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention where `seen` is true, plainly causal without it: all [B, H, T, D].

    No fused kernel caps scores, so those are computed one operation after the other."""
    if seen is None:
        assert scoring.soft_cap is None, "a soft cap needs its mask"
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scoring.scale)
    if scoring.soft_cap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scoring.scale)
    scores = torch.matmul(query, key.transpose(-1, -2)) * scoring.scale
    scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.matmul(scores.float().softmax(-1).to(value.dtype), value)


class Regroup(torch.autograd.Function):
    """Rows in another order, some of them twice; the gradient of a repeated row comes from one copy alone."""

    @staticmethod
    def forward(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        # The padding's gradient is zero (no real token sees what comes after it), so a gather is exact
        # where the general rule would be a slow scattered sum.
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(0, inverse), None, None


@dataclass(frozen=True)
class Group:
    """Documents computed together: `count` of them, each padded to `length`."""

    count: int
    length: int


def padded_length(length: int) -> int:
    """The length a document is padded to: at most an eighth more, so few groups cost little waste."""
    step = 16
    while step * 16 <= length:
        step *= 2
    return -(-length // step) * step


def bound(count: int) -> int:
    """The power of two that is at least this, and at least 16."""
    return max(16, 1 << (count - 1).bit_length())


def borders_of(sizes: Tensor, device: torch.device) -> Tensor:
    """Where documents of these sizes begin and end, as the kernel reads it: [a power of two + 1].

    Behind the last come documents without a token, which cost nothing. Numbers and shapes that a compiler
    takes for constants are so the same for many batches.
    """
    ends = F.pad(sizes.cumsum(0), (1, 0))
    return F.pad(ends, (0, bound(len(sizes)) - len(sizes)), value=int(ends[-1])).int().to(device)


def note_no_kernel(query: Tensor, soft_cap: float | None) -> None:
    """Say once why a GPU's kernel is left out; that it computes no float32 is a person's own choice."""
    if soft_cap is not None:
        without("no kernel for documents of several lengths caps its scores, as this model does")
    elif query.dtype in HALF:
        without(f"no kernel for documents of several lengths takes heads of width {query.shape[-1]}")


class Documents:
    """Packed rows for training: every token sees the tokens before it in its own document."""

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        positions: Tensor | None = None,
    ) -> None:
        assert min(lengths, default=0) > 0
        self.lengths = tuple(int(length) for length in lengths)
        self.device = torch.device(device)
        self.tokens = sum(self.lengths)
        self.maximum = max(self.lengths)
        self.uniform = all(length == self.maximum for length in self.lengths)
        sizes = torch.tensor(self.lengths)
        self.starts = sizes.cumsum(0) - sizes
        if positions is None:
            positions = torch.arange(self.tokens) - self.starts.repeat_interleave(sizes)
        self.positions = positions.to(self.device)
        self.longest: int | Tensor = (
            self.maximum if self.uniform else sizes.repeat_interleave(sizes).to(self.device)
        )
        self.masks: dict[tuple[int, int | None], Tensor] = {}
        self.kernel = varlen_kernel(self.device)
        self.longest_bound = bound(self.maximum)
        self.groups: tuple[Group, ...] = (Group(len(self.lengths), self.maximum),)
        if not self.uniform:
            self.plan_groups(sizes)
        if self.kernel is not None:
            self.borders = borders_of(sizes, self.device)

    def plan_groups(self, sizes: Tensor) -> None:
        """Decide once for all layers which documents are computed together."""
        padded: dict[int, list[int]] = {}
        for document, length in enumerate(self.lengths):
            padded.setdefault(padded_length(length), []).append(document)
        groups, gathers, inverse, row = [], [], torch.empty(self.tokens, dtype=torch.long), 0
        for length, members in sorted(padded.items()):
            starts, counts = self.starts[members][:, None], sizes[members][:, None]
            offsets = torch.arange(length)[None, :]
            real = offsets < counts
            index = torch.where(real, starts + offsets, starts)
            rows = torch.arange(row, row + index.numel()).view_as(index)
            inverse[index[real]] = rows[real]
            groups.append(Group(len(members), length))
            gathers.append(index.flatten())
            row += index.numel()
        self.groups = tuple(groups)
        self.gather = torch.cat(gathers).to(self.device)
        self.inverse = inverse.to(self.device)

    @property
    def pairs(self) -> int:
        """The squares of the documents, where they are padded of the padded ones."""
        if self.kernel is not None:
            return sum(length**2 for length in self.lengths)
        return sum(group.count * group.length**2 for group in self.groups)

    def mask(self, length: int, window: int | None) -> Tensor:
        """The causal mask of one group, shared by all layers."""
        if (length, window) not in self.masks:
            self.masks[length, window] = causal_mask(length, window, self.device)
        return self.masks[length, window]

    def seen_by(self, group: Group, window: int | None) -> Tensor | None:
        """What each token of a group sees; None where that is all before it."""
        return None if window is None or window >= group.length else self.mask(group.length, window)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        query, key, value = in_product_type(query, key, value)
        if scoring.window is not None and scoring.window >= self.maximum:
            scoring = scoring._replace(window=None)
        if self.kernel is not None and (scoring.window is not None or not self.uniform):
            if scoring.soft_cap is None and self.kernel.takes(query):
                return self.kernel(
                    query, key, value, (self.borders, self.borders),
                    (self.longest_bound, self.longest_bound), scale=scoring.scale, window=scoring.window,
                )  # fmt: skip
            note_no_kernel(query, scoring.soft_cap)
        if self.uniform:
            return self.attend_group(self.groups[0], query, key, value, scoring)
        return self.attend_groups(query, key, value, scoring)

    # The groups change with every batch: compiled code would be specialised to each of them and thrown away.
    @uncompiled
    def attend_groups(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Documents of several lengths: gathered by padded length, attended, put back in their places."""
        sizes = [group.count * group.length for group in self.groups]
        pieces = [Regroup.apply(rows, self.gather, self.inverse).split(sizes) for rows in (query, key, value)]
        outputs = [
            self.attend_group(group, q, k, v, scoring)
            for group, q, k, v in zip(self.groups, *pieces, strict=True)
        ]
        joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return joined.index_select(0, self.inverse)

    def attend_group(
        self, group: Group, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Documents of one length: one call of the fused kernel, without a copy."""
        seen = self.seen_by(group, scoring.window)
        heads = query.shape[1]
        shape = (group.count, group.length, -1, query.shape[2])
        q, k, v = (rows.view(shape).transpose(1, 2) for rows in (query, key, value))
        k, v = share_heads(k, heads), share_heads(v, heads)
        if seen is None and scoring.soft_cap is not None:
            seen = self.mask(group.length, None)
        out = masked_attention(q, k, v, seen, scoring)
        return out.transpose(1, 2).reshape(-1, heads, query.shape[2])
