"""The key/value cache: pools of a few capacities within a memory budget, and prefixes that stay cached."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig

if TYPE_CHECKING:
    from trivium.generate.sequence import Sequence
    from trivium.generate.static_decode import PoolSteps

BLOCK = 16
SMALLEST = 128
WHOLE_BLOCKS = 512


def in_blocks(length: int) -> int:
    """The length rounded up to whole blocks."""
    return -(-length // BLOCK) * BLOCK


def reach_for(length: int, *, lone: bool = False) -> int:
    """How many cached places attention reads for rows up to this length.

    The fused CPU kernel sums in vectors of 16 and in stretches of 512; unless a query is lone, stretches
    of more than some 384 are summed in halves. Read in these units, the masked rest adds exact zeros in the
    same order, so a row's numbers do not depend on how long its neighbours are.
    """
    unit = BLOCK if length <= (WHOLE_BLOCKS if lone else WHOLE_BLOCKS // 2) else WHOLE_BLOCKS
    return -(-length // unit) * unit


@dataclass(eq=False, kw_only=True)
class CacheSlot:
    """Where one sequence is cached: its row of a pool, and how many of that row's places are filled."""

    pool: Pool | None = None
    slot: int = 0
    length: int = 0


@dataclass(frozen=True)
class Shape:
    """What one cached token consists of."""

    layers: int
    heads: int
    head_width: int
    dtype: torch.dtype
    device: torch.device
    spare: int = 0
    """How many places lie behind the last row of a pool, for what padding writes."""

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Shape:
        """The shape a model's keys and values have."""
        return cls(config.layers, config.key_value_heads, config.head_width, dtype, device)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_width * self.dtype.itemsize


