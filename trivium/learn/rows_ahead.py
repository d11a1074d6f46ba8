"""The rows of the next step, made by a thread while the step under way computes."""

import time
from concurrent.futures import Future, ThreadPoolExecutor

from trivium.data.rows import PackedSequence
from trivium.learn.objective import BatchSource


class RowsAhead:
    """Hands out a source's rows, and has those of the step after made meanwhile.

    Only a source that says so (`ahead`) is asked early: its rows follow from the step alone, so neither the
    order nor the state to resume from knows of the thread. Rollouts wait for the newest weights.
    """

    def __init__(self, source: BatchSource) -> None:
        self.source = source
        self.waited = 0.0
        """Seconds for which the last step waited for its rows."""
        self._pool = ThreadPoolExecutor(1, "rows") if getattr(source, "ahead", False) else None
        self._next: tuple[int, Future[list[PackedSequence]]] | None = None

    def rows(self, step: int) -> list[PackedSequence]:
        """The rows of a step; from now on those of the next one are made."""
        start = time.perf_counter()
        expected, made = self._next or (None, None)
        early = None if made is None else made.result()
        rows = self.source.rows(step) if early is None or expected != step else early
        self.waited = time.perf_counter() - start
        self._next = None
        if self._pool is not None and step + 1 < self.source.steps:
            self._next = step + 1, self._pool.submit(self.source.rows, step + 1)
        return rows

    def settle(self) -> None:
        """Wait until nothing is being made, so that the source can be asked something else."""
        if self._next is not None:
            self._next[1].exception()
