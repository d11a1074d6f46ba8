"""Prompts that have been read stay cached for a while: who asks on does not wait until all is read again."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.generate.cache import Cache
from trivium.generate.rows import Row


class Kept:
    """Finished rows whose prompts are still cached, the oldest first."""

    def __init__(self, cache: Cache, most: int) -> None:
        self.rows: list[Row] = []
        self._cache, self._most = cache, most

    def keep(self, rows: Sequence[Row]) -> None:
        """Let rows that finish together hold their prompts, as many as are kept; the others leave."""
        # From the last place of a pool to the first, those to be kept at the end: so hardly any has to move.
        ordered = sorted(rows, key=lambda row: row.slot, reverse=True)
        for index, row in enumerate(ordered):
            pool, chosen = row.pool, index >= len(ordered) - self._most
            assert pool is not None
            if not chosen or row.slides or not row.goal or self._covered(row):
                pool.leave(row)
                continue
            # Only what was read as a prompt: what was drawn came out of other kernels, with other digits.
            pool.retire(row, row.goal)
            for other in [one for one in self.rows if _begins(row, one)]:
                self._free(other)
            self.rows.append(row)
        while len(self.rows) > self._most:
            self.give_up()

    def _covered(self, row: Row) -> bool:
        """Whether one that is kept holds all of a row's prompt; it then counts as the youngest."""
        for one in self.rows:
            if _begins(one, row):
                self.rows.remove(one)
                self.rows.append(one)
                return True
        return False

    def give_up(self) -> bool:
        """Free the place of the oldest; false where none is kept."""
        if self.rows:
            self._free(self.rows[0])
            return True
        return False

    def _free(self, row: Row) -> None:
        assert row.pool is not None
        row.pool.leave(row)
        self.rows.remove(row)

    def clear(self) -> None:
        """Free all places."""
        while self.give_up():
            pass

    def hand_over(self, row: Row, lender: Row, shared: int) -> bool:
        """Let a row move into the place of a kept one that begins like it, if it is as large."""
        pool = lender.pool
        if lender not in self.rows or pool is None:
            return False
        if self._cache.capacity_for(row.reserved) != pool.capacity:
            return False
        self.rows.remove(lender)
        pool.replace(lender, row, shared)
        row.filled = shared
        return True


def _begins(row: Row, other: Row) -> bool:
    """Whether a row's prompt begins with the other's, which then need not be kept as well."""
    return row.adapter == other.adapter and row.tokens[: other.goal] == other.tokens[: other.goal]