class Pool:
    """Slots of one capacity: those in decode lie first, so that attention reads them as one slice."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.slots: list[CacheSlot] = []
        self.decoding = 0
        self.storage = self._allocate(0)
        # what was captured over this storage, void once it moves
        self.steps: PoolSteps | None = None

    @property
    def rows(self) -> int:
        """How many slots have storage."""
        return self.storage.shape[1]

    def _allocate(self, rows: int) -> Tensor:
        """Storage [layers, rows, capacity, 2, heads, head width]."""
        # zeros, because a masked place still meets a weight of zero, and zero times garbage may be NaN
        shape = self.shape
        places, one = rows * self.capacity, (2, shape.heads, shape.head_width)
        flat = torch.zeros(shape.layers, places + shape.spare, *one, dtype=shape.dtype, device=shape.device)
        return flat[:, :places].view(shape.layers, rows, self.capacity, *one)

    @property
    def flat(self) -> Tensor:
        """All places, the spare ones last: [layers, places, 2 * heads * head width]."""
        shape, places = self.shape, self.rows * self.capacity + self.shape.spare
        width = 2 * shape.heads * shape.head_width
        return self.storage.as_strided((shape.layers, places, width), (places * width, width, 1))

    def resize(self, rows: int) -> None:
        """Give this many slots storage and carry over what is cached."""
        assert rows >= len(self.slots)
        self.steps = None
        old, self.storage = self.storage, self._allocate(rows)
        for slot in self.slots:
            if slot.length:
                self._copy(old, slot.slot, slot.slot, slot.length)

    def _copy(self, storage: Tensor, source: int, target: int, tokens: int) -> None:
        self.storage[:, target, :tokens] = storage[:, source, :tokens]

    def copy(self, source: CacheSlot, target: CacheSlot, tokens: int) -> None:
        """Start a slot of this pool with the first tokens that another slot has cached."""
        assert source.pool is not None
        self._copy(source.pool.storage, source.slot, target.slot, tokens)
        target.length = tokens

    def only(self, slot: CacheSlot) -> Pool:
        """A pool of this one slot, in decode, that shares the storage which it has here."""
        view = Pool(self.shape, self.capacity)
        view.storage = self.storage[:, slot.slot : slot.slot + 1]
        view.slots, view.decoding = [slot], 1
        return view

    def add(self, slot: CacheSlot) -> None:
        """Take the first free row."""
        assert len(self.slots) < self.rows
        slot.pool, slot.slot, slot.length = self, len(self.slots), 0
        self.slots.append(slot)

    def move_to_decode(self, slot: CacheSlot) -> None:
        """Let a slot lie among those in decode."""
        self._swap(slot, self.slots[self.decoding])
        self.decoding += 1

    def end_decode(self, slot: CacheSlot, tokens: int) -> None:
        """Take a slot out of those in decode; only its first tokens are of use from now on."""
        self.decoding -= 1
        self._swap(slot, self.slots[self.decoding])
        slot.length = tokens

    def _swap(self, one: CacheSlot, other: CacheSlot) -> None:
        if one is other:
            return
        tokens = min(in_blocks(max(one.length, other.length)), self.capacity)
        pair = self.storage[:, [one.slot, other.slot], :tokens]
        self.storage[:, [other.slot, one.slot], :tokens] = pair
        self.slots[other.slot], self.slots[one.slot] = one, other
        one.slot, other.slot = other.slot, one.slot

    def replace(self, source: CacheSlot, target: CacheSlot, tokens: int) -> None:
        """Let another sequence have this row with the first tokens that are in it."""
        target.pool, target.slot, target.length = self, source.slot, tokens
        self.slots[source.slot] = target
        source.pool = None

    def remove(self, slot: CacheSlot) -> None:
        """Free a row; the last of its kind takes its place."""
        hole = slot.slot
        if hole < self.decoding:
            self.decoding -= 1
            self._move(self.decoding, hole)
            hole = self.decoding
        self._move(len(self.slots) - 1, hole)
        self.slots.pop()
        slot.pool = None

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        slot = self.slots[source]
        self._copy(self.storage, source, target, slot.length)
        slot.slot = target
        self.slots[target] = slot


class Cache:
    """All pools together, and the promise never to hold more than the budget, nor while storage moves."""

    def __init__(self, shape: Shape, *, rows: int, budget: int | None = None) -> None:
        self.shape, self.max_rows = shape, rows
        self.pools: dict[int, Pool] = {}
        self.budget = half_of_free_memory(shape.device) if budget is None else budget
        self.places = self.budget // shape.bytes_per_token

    @staticmethod
    def capacity_for(length: int) -> int:
        """The capacity of the slots in which a sequence of this length is cached."""
        capacity = SMALLEST
        while capacity < length:
            capacity *= 2
        # from 1k on, a half step in between saves up to a third of the memory
        return capacity * 3 // 4 if capacity > 1024 and length <= capacity * 3 // 4 else capacity

    def check(self, length: int) -> None:
        """Refuse what could never be cached."""
        if self.capacity_for(length) > self.places:
            raise TriviumError(
                f"the request needs {length} cached tokens and the memory budget of "
                f"{self.budget / 2**20:.0f} MiB holds {self.places}: "
                "shorten it, or give the engine a larger memory_budget."
            )

    @property
    def reserved(self) -> int:
        """Token places that have storage now."""
        return sum(pool.rows * pool.capacity for pool in list(self.pools.values()))

    @property
    def reserved_bytes(self) -> int:
        """Bytes that have storage now; another thread may ask."""
        return self.reserved * self.shape.bytes_per_token

    def place(self, slot: CacheSlot, length: int) -> bool:
        """Give a sequence of this length a slot; false if it must wait."""
        capacity = self.capacity_for(length)
        pool = self.pools.get(capacity) or Pool(self.shape, capacity)
        if len(pool.slots) == pool.rows:
            rows = self._affordable(pool)
            if rows <= pool.rows:
                self._reclaim()
                rows = self._affordable(pool)
            if rows <= pool.rows:
                return False
            pool.resize(rows)
        self.pools[capacity] = pool
        pool.add(slot)
        return True

    def _affordable(self, pool: Pool) -> int:
        """How many rows a full pool may have: the old storage stays until its content is in the new one."""
        return min(max(4, 2 * pool.rows), self.max_rows, (self.places - self.reserved) // pool.capacity)

    def _reclaim(self) -> None:
        """Free storage of empty rows, where what is left fits beside it while it is copied."""
        for capacity, pool in list(self.pools.items()):
            if not pool.slots:
                del self.pools[capacity]
        for capacity, pool in self.pools.items():
            if len(pool.slots) < pool.rows and len(pool.slots) * capacity <= self.places - self.reserved:
                pool.resize(len(pool.slots))


def half_of_free_memory(device: torch.device) -> int:
    """Half of what is free now, in bytes."""
    return machine.free_on(device) // 2


class PrefixCache:
    """Finished sequences whose prompts are still cached, the oldest first.

    A follow-up request then only prefills its new tokens.
    """

    def __init__(self, cache: Cache, size: int) -> None:
        self.sequences: list[Sequence] = []
        self._cache, self.size = cache, size

    def keep(self, finished: abc.Sequence[Sequence]) -> None:
        """Keep the prompts of sequences that finish together, as many as fit; the others are removed."""
        # From the last row of a pool to the first, those to be kept at the end: so hardly any has to move.
        ordered = sorted(finished, key=lambda sequence: sequence.slot, reverse=True)
        for index, sequence in enumerate(ordered):
            pool, chosen = sequence.pool, index >= len(ordered) - self.size
            assert pool is not None
            if not chosen or sequence.slides or not sequence.prefill_length or self._covered(sequence):
                pool.remove(sequence)
                continue
            # Only what was prefilled: what was decoded came out of other kernels, with other digits.
            pool.end_decode(sequence, sequence.prefill_length)
            for other in [kept for kept in self.sequences if _begins(sequence, kept)]:
                self._remove(other)
            self.sequences.append(sequence)
        while len(self.sequences) > self.size:
            self.evict()

    def _covered(self, sequence: Sequence) -> bool:
        """Whether a kept prompt holds all of this one's; it then counts as the youngest."""
        for kept in self.sequences:
            if _begins(kept, sequence):
                self.sequences.remove(kept)
                self.sequences.append(kept)
                return True
        return False

    def evict(self) -> bool:
        """Free the slot of the oldest; false where none is kept."""
        if self.sequences:
            self._remove(self.sequences[0])
            return True
        return False

    def _remove(self, sequence: Sequence) -> None:
        assert sequence.pool is not None
        sequence.pool.remove(sequence)
        self.sequences.remove(sequence)

    def resize(self, size: int) -> None:
        """Keep so many from now on; the oldest beyond them are freed."""
        self.size = size
        while len(self.sequences) > size:
            self.evict()

    def clear(self) -> None:
        """Free all slots."""
        while self.evict():
            pass

    def replace(self, source: Sequence, target: Sequence, tokens: int) -> bool:
        """Let a sequence have the row of a kept prompt that begins like its own, if it is as large."""
        pool = source.pool
        if source not in self.sequences or pool is None:
            return False
        if self._cache.capacity_for(target.reserved) != pool.capacity:
            return False
        self.sequences.remove(source)
        pool.replace(source, target, tokens)
        target.prefilled = tokens
        return True


