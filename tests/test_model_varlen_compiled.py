"""What a compiler sees of packed documents: whole layers, and few variants of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import kernels
import numpy as np
import pytest
import torch
from small import small_model
from torch import Tensor

from trivium.data.rows import Batch, collate, row_of_documents
from trivium.learn.objectives.next_token import NextToken
from trivium.model import attention
from trivium.model.attention import Documents
from trivium.model.compiling import compiled
from trivium.model.varlen import VarlenKernel

PASSES = 20


@torch.library.custom_op("trivium_tests::opaque_attention", mutates_args=())
def opaque(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float, back: int
) -> Tensor:
    """Stands for torch's kernel, which is an operation that no compiler looks into."""
    return kernels.attended(query, key, value, borders, borders, longest, longest, scale, (back, 0))


@opaque.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float, back: int
) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("trivium_tests::opaque_gradients", mutates_args=())
def gradients(
    given: Tensor, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float,
    back: int,
) -> list[Tensor]:  # fmt: skip
    made = [torch.empty_like(one) for one in (query, key, value)]
    for place in kernels.documents(borders):
        g, q, k, v = (one[place].float().transpose(0, 1) for one in (given, query, key, value))
        scores = q @ k.mT * scale
        weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
        to_weights = g @ v.mT
        to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdim=True)) * scale
        for one, found in zip(made, (to_scores @ k, to_scores.mT @ q, weights.mT @ g), strict=True):
            one[place] = found.transpose(0, 1).to(one.dtype)
    return made


@gradients.register_fake
def _(
    given: Tensor, query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, scale: float,
    back: int,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(one) for one in (query, key, value)]


def keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.longest, ctx.scale, ctx.back = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx, given):  # type: ignore[no-untyped-def]
    return *gradients(given.contiguous(), *ctx.saved_tensors, ctx.longest, ctx.scale, ctx.back), *[None] * 4


opaque.register_autograd(differentiate, setup_context=keep)


def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return opaque(query, key, value, cu_seq_q, max_q, scale, window_size[0])


def epoch() -> Iterator[Batch]:
    """Passes that differ in their number of tokens, of documents and in the documents' lengths."""
    random = np.random.default_rng(0)
    for _ in range(PASSES):
        left, lengths = int(random.integers(60, 200)), []
        while left:
            lengths.append(min(left, int(random.integers(4, 40))))
            left -= lengths[-1]
        yield collate([row_of_documents([random.integers(0, 61, size) for size in lengths])])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["kernel", "groups"])
def test_a_packed_epoch_needs_few_programs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward: after a few passes nothing is compiled any more, and the numbers are the same."""
    if path == "kernel":
        monkeypatch.setattr(attention, "varlen_kernel", lambda device: VarlenKernel.of(kernel))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    kind = torch.bfloat16 if path == "kernel" else torch.float32
    model = small_model(layers=3).to(kind)
    fast = compiled(model, backend="aot_eager")
    objective, seen = NextToken(), []
    for batch in epoch():
        found = []
        for forward in (fast, model):
            model.zero_grad()
            loss = objective.loss(forward, batch).sum
            loss.backward()
            gradient = torch.cat([one.grad.float().flatten() for one in model.parameters()])
            found.append((loss.item(), gradient))
        (loss, gradient), (plain, exact) = found
        # Fused operations round elsewhere than single ones.
        bound = 0.02 if kind == torch.bfloat16 else 1e-5
        assert loss == pytest.approx(plain, rel=bound)
        assert (gradient - exact).norm() < bound * exact.norm()
        seen.append(counters["stats"]["unique_graphs"])
    broken = dict(counters["graph_break"])
    torch._dynamo.reset()
    assert seen[-1] == seen[PASSES // 2], seen
    if path == "kernel":
        assert not broken, "whole layers"
        assert seen[-1] <= 4, seen


@pytest.mark.slow
def test_the_models_of_many_stages_are_all_compiled() -> None:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    seen = []
    for width in range(8, 32, 2):
        model = small_model(heads=1, head_width=8, width=width)
        with torch.no_grad():
            compiled(model, backend="eager")(torch.arange(30), Documents([10, 20]))
        seen.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert all(after > before for before, after in pairwise(seen)), seen
