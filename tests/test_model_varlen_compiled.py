"""What a compiler sees of packed documents on the kernel's path: one graph, and few variants of it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from small import small_model
from torch import Tensor

from trivium.data.rows import Batch, collate, row_of_documents
from trivium.model import attention
from trivium.model.attention import Documents
from trivium.model.varlen import VarlenKernel


@torch.library.custom_op("trivium_tests::opaque_attention", mutates_args=())
def opaque(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int) -> Tensor:
    """Stands for torch's kernel, which is an operation that no compiler looks into."""
    return torch.zeros_like(query)


@opaque.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int) -> Tensor:
    return torch.empty_like(query)


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return torch.ops.trivium_tests.opaque_attention(query, key, value, cu_seq_q, max_q)


def epoch(batches: int, context: int = 120) -> Iterator[Batch]:
    """Rows of one length, cut into documents in another way each time."""
    random = np.random.default_rng(0)
    for _ in range(batches):
        left, lengths = context, []
        while left:
            lengths.append(min(left, int(random.integers(4, 40))))
            left -= lengths[-1]
        yield collate([row_of_documents([random.integers(0, 61, size) for size in lengths])])


@pytest.mark.slow
def test_a_packed_epoch_needs_few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of lengths are powers of two, and borders are padded to one: new documents are no new shapes."""
    monkeypatch.setattr(attention, "varlen_kernel", lambda device: VarlenKernel.of(kernel))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = small_model().to(torch.bfloat16)
    # Without shapes as symbols, so that every new number would be another graph.
    compiled = torch.compile(model, backend="eager", dynamic=False)
    seen = []
    with torch.no_grad():
        for batch in epoch(12):
            compiled(batch.tokens, Documents(batch.lengths))
            seen.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert seen[-1] <= 4, seen
    assert seen[-1] == seen[5], "after a few batches nothing is compiled any more"
    reasons = [reason for reason in counters["graph_break"] if "note_pass" not in reason]
    assert not reasons, "but for the count of arithmetic, which stands before the first layer"
