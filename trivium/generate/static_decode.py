"""Decode steps of constant shape: all that a step reads lies in static tensors, so a GPU can replay it.

A decode step of a small model is limited by the launches of its kernels. A CUDA graph launches all of them
at once, if neither shapes nor addresses change from step to step. So rows are padded to a bucket, attention
reads the cache up to a bucket of lengths under a mask that is computed from the rows' lengths on the device,
and nothing in between waits for the host. One step is captured for each bucket of a pool of the cache, at its
first use; it stays valid while the pool's storage and the weights stay where they are, whatever is written
to them. Rows of different pools are computed one pool after the other: two pools read the weights twice.

What a step ended is read while the next one is computed (`EndedRows`): a row that has ended computes one
token more, which is thrown away. A row that ends because it is full is known beforehand; rows that Python
looks at, for a listener, a stop text, a grammar or alternatives, are read at once, with all beside them.

On a CPU the same code runs without graphs (`Engine(static_steps=True)`); a model that has to look at numbers
on the way (`has_static_steps`) is decoded by `attention.DecodeContext` everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trivium.generate.attention import NEVER, CacheContext, mix
from trivium.generate.forward import ForwardPass
from trivium.generate.kv_cache import SMALLEST, Pool
from trivium.generate.split_keys import Score, attend, score_of, splits_keys
from trivium.model.arithmetic import counted, note, uncounted
from trivium.model.attention import Scoring
from trivium.model.lora import selection_of
from trivium.model.masks import is_masked
from trivium.model.quantize import is_quantised, rounds_rows
from trivium.model.transformer import Transformer
from trivium.model.uncompiled import uncompiled

if TYPE_CHECKING:
    from trivium.generate.sequence import Sequence as SequenceInDecode

WARM_UPS = 3
"""Runs before a capture, in which libraries choose kernels and allocate what they work in."""


def has_static_steps(model: Transformer) -> bool:
    """Whether nothing in a decode step of this model depends on the numbers in it."""
    if model.config.experts is not None or model.modalities is not None or is_masked(model):
        return False
    if any(rotary is not None and rotary.grows for rotary in (model.rotary, model.local_rotary)):
        return False
    selection = selection_of(model)
    if selection is not None and selection.names != [selection.active]:
        return False
    return not any(isinstance(one, nn.Linear) and rounds_rows(one.weight) for one in model.modules())


def bucket_of(rows: int, most: int) -> int:
    """The number of rows that is computed for so many: a power of two, `most` at most."""
    return min(1 << (rows - 1).bit_length(), most)


def reach_bucket(length: int, capacity: int) -> int:
    """How many cached places attention reads for rows up to this length, in quarters of the capacity."""
    unit = max(SMALLEST, capacity // 4)
    return min(-(-length // unit) * unit, capacity)


class Captured:
    """A function of static tensors: on a GPU a graph, captured at the first call and then replayed."""

    def __init__(
        self, function: Callable[[], Tensor], device: torch.device, memory: GraphMemory, name: str
    ) -> None:
        self._name, self._function, self._device, self._memory = name, function, device, memory
        self._graph: torch.cuda.CUDAGraph | None = None
        self._operations = 0.0
        self._output: Tensor | None = None
        self._plain = device.type != "cuda"

    def __call__(self) -> Tensor:
        """The function's result; the next call overwrites it."""
        if self._plain:
            return self._function()
        if self._graph is None:
            self._capture()
            if self._plain:
                return self._function()
        assert self._graph is not None
        assert self._output is not None
        self._graph.replay()
        note(self._operations)
        return self._output

    def _capture(self) -> None:
        """Warm up on a side stream, then record what is launched; what cannot be recorded is called."""
        current = torch.cuda.current_stream(self._device)
        side = self._memory.stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side), uncounted():
            for _ in range(WARM_UPS):
                self._function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, as a server's, may allocate meanwhile
            with (
                torch.cuda.graph(
                    graph, pool=self._memory.handle(), stream=side, capture_error_mode="thread_local"
                ),
                uncounted(),
                counted() as tally,
            ):
                self._output = self._function()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.set_stream(current)
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)
            self._plain, self._output = True, None
            logging.getLogger(__name__).warning("%s runs without a CUDA graph: %s", self._name, error)
        else:
            self._graph, self._operations = graph, tally.operations


