"""Where the work on shards is done: in this process, in several, or by Ray Data on the machines of a cluster.

There are two kinds of work: a function of every shard, and a function of all rows whose keys are equal,
wherever they stand. What comes back is the same for every engine, but for its order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import accumulate, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trivium.curate.keys import load
from trivium.kit.errors import TriviumError, needing

Engine = Literal["local", "ray"]
Grouping = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From keys [rows, numbers of a key] and their places in the corpus, rising [rows], to numbers [pairs, 2]."""
_ROWS_AT_ONCE = 1 << 24


class Workers:
    """Calls functions for many tasks, and for the rows that share a key."""

    def __init__(self, engine: Engine, workers: int) -> None:
        self._engine = engine
        self._count = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._engine == "ray":
            _start_ray()
        elif self._count > 1:
            self._pool = ProcessPoolExecutor(self._count, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def columns_at_once(self, count: int) -> list[list[int]]:
        """So many columns of keys in the groups that are best looked at together.

        On a cluster every grouping takes seconds to begin; here one column after the other takes less memory.
        """
        return [list(range(count))] if self._engine == "ray" else [[column] for column in range(count)]

    def results(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of `function(*task)` in any order; only some tasks wait at a time."""
        if self._engine == "ray":
            yield from _on_ray(function, tasks)
        elif self._pool is None:
            for task in tasks:
                yield function(*task)
        else:
            yield from _in_processes(self._pool, function, tasks, self._count + 1)

    def grouped(
        self, shards: Sequence[Path], name: str, function: Grouping, columns: Sequence[int] = ()
    ) -> np.ndarray:
        """What `function` says of the keys `name` of all shards, [pairs, 2] of uint64; equal keys meet.

        The keys are given to it part by part, so that no machine has to hold them all. With `columns`, each
        of these is a key of its own.
        """
        sizes = [len(load(shard, name)) for shard in shards]
        starts = [0, *accumulate(sizes)]
        parts = max(1, -(-starts[-1] * max(1, len(columns)) // _ROWS_AT_ONCE))
        read = [partial(_keys_of, shard, name, columns, start) for shard, start in zip(shards, starts)]
        if self._engine == "ray":
            return _grouped_on_ray(read, function, parts)
        found = []
        for part in range(parts):
            keys, places = zip(*(one(parts, part) for one in read), strict=True)
            found.append(function(np.concatenate(keys), np.concatenate(places)).astype(np.uint64))
        return np.concatenate(found)


def _keys_of(
    shard: Path, name: str, columns: Sequence[int], start: int, parts: int = 1, part: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A part of a shard's keys, [rows, numbers of a key], and their places in the corpus, [rows]."""
    keys = load(shard, name)
    places = start + np.arange(len(keys))
    if columns:
        keys, places = keys[:, list(columns)].reshape(-1), np.repeat(places, len(columns))
    keys = keys[:, None] if keys.ndim == 1 else keys
    mine = slice(None) if parts == 1 else keys[:, 0] % np.uint64(parts) == part
    return keys[mine], places[mine]


def _in_processes(
    pool: ProcessPoolExecutor, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], most: int
) -> Iterator[Any]:
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, *task))
            if len(waiting) >= most:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TriviumError(
            "A process that curates died, most likely for want of memory; use fewer `workers`. Run the same "
            "command again to go on from the last whole shard."
        ) from error


def check(engine: Engine) -> None:
    """Refuse an engine that is not installed."""
    if engine == "ray":
        with needing("`engine: ray` needs Ray: pip install 'trivium[ray]'."):
            import ray  # noqa: F401


def _start_ray() -> None:
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="warning")
    ray.data.DataContext.get_current().enable_progress_bars = False


def _on_ray(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """One block of a data set for each task; tasks are made as the ones before are done."""
    import ray

    window = max(8, 4 * int(ray.cluster_resources().get("CPU", 1)))
    tasks = iter(tasks)
    while waiting := [ray.put(task) for task in islice(tasks, window)]:
        numbers = ray.data.range(len(waiting), override_num_blocks=len(waiting))
        done = numbers.map_batches(_call, batch_size=1, fn_args=(function, waiting))
        for row in done.iter_rows():
            if row["error"]:
                raise TriviumError(row["error"])
            yield row["result"]


def _call(batch: dict[str, np.ndarray], function: Callable[..., Any], tasks: Sequence[Any]) -> dict[str, Any]:
    """One task in a process of Ray's; what a person can cause comes back as a sentence."""
    import ray

    try:
        return {"result": [function(*ray.get(tasks[int(batch["id"][0])]))], "error": [""]}
    except TriviumError as error:
        return {"result": [0], "error": [str(error)]}


def _grouped_on_ray(
    read: Sequence[Callable[[], tuple[np.ndarray, np.ndarray]]], function: Grouping, parts: int
) -> np.ndarray:
    """Every shard's keys are shuffled to the part that their first number falls in, and grouped there."""
    import ray

    # At least as many parts as can be worked on at once.
    parts = max(parts, int(ray.cluster_resources().get("CPU", 1)))

    def keyed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        keys, places = read[int(batch["id"][0])]()
        numbers = {f"key{number}": keys[:, number].copy() for number in range(keys.shape[1])}
        return {"part": (keys[:, 0] % np.uint64(parts)).astype(np.int64), "place": places, **numbers}

    def together(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        order = np.argsort(batch["place"])
        keys = np.stack([batch[name] for name in sorted(batch) if name.startswith("key")], axis=1)
        one, other = function(keys[order], batch["place"][order]).astype(np.uint64).T
        return {"one": one, "other": other}

    shards = ray.data.range(len(read), override_num_blocks=len(read)).map_batches(keyed, batch_size=1)
    groups = shards.groupby("part", num_partitions=parts).map_groups(together, batch_format="numpy")
    batches = groups.iter_batches(batch_size=None, batch_format="numpy")
    pairs = [np.stack([one["one"], one["other"]], axis=1) for one in batches]
    return np.concatenate([np.empty((0, 2), np.uint64), *pairs])
