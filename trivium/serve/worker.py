"""What serves one model: its engine on the thread that computes, and the bridge to the event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from trivium.generate.constraints import Grammars
from trivium.generate.engine import Engine
from trivium.generate.requests import Event, Listener, Request, RequestHandle
from trivium.kit.errors import TriviumError
from trivium.serve.engine_thread import EngineThread
from trivium.serve.failures import RequestRefused
from trivium.serve.measures import Measures
from trivium.serve.pieces import Piece, Scored

Result = TypeVar("Result")
log = logging.getLogger("trivium.serve")

# Waking the event loop for every token would cost the engine more than the tokens do.
FLUSH_SECONDS = 0.06
# Texts that are only read, between two looks at what else clients want.
READ_AT_ONCE = 8


class Generation:
    """One client's requests inside the engine, seen from the event loop."""

    def __init__(self, worker: Worker, samples: int) -> None:
        self._worker, self.samples = worker, samples
        self._pending: deque[Piece] = deque()
        self._ready = asyncio.Event()
        self._failure: Exception | None = None
        self._unfinished = samples
        self.handles: list[RequestHandle] = []
        self.began = time.perf_counter()
        self.first: float | None = None
        self.closed = False
        self.holds_places = True

    async def pieces(self) -> AsyncGenerator[list[Piece]]:
        """The text as it comes, all that arrived since the last look at once."""
        unfinished = self.samples
        while unfinished:
            await self._ready.wait()
            self._ready.clear()
            batch = []
            while self._pending:
                batch.append(self._pending.popleft())
            if batch:
                unfinished -= sum(piece.finish is not None for piece in batch)
                yield batch
            if self._failure is not None:
                raise self._failure

    def put(self, piece: Piece) -> bool:
        """Take a piece over on the engine's thread; true when it cannot wait for the next flush."""
        self._pending.append(piece)
        urgent = self.first is None or piece.finish is not None
        if self.first is None:
            self.first = time.perf_counter()
        if piece.finish is not None:
            self._unfinished -= 1
        return urgent

    @property
    def complete(self) -> bool:
        """Whether the engine has nothing left to do for it."""
        return self._unfinished == 0

    @property
    def failed(self) -> bool:
        """Whether no more pieces will come because something failed."""
        return self._failure is not None

    def fail(self, error: Exception) -> None:
        """Note on the engine's thread why no more pieces will come."""
        self._failure, self._unfinished = error, 0

    def wake(self) -> None:
        """Let the event loop look."""
        self._ready.set()

    def close(self) -> None:
        """The client is done with it, answered or not: its rows become free."""
        if not self.closed:
            self.closed = True
            self._worker.release(self)