class GraphMemory:
    """What all graphs of an engine share: the memory of their intermediate results, and a stream."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._stream: torch.cuda.Stream | None = None

    def handle(self) -> Any:
        """The pool; graphs run one after the other, so one may overwrite what another worked in."""
        if self._handle is None:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The stream on which all are captured."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream


class StaticContext(CacheContext):
    """One more token for the first rows of a pool, in constant shapes; the model's `Context`."""

    def __init__(
        self, pool: Pool, inputs: Tensor, reach: int, windows: Sequence[int | None], *, splits: bool
    ) -> None:
        """`inputs` [2, rows]: each row's position, and the place of the pool where it is cached.

        With `splits` the kernel of `split_keys` attends, which needs no masks."""
        self.positions, self._places = inputs.unbind(0)
        self.tokens, self.longest, self.reach = inputs.shape[1], 0, reach
        self.furthest = pool.capacity
        self._windows, self._dtype = windows, pool.shape.dtype
        self._columns = torch.arange(reach, device=inputs.device)
        self._flat = pool.flat.unbind(0)
        layers = pool.storage[:, : self.tokens, :reach].transpose(2, 4).unbind(0)
        self._cached = [(layer[:, :, 0], layer[:, :, 1]) for layer in layers]
        self._masks: dict[int | None, Tensor] = {}
        self._scores: dict[tuple[int | None, float | None], Score] = {}
        self._splits = splits

    def mask(self) -> None:
        """Compute from the rows' positions what each sees: additive masks [rows, 1, 1, reach]."""
        if self._splits:
            return
        distance = self.positions[:, None] - self._columns
        for window in self._windows:
            hidden = distance < 0
            if window is not None:
                hidden |= distance >= window
            mask = torch.zeros(distance.shape, dtype=self._dtype, device=distance.device)
            self._masks[window] = mask.masked_fill_(hidden, NEVER)[:, None, None]

    # A compiler would make a program for each layer, whose number is part of the place.
    attend = uncompiled(CacheContext.attend)

    @property
    def pairs(self) -> int:
        return self.tokens * self.reach

    def store(self, layer: int, key_value: Tensor) -> None:
        self._flat[layer].index_copy_(0, self._places, key_value[: self.tokens])

    def read(self, layer: int, query: Tensor, scoring: Scoring) -> Tensor:
        keys, values = self._cached[layer]
        query = query[: self.tokens]
        if self._splits:
            kind = scoring.window, scoring.soft_cap
            if kind not in self._scores:
                # one function for all steps: another one would be compiled anew
                self._scores[kind] = score_of(self.positions, *kind)
            out = attend(query, keys, values, self._scores[kind], scoring)
        else:
            mask = self._masks[scoring.window]
            out = mix(query, keys, values, mask, scoring.scale, scoring.soft_cap)
        return out.reshape(self.tokens, -1)


class PoolSteps:
    """The steps over one pool's storage, and the static tensors they read."""

    def __init__(self, pool: Pool, decode: StaticDecode) -> None:
        self._decode = decode
        # tokens, positions, places
        self.inputs = torch.zeros(3, pool.rows, dtype=torch.long, device=pool.shape.device)
        self._spare = pool.rows * pool.capacity
        self._steps: dict[tuple[int, int], Captured] = {}

    def arrange(self, pool: Pool) -> None:
        """Take the rows in decode as they now lie in the pool; all others are cached in the spare place."""
        lengths = [slot.length for slot in pool.slots[: pool.decoding]]
        places = [row * pool.capacity + length for row, length in enumerate(lengths)]
        idle = pool.rows - pool.decoding
        now = torch.tensor([lengths + [0] * idle, places + [self._spare] * idle])
        self.inputs[0].zero_()
        self.inputs[1:].copy_(now)

    def run(self, pool: Pool, tokens: Tensor, longest: int) -> Tensor:
        """Scores [rows, V] after each row's token."""
        rows, reach = bucket_of(len(tokens), pool.rows), reach_bucket(longest, pool.capacity)
        if (rows, reach) not in self._steps:
            self._steps[rows, reach] = self._step(pool, rows, reach)
        step = self._steps[rows, reach]
        self.inputs[0, : len(tokens)].copy_(tokens)
        return step()[: len(tokens)]

    def _step(self, pool: Pool, rows: int, reach: int) -> Captured:
        decode, inputs = self._decode, self.inputs[:, :rows]
        context = StaticContext(pool, inputs[1:], reach, decode.windows, splits=decode.splits)
        tokens = inputs[0]

        def step() -> Tensor:
            context.mask()
            # into one place for all steps: what each graph returned would be kept as long as the graph
            return decode.logits(rows).copy_(decode.forward.decode(tokens, context))

        decode.captures += 1
        name = f"a decode step of {rows} rows that reads {reach} places"
        return Captured(step, pool.shape.device, decode.memory, name)


