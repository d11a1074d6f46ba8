"""Where shards are worked on: in this process, in several, or on the machines of a Ray cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, Literal

from trivium.kit.errors import TriviumError

Engine = Literal["local", "ray"]


class Workers:
    """Calls a function for many tasks and gives the results in the order of the tasks."""

    def __init__(self, engine: Engine, workers: int) -> None:
        self._engine = engine
        self._count = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self._engine == "local" and self._count > 1:
            self._pool = ProcessPoolExecutor(self._count, mp_context=get_context("spawn"))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of `function(*task)`; only some tasks wait at a time."""
        if self._engine == "ray":
            yield from _on_ray(function, tasks)
        elif self._pool is None:
            for task in tasks:
                yield function(*task)
        else:
            yield from _in_processes(self._pool, function, tasks, self._count + 1)


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
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise TriviumError("`engine: ray` needs Ray: pip install 'trivium[ray]'.") from error


def _on_ray(function: Callable[..., Any], tasks: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    remote = ray.remote(function)
    window = max(2, 2 * int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    for task in tasks:
        waiting.append(remote.remote(*task))
        if len(waiting) >= window:
            yield _result(ray.get, waiting.popleft())
    while waiting:
        yield _result(ray.get, waiting.popleft())


def _result(get: Callable[[Any], Any], waiting: Any) -> Any:
    try:
        return get(waiting)
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, TriviumError):
            raise cause from None
        raise