def _begins(sequence: Sequence, other: Sequence) -> bool:
    """Whether a sequence's prompt begins with the other's, which then need not be kept as well."""
    return (
        sequence.adapter == other.adapter
        and sequence.tokens[: other.prefill_length] == other.tokens[: other.prefill_length]
    )


def shared_prefix(
    sequence: Sequence, others: abc.Iterable[Sequence], *, dynamic_positions: bool
) -> tuple[Sequence | None, int]:
    """The sequence that has, or will have, most of this one's prompt, and how many tokens can be copied."""
    best, longest = None, 0
    for other in others:
        # Under another adapter the same tokens have other keys and values.
        if other.slides or sequence.slides or other.adapter != sequence.adapter:
            continue
        # Dynamic RoPE rotates keys by how long the whole sequence may become.
        if dynamic_positions and other.reserved != sequence.reserved:
            continue
        if other.handle is not None and other.handle is sequence.handle:
            return other, sequence.prefill_length
        limit = min(sequence.prefill_length, other.prefill_length)
        if limit <= longest or sequence.tokens[:BLOCK] != other.tokens[:BLOCK]:
            continue
        mine, theirs = np.array(sequence.tokens[:limit]), np.array(other.tokens[:limit])
        differences = np.flatnonzero(mine != theirs)
        common = int(differences[0]) if len(differences) else limit
        # whole blocks, unless the whole prompt is there: the rest then meets the same blocks as alone
        usable = common if common == sequence.prefill_length else common // BLOCK * BLOCK
        if sequence.scored is not None:
            usable = min(usable, (sequence.scored.first - 1) // BLOCK * BLOCK)
        if usable > longest:
            best, longest = other, usable
    return best, longest
