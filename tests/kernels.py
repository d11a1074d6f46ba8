"""What a GPU's attention kernel computes, in plain torch, under the signature it has in every version."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class AuxRequest(NamedTuple):
    lse: bool = False


def documents(borders: Tensor) -> list[slice]:
    return [slice(*ends) for ends in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True)]


def attended(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    scale: float | None, window_size: tuple[int, int],
) -> Tensor:  # fmt: skip
    """FlashAttention over documents: windows reach left and right of a diagonal that ends at both ends."""
    assert query.dtype in (torch.bfloat16, torch.float16), "the kernel takes half precision alone"
    assert key.dtype == value.dtype == query.dtype
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert cu_seq_q.device == cu_seq_k.device == query.device
    assert all(part.stride(-1) == 1 for part in (query, key, value))
    assert query.shape[-1] <= 256
    assert query.shape[-1] % 8 == 0
    assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
    pieces = []
    for mine, theirs in zip(documents(cu_seq_q), documents(cu_seq_k), strict=True):
        queries, keys = mine.stop - mine.start, theirs.stop - theirs.start
        assert queries <= max_q
        assert keys <= max_k
        if not queries:
            continue
        q, k, v = (rows.float().transpose(0, 1) for rows in (query[mine], key[theirs], value[theirs]))
        k, v = (rows.repeat_interleave(len(q) // len(k), dim=0) for rows in (k, v))
        scores = q @ k.transpose(1, 2) * (scale if scale is not None else 1 / math.sqrt(q.shape[-1]))
        ahead = torch.arange(keys)[None] - torch.arange(queries)[:, None] - (keys - queries)
        left, right = (math.inf if size < 0 else size for size in window_size)
        hidden = ((ahead < -left) | (ahead > right)).to(scores.device)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        pieces.append((weights.to(query.dtype).float() @ v).transpose(0, 1))
    return torch.cat(pieces).to(query.dtype)


def varlen_attn_of_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: AuxRequest | None = None,
) -> Any:  # fmt: skip
    window = (-1, 0) if is_causal else (-1, -1)
    assert query.shape[1] == key.shape[1]
    return attended(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, None, window)


def varlen_attn_of_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: AuxRequest | None = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
) -> Any:  # fmt: skip
    assert query.shape[1] == key.shape[1], "that this version shares heads is documented nowhere"
    return attended(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


def varlen_attn_of_2_12(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor | None, max_q: int,
    max_k: int, *, return_aux: AuxRequest | None = None, scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False, seqused_k: Tensor | None = None,
    block_table: Tensor | None = None, num_splits: int | None = None,
) -> Any:  # fmt: skip
    assert cu_seq_k is not None
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert query.shape[1] % key.shape[1] == 0
    return attended(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size)


BY_VERSION: dict[str, Callable[..., Any] | None] = {
    "2.9": None,
    "2.10": varlen_attn_of_2_10,
    "2.11": varlen_attn_of_2_11,
    "2.12": varlen_attn_of_2_12,
    "2.13": varlen_attn_of_2_12,
}
"""What torch.nn.attention.varlen has held since it exists."""