class Worker:
    """A model and its engine, which only the thread that computes may touch."""

    def __init__(
        self, name: str, engine: Engine, thread: EngineThread, *, queued: int, measures: Measures
    ) -> None:
        self.name, self.tokenizer = name, engine.tokenizer
        self.sampling_defaults = dict(getattr(engine, "sampling_defaults", {}))
        self.context, self.width = engine.model.config.context, engine.model.config.width
        self.grammars: Grammars = engine.grammars
        self.parameters = sum(parameter.numel() for parameter in engine.model.parameters())
        self._engine, self._thread, self._measures = engine, thread, measures
        self._most = engine.max_rows + queued
        self._read_at_once = min(READ_AT_ONCE, engine.max_rows)
        # Searches draw many answers to one request: half of the rows stay to the other requests.
        self.search_rows = asyncio.Semaphore(max(1, engine.max_rows // 2))
        self._inside = 0
        self._seconds = 1.0  # how long a generation lately took
        self._lock = threading.Lock()
        self._live: set[Generation] = set()
        self._touched: dict[Generation, None] = {}
        self._urgent, self._flushed = False, 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        measures.watch("trivium_samples_inside", "gauge", lambda: self._inside, model=name)
        measures.watch("trivium_rows", "gauge", lambda: engine.max_rows, model=name)
        measures.watch("trivium_cache_bytes", "gauge", lambda: engine.cache.reserved_bytes, model=name)
        promise = engine.exactness.promise
        measures.watch("trivium_promise", "gauge", lambda: 1, model=name, promise=promise)
        written, reused = (
            partial(engine.counts.__getitem__, f"{one}_tokens") for one in ("generated", "copied")
        )
        measures.watch("trivium_generated_tokens_total", "counter", written, model=name)
        measures.watch("trivium_reused_prompt_tokens_total", "counter", reused, model=name)
        if engine.drafts:
            for one, kind in (("drafted", "drafted"), ("accepted", "accepted_draft")):
                read = partial(engine.counts.__getitem__, f"{one}_tokens")
                measures.watch(f"trivium_{kind}_tokens_total", "counter", read, model=name)
            measures.watch("trivium_draft_acceptance", "gauge", lambda: engine.acceptance, model=name)
            measures.watch("trivium_drafting", "gauge", lambda: engine.drafting, model=name)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve the event loop."""
        self._loop = loop
        self._thread.take_turns(self._turn)

    def stop(self) -> None:
        """End the thread that computes, after what it is doing now."""
        self._thread.stop()

    @property
    def alive(self) -> bool:
        """Whether the thread that computes runs."""
        return self._thread.alive

    @property
    def inside(self) -> int:
        """How many samples hold or wait for a row."""
        return self._inside

    async def submit(self, requests: Sequence[Request]) -> Generation:
        """Hand requests to the engine, or refuse when too many wait already."""
        samples = sum(request.n for request in requests)
        self._take_in(samples)
        generation = Generation(self, samples)
        try:
            await self.call(lambda: self._enter(generation, requests))
        except BaseException:
            generation.close()
            raise
        self._count_prompts([request.prompt for request in requests])
        return generation

    def _take_in(self, samples: int) -> None:
        """Count samples among those inside, or refuse them."""
        if samples > self._most:
            problem = f"{samples} samples are asked for at once, {self.name} holds at most {self._most}"
            raise RequestRefused(problem, code="array_above_max_length")
        with self._lock:
            inside = self._inside
            if inside + samples <= self._most:
                self._inside += samples
                return
        wait = min(60, max(1, math.ceil(self._seconds)))
        problem = f"{self.name} is busy: {inside} samples are being served, at most {self._most} are"
        raise RequestRefused(problem, status=429, code="rate_limit_exceeded", retry_after=wait)

    def _let_out(self, samples: int) -> None:
        with self._lock:
            self._inside -= samples

    def _count_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        tokens = sum(len(prompt) for prompt in prompts)
        self._measures.count("trivium_prompt_tokens_total", tokens, model=self.name)

    @contextmanager
    def _reading(self, prompts: Sequence[Sequence[int]]) -> Iterator[list[Sequence[Sequence[int]]]]:
        """Texts that are only read, a few at a time, each of which holds one of the places inside."""
        most = self._read_at_once
        places = min(len(prompts), most)
        self._take_in(places)
        try:
            yield [prompts[start : start + most] for start in range(0, len(prompts), most)]
        except BaseException:
            # on the engine's thread, which may still read for a client that has left
            self._thread.tell(lambda: self._let_out(places))
            raise
        self._let_out(places)
        self._count_prompts(prompts)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """The mean of the last hidden states over each prompt, a few prompts between two steps."""
        vectors: list[np.ndarray] = []
        with self._reading(prompts) as parts:
            for some in parts:
                vectors += list(await self.call(partial(self._mean_states, some)))
        return vectors

    def _mean_states(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        return self._engine.embed(prompts).float().cpu().numpy()

    async def score(
        self, prompts: Sequence[Sequence[int]], top: int, adapter: str | None = None
    ) -> list[tuple[Scored, ...]]:
        """How likely the model finds each prompt's own tokens, a few prompts between two steps."""
        found: list[tuple[Scored, ...]] = []
        with self._reading(prompts) as parts:
            for some in parts:
                scoring = partial(
                    self._engine.score, [()] * len(some), some, top=max(top, 1), adapter=adapter
                )
                scores = await self.call(scoring)
                for prompt, (logprobs, favourites) in zip(some, scores, strict=True):
                    rest = zip(prompt[1:], logprobs, favourites, strict=True)
                    scored = (Scored(token, value, tuple(best.items())) for token, value, best in rest)
                    found.append((Scored(prompt[0], None), *scored))
        return found

    def release(self, generation: Generation) -> None:
        """Free what a generation holds; called from the event loop, done on the engine's thread."""
        self._thread.tell(lambda: self._leave(generation))

    # Below: on the engine's thread, except where a lock says otherwise.

    async def call(self, function: Callable[[], Result]) -> Result:
        """What a function returns that computes, run on the engine's thread between two steps."""
        assert self._loop is not None, "the worker was started"
        loop = self._loop
        future: asyncio.Future[Result] = loop.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def command() -> None:
            try:
                result, error = function(), None
            except Exception as problem:
                result, error = None, problem
            loop.call_soon_threadsafe(settle, result, error)

        self._thread.tell(command)
        return await future

    def _enter(self, generation: Generation, requests: Sequence[Request]) -> None:
        if generation.closed:
            return
        self._live.add(generation)
        first = 0
        for request in requests:
            generation.handles.append(self._engine.submit(request, self._listener(generation, first)))
            first += request.n

    def _listener(self, generation: Generation, first: int) -> Listener:
        waiting: dict[int, list[Scored]] = {}

        def take(event: Event) -> None:
            if generation.failed:
                return  # another of its prompts did; this one is cancelled when the client has been told
            if event.failure is not None:
                self._fail(generation, event.failure)
                return
            scored = self._settled(event, waiting)
            if event.completion is not None:
                piece = Piece(first + event.sample, event.text, 0, scored, event.completion.finish_reason)
            else:
                piece = Piece(first + event.sample, event.text, 1, scored)
            self._urgent |= generation.put(piece)
            self._touched[generation] = None
            if generation.complete:
                self._free_places(generation)

        return take

    def _fail(self, generation: Generation, error: Exception) -> None:
        """Tell the client why no more will come: in the error's own words where they are meant for people."""
        if not isinstance(error, TriviumError):
            log.error("a request to %s failed", self.name, exc_info=error)
        problem = f"{self.name} failed on this request: {type(error).__name__}"
        generation.fail(error if isinstance(error, TriviumError) else RequestRefused(problem, status=500))
        self._urgent = True
        self._touched[generation] = None
        self._free_places(generation)

    def _free_places(self, generation: Generation) -> None:
        """Let others in as soon as the engine is done, however slowly the client reads."""
        if not generation.holds_places:
            return
        generation.holds_places = False
        self._let_out(generation.samples)
        seconds = time.perf_counter() - generation.began
        self._seconds += 0.2 * (seconds - self._seconds)
        self._measures.observe("trivium_generation_seconds", seconds, model=self.name)

    def _settled(self, event: Event, waiting: dict[int, list[Scored]]) -> tuple[Scored, ...]:
        """The scored tokens whose text is now told; those of a stop text, or that end a text, never are."""
        if event.alternatives is None and not waiting:
            return ()
        held = waiting.setdefault(event.sample, [])
        if event.alternatives is not None and not event.ends:
            alternatives = tuple(event.alternatives.items())
            held.append(Scored(event.token, event.alternatives[event.token], alternatives))
        count = max(0, len(held) - event.unsettled)
        settled, waiting[event.sample] = tuple(held[:count]), held[count:]
        return settled

    def _leave(self, generation: Generation) -> None:
        ending = "failed" if generation.failed else "complete" if generation.complete else "cancelled"
        for handle in generation.handles:
            if not handle.done:
                self._engine.cancel(handle)
        generation.handles.clear()
        self._live.discard(generation)
        self._touched.pop(generation, None)
        self._free_places(generation)
        self._measures.count("trivium_generations_total", model=self.name, ending=ending)
        if generation.first is not None:
            to_first = generation.first - generation.began
            self._measures.observe("trivium_first_token_seconds", to_first, model=self.name)

    def _turn(self) -> bool:
        """Move every row on by one token; false when nothing is left to do."""
        busy = self._engine.busy
        try:
            busy = busy and self._engine.step()
        except Exception as error:
            # the engine lets a row that fails go alone; what comes here concerns all of them
            self._fail_all(error)
            busy = False
        self._flush(idle=not busy)
        return busy

    def _fail_all(self, error: Exception) -> None:
        for generation in list(self._live):
            for handle in generation.handles:
                self._engine.cancel(handle)
            generation.handles.clear()
            if not generation.failed:
                self._fail(generation, error)

    def _flush(self, *, idle: bool) -> None:
        now = time.perf_counter()
        if not self._touched or not (idle or self._urgent or now - self._flushed > FLUSH_SECONDS):
            return
        touched = list(self._touched)
        self._touched.clear()
        self._urgent, self._flushed = False, now
        assert self._loop is not None, "the worker was started"
        try:
            self._loop.call_soon_threadsafe(_wake, touched)
        except RuntimeError:
            log.info("the event loop of %s is closed", self.name)


class Adapted:
    """A worker's model under one of its adapters, served under a name of its own: `base:adapter`."""

    def __init__(self, worker: Worker, adapter: str) -> None:
        self._worker, self._adapter = worker, adapter
        self.name = f"{worker.name}:{adapter}"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """The worker is started on its own."""

    def stop(self) -> None:
        """The worker is stopped on its own."""

    async def submit(self, requests: Sequence[Request]) -> Generation:
        """Hand requests to the engine, to be computed with the adapter."""
        return await self._worker.submit([replace(one, adapter=self._adapter) for one in requests])

    async def score(self, prompts: Sequence[Sequence[int]], top: int) -> list[tuple[Scored, ...]]:
        """How likely the model finds each prompt's own tokens under the adapter."""
        return await self._worker.score(prompts, top, self._adapter)

    async def embed(self, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Refused: texts are embedded by whole models."""
        problem = f"{self.name} is an adapter, which embeds nothing; ask {self._worker.name}"
        raise RequestRefused(problem, parameter="model")


def _wake(generations: list[Generation]) -> None:
    for generation in generations:
        generation.wake()