class StaticDecode:
    """An engine's decode steps of constant shape."""

    def __init__(
        self,
        model: Transformer,
        forward: ForwardPass,
        windows: Sequence[int | None],
        max_rows: int,
        *,
        compiled: bool = False,
    ) -> None:
        """`compiled` says that steps are compiled, and so may attend with a kernel that has to be."""
        self.splits = compiled and splits_keys(model.config)
        self.model, self.forward, self.windows, self.max_rows = model, forward, windows, max_rows
        self.memory, self.captures = GraphMemory(), 0
        self._where: list[int] = []
        self._logits: Tensor | None = None

    def logits(self, rows: int) -> Tensor:
        """Where the scores of a step of so many rows go, [rows, V]."""
        if self._logits is None:
            model = self.model
            self._logits = torch.zeros(self.max_rows, len(model.head_weight), device=model.device)
        return self._logits[:rows]

    def arrange(self, pools: Sequence[Pool]) -> StaticRows:
        """The rows that decode, until one of them moves."""
        where = [one.data_ptr() for one in self.model.parameters() if not is_quantised(one)]
        if where != self._where:
            for pool in pools:
                pool.steps = None
        self._where = where
        decoding = [pool for pool in pools if pool.decoding]
        for pool in decoding:
            if pool.steps is None:
                pool.steps = PoolSteps(pool, self)
            pool.steps.arrange(pool)
        return StaticRows(decoding)


class EndedRows:
    """Which sequences a step ended, on its way to the host while the next step is computed."""

    def __init__(self, ended: Tensor, sequences: Sequence[SequenceInDecode]) -> None:
        """`ended` [N] says it of the sequences as they decode now."""
        self._sequences, self._arrived = list(sequences), None
        if ended.device.type == "cuda":
            self._ended = torch.empty(ended.shape, dtype=ended.dtype, pin_memory=True)
            self._ended.copy_(ended, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._ended = ended.clone()

    def wait(self) -> list[SequenceInDecode]:
        """The sequences that ended."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [one for one, over in zip(self._sequences, self._ended.tolist(), strict=True) if over]


class StaticRows:
    """All rows that decode, pool by pool, kept from step to step while the set of rows is the same."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = [(pool, pool.decoding) for pool in pools]
        self._longest = [max(slot.length for slot in pool.slots[:count]) for pool, count in self._pools]
        self.tokens, self.stored, self._steps = sum(count for _, count in self._pools), 0, 0

    def _parts(self) -> Iterator[tuple[Pool, PoolSteps, int]]:
        for pool, count in self._pools:
            assert pool.steps is not None
            yield pool, pool.steps, count

    def decode(self, tokens: Tensor) -> Tensor:
        """Scores [N, V] after each row's token; the next call may overwrite them."""
        scores, start = [], 0
        for (pool, steps, count), longest in zip(self._parts(), self._longest, strict=True):
            scores.append(steps.run(pool, tokens[start : start + count], longest + self._steps + 1))
            start += count
            if len(self._pools) > 1:
                # pools share the buffers of a pass
                scores[-1] = scores[-1].clone()
        return scores[0] if len(scores) == 1 else torch.cat(scores)

    def advance(self) -> None:
        """Move to the next token."""
        self._steps += 1
        for _, steps, count in self._parts():
            steps.inputs[1:, :count] += 1

    def synchronise_lengths(self) -> None:
        """Write the sequences' lengths back, before any of them moves; the context is then invalid."""
        for pool, count in self._pools:
            for slot in pool.slots[:count]:
                slot.length += self.stored
