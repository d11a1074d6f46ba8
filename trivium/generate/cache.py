"""The key/value cache: rows of a few capacities, within a memory budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.model.config import ModelConfig

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


class Tenant(Protocol):
    """What the cache knows of a row: where it lies and how many places it has filled."""

    pool: Pool | None
    slot: int
    length: int


@dataclass(frozen=True)
class Shape:
    """What one cached token consists of."""

    layers: int
    heads: int
    head_width: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Shape:
        """The shape a model's keys and values have."""
        return cls(config.layers, config.key_value_heads, config.head_width, dtype, device)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_width * self.dtype.itemsize


class Pool:
    """Rows of one capacity: those that generate lie first, so that attention reads them as one slice."""

    def __init__(self, shape: Shape, capacity: int) -> None:
        self.shape, self.capacity = shape, capacity
        self.tenants: list[Tenant] = []
        self.ready = 0
        self.storage = self._room(0)

    @property
    def rows(self) -> int:
        """How many rows have storage."""
        return self.storage.shape[1]

    def _room(self, rows: int) -> Tensor:
        # zeros, because a masked place still meets a weight of zero, and zero times garbage may be NaN
        shape = self.shape
        size = (shape.layers, rows, self.capacity, 2, shape.heads, shape.head_width)
        return torch.zeros(size, dtype=shape.dtype, device=shape.device)

    def resize(self, rows: int) -> None:
        """Give this many rows storage and carry over what is cached."""
        assert rows >= len(self.tenants)
        old, self.storage = self.storage, self._room(rows)
        for tenant in self.tenants:
            if tenant.length:
                self._copy(old, tenant.slot, tenant.slot, tenant.length)

    def _copy(self, source: Tensor, start: int, end: int, tokens: int) -> None:
        self.storage[:, end, :tokens] = source[:, start, :tokens]

    def borrow(self, tenant: Tenant, lender: Tenant, tokens: int) -> None:
        """Start a row with the first tokens another has already computed."""
        assert lender.pool is not None
        self._copy(lender.pool.storage, lender.slot, tenant.slot, tokens)
        tenant.length = tokens

    def alone(self, tenant: Tenant) -> Pool:
        """A pool that holds this one row, which generates, in the storage that it has here."""
        view = Pool(self.shape, self.capacity)
        view.storage = self.storage[:, tenant.slot : tenant.slot + 1]
        view.tenants, view.ready = [tenant], 1
        return view

    def enter(self, tenant: Tenant) -> None:
        """Take the first free row."""
        assert len(self.tenants) < self.rows
        tenant.pool, tenant.slot, tenant.length = self, len(self.tenants), 0
        self.tenants.append(tenant)

    def promote(self, tenant: Tenant) -> None:
        """Count a row among those that generate."""
        self._swap(tenant, self.tenants[self.ready])
        self.ready += 1

    def retire(self, tenant: Tenant, tokens: int) -> None:
        """Count a row no longer among those that generate; only its first tokens are of use."""
        self.ready -= 1
        self._swap(tenant, self.tenants[self.ready])
        tenant.length = tokens

    def _swap(self, one: Tenant, other: Tenant) -> None:
        if one is other:
            return
        tokens = min(in_blocks(max(one.length, other.length)), self.capacity)
        pair = self.storage[:, [one.slot, other.slot], :tokens]
        self.storage[:, [other.slot, one.slot], :tokens] = pair
        self.tenants[other.slot], self.tenants[one.slot] = one, other
        one.slot, other.slot = other.slot, one.slot

    def replace(self, tenant: Tenant, heir: Tenant, tokens: int) -> None:
        """Let another row have this place with the first tokens that are in it."""
        heir.pool, heir.slot, heir.length = self, tenant.slot, tokens
        self.tenants[tenant.slot] = heir
        tenant.pool = None

    def leave(self, tenant: Tenant) -> None:
        """Free a row; the last of its kind takes its place."""
        hole = tenant.slot
        if hole < self.ready:
            self.ready -= 1
            self._move(self.ready, hole)
            hole = self.ready
        self._move(len(self.tenants) - 1, hole)
        self.tenants.pop()
        tenant.pool = None

    def _move(self, source: int, target: int) -> None:
        if source == target:
            return
        tenant = self.tenants[source]
        self._copy(self.storage, source, target, tenant.length)
        tenant.slot = target
        self.tenants[target] = tenant


class Cache:
    """All pools together, and the promise never to hold more than the budget, nor while storage moves."""

    def __init__(self, shape: Shape, *, rows: int, budget: int | None = None) -> None:
        self.shape, self.max_rows = shape, rows
        self.pools: dict[int, Pool] = {}
        self.budget = half_of_free_memory(shape.device) if budget is None else budget
        self.places = self.budget // shape.bytes_per_token

    @staticmethod
    def capacity_for(length: int) -> int:
        """The capacity of the rows in which a sequence of this length is kept."""
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
        return sum(pool.rows * pool.capacity for pool in self.pools.values())

    def place(self, tenant: Tenant, length: int) -> bool:
        """Give a row of this length a place, or say that it must wait."""
        capacity = self.capacity_for(length)
        pool = self.pools.get(capacity) or Pool(self.shape, capacity)
        if len(pool.tenants) == pool.rows:
            rows = self._affordable(pool)
            if rows <= pool.rows:
                self._reclaim()
                rows = self._affordable(pool)
            if rows <= pool.rows:
                return False
            pool.resize(rows)
        self.pools[capacity] = pool
        pool.enter(tenant)
        return True

    def _affordable(self, pool: Pool) -> int:
        """How many rows a full pool may have: the old storage stays until the new one holds its rows."""
        return min(max(4, 2 * pool.rows), self.max_rows, (self.places - self.reserved) // pool.capacity)

    def _reclaim(self) -> None:
        """Take back storage no row is in, where what is left finds room beside it."""
        for capacity, pool in list(self.pools.items()):
            if not pool.tenants:
                del self.pools[capacity]
        for capacity, pool in self.pools.items():
            if len(pool.tenants) < pool.rows and len(pool.tenants) * capacity <= self.places - self.reserved:
                pool.resize(len(pool.tenants))


def half_of_free_memory(device: torch.device) -> int:
    """Half of what is free now, in bytes."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.free_memory()
    return free // 2
