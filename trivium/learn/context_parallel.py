"""Context parallelism: the tokens of a pass are divided among a group of processes, long documents and all.

Of twice as many pieces as there are processes each takes one from the head and one from the tail, so that all
compute about as many scores (Dubey et al., 2407.21783, 3.3.2). In each layer keys and values are gathered,
which few key/value heads keep small, and a process's own tokens attend to them within the borders of their
documents. Layers are kept in parts by all of these processes, too, and gathered for a pass (FSDP2), which
adds up the gradients of their tokens. Embedding and head are divided along the vocabulary, so that no product
is computed twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ParallelStyle,
    parallelize_module,
)

from trivium.kit.errors import TriviumError
from trivium.learn.tensor_parallel import Whole, divide_tables
from trivium.model.arithmetic import note_pass
from trivium.model.attention import (
    Documents,
    Scoring,
    borders_of,
    bound,
    masked_attention,
    note_no_kernel,
    share_heads,
)
from trivium.model.branches import Branches
from trivium.model.experts import Routing
from trivium.model.operations import in_product_type
from trivium.model.transformer import Transformer
from trivium.model.varlen import varlen_kernel

BESIDE = ("norm", "position_embedding")
"""What has weights beside the layers, other than the tables of tokens."""


@dataclass(frozen=True)
class Segment:
    """Tokens of one document that follow each other on this process, and the keys that they may see."""

    first: int
    """Where they begin among this process's tokens."""
    begin: int
    """Where their document begins among all tokens."""
    end: int
    """Where they end among all tokens, and with them what they may see."""
    count: int


def head_tail(tokens: int, processes: int) -> Tensor:
    """All tokens in the order in which processes take them: piece r, piece 2n - 1 - r, piece r + 1, ..."""
    pieces = torch.arange(tokens).tensor_split(2 * processes)
    return torch.cat([pieces[at] for r in range(processes) for at in (r, 2 * processes - 1 - r)])


def segments_of(own: Tensor, lengths: Sequence[int]) -> list[Segment]:
    """The runs of these tokens, [count] places among all, that lie in one document."""
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    owner = torch.searchsorted(ends, own, right=True)
    breaks = (own.diff() != 1) | (owner.diff() != 0)
    borders = [0, *(breaks.nonzero().squeeze(1) + 1).tolist(), len(own)]
    found = []
    for first, after in pairwise(borders if len(own) else []):
        document = int(owner[first])
        begin = int(ends[document] - sizes[document])
        found.append(Segment(first, begin, int(own[after - 1]) + 1, after - first))
    return found


