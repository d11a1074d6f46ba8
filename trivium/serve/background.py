"""Work that would hold up the event loop, on threads of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")

# Preparing a prompt takes processor time, of which more threads would make no more.
PREPARING = 4
# A summary waits for the model most of the time, and whoever needs none must not wait for it.
WAITING = 32
# What others' servers take to send a picture holds up only those who ask for one.
FETCHING = 8


class Background:
    """Threads for work that computes, and for work that waits for a model or for other servers."""

    def __init__(self) -> None:
        self._preparing = ThreadPoolExecutor(PREPARING, "preparing")
        self._waiting = ThreadPoolExecutor(WAITING, "waiting")
        self._fetching = ThreadPoolExecutor(FETCHING, "fetching")

    async def compute(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """What the function returns, computed beside the event loop."""
        return await self._run(self._preparing, function, arguments)

    async def wait(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The same for a function that asks a model and waits for its answer."""
        return await self._run(self._waiting, function, arguments)

    async def fetch(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """The same for a function that asks other servers."""
        return await self._run(self._fetching, function, arguments)

    async def _run(
        self, pool: ThreadPoolExecutor, function: Callable[..., Result], arguments: tuple[Any, ...]
    ) -> Result:
        call = partial(_without_stop_iteration, function, *arguments)
        return await asyncio.get_running_loop().run_in_executor(pool, call)

    def stop(self) -> None:
        """Begin nothing more."""
        for pool in (self._preparing, self._waiting, self._fetching):
            pool.shutdown(wait=False, cancel_futures=True)


def _without_stop_iteration(function: Callable[..., Result], *arguments: Any) -> Result:
    """A StopIteration cannot be set on an asyncio future: whoever waits for it would wait for ever."""
    try:
        return function(*arguments)
    except StopIteration as error:
        raise RuntimeError("a StopIteration came out of a thread") from error