class Piece:
    """What this process's tokens of packed documents may look at: keys and values of all processes."""

    def __init__(self, whole: Documents, mesh: DeviceMesh) -> None:
        self.mesh, self.tokens = mesh, whole.tokens
        order = head_tail(whole.tokens, mesh.size())
        self.order, self.inverse = order.to(whole.device), order.argsort().to(whole.device)
        # As torch divides: equal parts, the last ones shorter.
        each = -(-whole.tokens // mesh.size())
        own = order[mesh.get_local_rank() * each :][:each]
        self.own = own.to(whole.device)
        self.positions = whole.positions[self.own]
        longest = whole.longest
        self.longest: int | Tensor = longest if isinstance(longest, int) else longest[self.own]
        self.segments = segments_of(own, whole.lengths)
        self.pairs = sum(one.count * (one.end - one.begin) for one in self.segments)
        self.kernel = varlen_kernel(whole.device)

    def split(self, rows: Tensor) -> Tensor:
        """This process's rows: [tokens, ...] -> [own, ...]."""
        whole = DTensor.from_local(
            rows.index_select(0, self.order), self.mesh, [Replicate()], run_check=False
        )
        return whole.redistribute(placements=[Shard(0)]).to_local()

    def gathered(self, rows: Tensor, gradient: Any) -> Tensor:
        """The rows of all processes in their order: [own, ...] -> [tokens, ...].

        `gradient` says what a backward pass gives each process: all of it, or a part of a sum."""
        shape = torch.Size((self.tokens, *rows.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        mine = DTensor.from_local(
            rows.contiguous(), self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
        everyone = mine.redistribute(placements=[Replicate()]).to_local(grad_placements=[gradient])
        return everyone.index_select(0, self.inverse)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Own queries [own, H, D] over the keys and values of all tokens -> [own, H, D]."""
        query, key, value = in_product_type(query, key, value)
        key, value = self.gathered(key, Partial()), self.gathered(value, Partial())
        if self.kernel is not None:
            if scoring.soft_cap is None and self.kernel.takes(query) and self.segments:
                return self._by_kernel(query, key, value, scoring)
            note_no_kernel(query, scoring.soft_cap)
        parts = [self._segment(one, query, key, value, scoring) for one in self.segments]
        # A process without tokens still takes its part in sending back the gradients of keys and values.
        return torch.cat(parts) if parts else query + 0.0 * (key.sum() + value.sum())

    def _by_kernel(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """All segments in one call, each with its document up to its end."""
        assert self.kernel is not None
        index = torch.cat([torch.arange(one.begin, one.end) for one in self.segments]).to(query.device)
        asks = torch.tensor([one.count for one in self.segments])
        seen = torch.tensor([one.end - one.begin for one in self.segments])
        return self.kernel(
            query, key.index_select(0, index), value.index_select(0, index),
            (borders_of(asks, query.device), borders_of(seen, query.device)),
            (bound(int(asks.max())), bound(int(seen.max()))), scale=scoring.scale, window=scoring.window,
        )  # fmt: skip

    def _segment(self, one: Segment, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """[count, H, D]: the last query sees the last key, the first one those that come before."""
        heads, total = query.shape[1], one.end - one.begin
        q = query[one.first : one.first + one.count].transpose(0, 1)[None]
        k, v = (share_heads(x[one.begin : one.end].transpose(0, 1)[None], heads) for x in (key, value))
        asks = torch.arange(total - one.count, total, device=query.device)[:, None]
        distance = asks - torch.arange(total, device=query.device)[None, :]
        seen = distance >= 0 if scoring.window is None else (distance >= 0) & (distance < scoring.window)
        return masked_attention(q, k, v, seen, scoring)[0].transpose(0, 1)


@dataclass(frozen=True)
class _Rest:
    """What the other processes of a group compute of a pass."""

    pairs: int


class RoutingOfAll:
    """A pass's routing, in which the routers of each process note their piece of the tokens."""

    def __init__(self, routing: Routing, piece: Piece) -> None:
        self.routing, self.piece = routing, piece

    def note(self, probabilities: Tensor, counts: Tensor) -> None:
        self.routing.probabilities.append(self._summed(probabilities.sum(0)))
        self.routing.counts.append(self._summed(counts))
        self.routing.tokens += self.piece.tokens

    def _summed(self, part: Tensor) -> Tensor:
        """The sum over all processes; a backward pass gives each of them its gradient."""
        mine = DTensor.from_local(part, self.piece.mesh, [Partial()], run_check=False)
        return mine.redistribute(placements=[Replicate()]).to_local()


class Divided(ParallelStyle):
    """A whole model of which each process computes its piece of the tokens; all get all hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.under_way: list[tuple[Piece, Tensor | None]] = []

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.mesh = device_mesh
        module.register_forward_pre_hook(self._enter, with_kwargs=True)
        module.register_forward_hook(self._leave, with_kwargs=True)
        return module

    def _enter(self, module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        tokens, context = inputs
        if isinstance(context, Branches):
            context = context.alone
        if not isinstance(context, Documents):
            raise TriviumError(
                "`parallel.context` cannot divide answers that share a prompt, as in preferences and "
                "reinforcement learning; divide by `shard` or `tensor`."
            )
        piece, options = Piece(context, self.mesh), dict(options)
        self.under_way = [(piece, options.pop("wanted", None))]
        if options.get("routing") is not None:
            options["routing"] = RoutingOfAll(options["routing"], piece)
        # The model counts what it computes here.
        note_pass(module, len(tokens) - len(piece.own), _Rest(context.pairs - piece.pairs))  # type: ignore[arg-type]
        embeddings, noise = options.pop("embeddings", None), options.pop("noise", None)
        stream = module.embed(tokens) if embeddings is None else embeddings
        if noise is not None:
            stream = stream + noise
        return (tokens[piece.own], piece), {**options, "embeddings": piece.split(stream)}

    def _leave(self, module: Any, inputs: Any, options: Any, hidden: Tensor) -> Tensor:
        piece, wanted = self.under_way.pop()
        everywhere = piece.gathered(hidden, Replicate())
        return everywhere if wanted is None else everywhere[wanted]


def divide_context(model: Transformer, mesh: DeviceMesh, *, weights: bool = True) -> None:
    """Let the processes of a one-dimensional mesh share the tokens of each of this model's passes.

    Without `weights` these are divided already; then each process has the gradients of its own tokens."""
    plan: dict[str, ParallelStyle] = {}
    if weights:
        divide_tables(model, mesh)
        plan |= {name: Whole(Partial()) for name in BESIDE if getattr(model, name) is not None}
    plan[""] = Divided()
    parallelize_module(model, mesh, plan, src_data_rank=None)
