"""The engine: requests of any length enter and leave a running batch at every step."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trivium.generate.attending import StepContext
from trivium.generate.cache import BLOCK, Cache, Pool, Shape, in_blocks
from trivium.generate.constraints import Grammars
from trivium.generate.exactness import Exactness
from trivium.generate.keeping import Kept
from trivium.generate.passes import Modules, passes_of
from trivium.generate.reading import Reader, forget_oldest
from trivium.generate.requests import Completion, Event, FinishReason, Generation, Listener, Request
from trivium.generate.rows import Row, Scored, shared_beginning
from trivium.generate.sampler import Chosen, Entrant, Sampler
from trivium.generate.sampling import seed_of_sample
from trivium.generate.weights import Followed
from trivium.kit.errors import TriviumError
from trivium.model.lora import adapter_names, mixing, selection_of
from trivium.model.transformer import Transformer

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer


class Engine:
    """Generates, scores and embeds with one model; `step` moves every row on by one token."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 32,
        memory_budget: int | None = None,
        keep_prompts: int = 0,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """With `keep_prompts` so many finished prompts stay cached; only for weights that do not change.

        `dtype` is what it computes and caches in; without one it is what `weights.engine_dtype` says.
        """
        if max_rows < 1:
            raise TriviumError(f"max_rows must be at least 1, not {max_rows}.")
        self._followed = Followed(model, dtype)
        self.source, self.model = model, self._followed.model
        self.tokenizer, self.max_rows = tokenizer, max_rows
        config = model.config
        self.vocabulary, self.window = config.vocabulary, config.context
        shape = Shape.of(config, self._followed.dtype, model.device)
        self.cache = Cache(shape, rows=max_rows, budget=memory_budget)
        self._kept = Kept(self.cache, keep_prompts)
        self.sampler = Sampler(config.vocabulary, model.device)
        self.grammars = Grammars(tokenizer, config.vocabulary)
        self.counts = {"prompt_tokens": 0, "borrowed_tokens": 0, "generated_tokens": 0, "steps": 0}
        self._passes = passes_of(self.model, max_rows)
        self._selection = selection_of(self.model)
        self._reader = Reader(self.model, self._passes, self.cache, self.counts)
        # Whoever trains may be in the middle of a pass; the engine computes in the type it has chosen.
        self._plain = torch.autocast(model.device.type, enabled=False)
        self._endless = config.positions == "rope" and config.rope.get("rope_type") == "dynamic"
        self._windows = {config.window(layer) for layer in range(config.layers)}
        self._lone = config.heads == config.key_value_heads
        self._random = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._waiting: deque[Row] = deque()
        self._writing: list[Row] = []
        self._under_way: weakref.WeakSet[Generation] = weakref.WeakSet()
        self._watched: list[tuple[int, Row]] = []
        self._context: StepContext | None = None
        self._steps_to_slide = 0
        self._cancelled: deque[Generation] = deque()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Answer all requests; the completions of each in the order of its samples."""
        under_way: list[Generation] = []
        try:
            for request in requests:
                under_way.append(self.submit(request))
            while not all(one.done for one in under_way):
                self.step()
                for one in under_way:
                    if one.failure is not None:
                        raise one.failure
        except BaseException:
            # the next request must not wait for rows of this one
            for one in under_way:
                self.cancel(one)
            raise
        return [one.completions for one in under_way]

    def score(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """The log-probability of every token of each completion after its prompt; shared beginnings run once.

        An empty prompt scores the completion's tokens from the second on.
        """
        texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        results = [Scored(max(len(prompt), 1)) for prompt in prompts]
        self._read_texts(texts, results)
        return [one.logprobs for one in results]

    def weigh(
        self, texts: Sequence[Sequence[int]], top: int, adapter: str | None = None
    ) -> list[tuple[list[float], list[dict[int, float]]]]:
        """The log-probabilities of each text's tokens from the second on, and the `top` likeliest there."""
        if adapter is not None:
            self._check_adapter(adapter)
        results = [Scored(1, max(top, 1), adapter) for _ in texts]
        self._read_texts([list(text) for text in texts], results)
        return [(one.logprobs, one.favourites) for one in results]

    def _read_texts(self, texts: Sequence[list[int]], results: Sequence[Scored]) -> None:
        for text in texts:
            self._check(text, len(text))
        rows = []
        for text, scored in zip(texts, results, strict=True):
            if len(text) > scored.first:
                rows.append(Row(text, goal=len(text) - 1, reserved=len(text), scored=scored))
            else:
                scored.done = True
        self._read_rows(rows)

    def _read_rows(self, rows: Sequence[Row]) -> None:
        """Read texts to their ends; where one fails, or the caller is interrupted, all of them leave."""
        results = [row.scored for row in rows if row.scored is not None]
        with self._lock:
            self._waiting.extend(rows)
        try:
            while not all(one.done for one in results):
                self.step()
                for one in results:
                    if one.failure is not None:
                        raise one.failure
        except BaseException:
            mine = {id(row) for row in rows}
            with self._lock:
                self._waiting = deque(row for row in self._waiting if id(row) not in mine)
            self._reader.take(lambda row: id(row) in mine)
            raise

    def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The mean of each prompt's last hidden states, [N, width]."""
        for prompt in prompts:
            self._check(prompt, len(prompt))
        results = [Scored(len(prompt)) for prompt in prompts]
        self._read_rows(
            [
                Row(list(prompt), len(prompt), len(prompt), scored=scored, pooled=True)
                for prompt, scored in zip(prompts, results, strict=True)
            ]
        )
        means = [one.total / one.first for one in results if one.total is not None]
        return torch.stack(means).clone()

    def submit(self, request: Request, on_token: Listener | None = None) -> Generation:
        """Put a request in line; `on_token` hears of every token."""
        sampling, prompt = request.sampling, list(request.prompt)
        reserved = len(prompt) + sampling.max_new_tokens
        if request.slide is not None:
            reserved = self._check_slide(request, reserved)
        self._check(prompt, reserved)
        if request.n < 1:
            raise TriviumError(f"the request asks for n = {request.n} samples: ask for at least 1.")
        if request.adapter is not None:
            self._check_adapter(request.adapter)
        self._check_ids("logit_bias", sampling.logit_bias)
        # those of the tokenizer among them count, for a request may repeat them: what they lack ends nothing
        own = self.tokenizer.stop_ids
        self._check_ids("stop_ids", [one for one in sampling.stop_ids or () if one not in own])
        constraint = request.constraint or self.grammars.constraint(sampling)
        generation = Generation(request, on_token)
        ends = sampling.stop_ids if sampling.stop_ids is not None else tuple(sorted(self.tokenizer.stop_ids))
        self._under_way.add(generation)
        with self._lock:
            seed = int(self._random.integers(2**63)) if sampling.seed is None else sampling.seed
            for sample in range(request.n):
                entrant = Entrant(
                    sampling,
                    seed_of_sample(seed, sample),
                    prompt,
                    ends,
                    constraint.fork() if constraint is not None else None,
                )
                row = Row(
                    prompt, len(prompt) - 1, reserved, generation=generation, sample=sample, entrant=entrant
                )
                row.listen(self.tokenizer)
                self._waiting.append(row)
        return generation

    def cancel(self, generation: Generation) -> None:
        """End a request at the next step; its rows are freed and what it has drawn is kept."""
        self._cancelled.append(generation)

    @property
    def exactness(self) -> Exactness:
        """What this machine's kernels were found to do with the model's shapes, and so what is promised."""
        return self._passes.exactness

    @property
    def busy(self) -> bool:
        """Whether anything is under way or in line."""
        return bool(self._waiting or self._reader.rows or self._writing or self._cancelled)

    @property
    def rows_in_use(self) -> int:
        """How many rows of the cache are occupied."""
        return len(self._reader.rows) + len(self._writing)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Take over weights that were changed outside an optimiser's step."""
        self._kept.clear()
        self._followed.refresh()
        self._passes.refresh()

    @torch.inference_mode()
    def step(self) -> bool:
        """Read a chunk of prompts and write one token of every row; false when nothing is left to do.

        A row that makes this fail is found and fails alone; the others go on as if it had never been there.
        """
        complete = False
        try:
            with self._plain:
                self._step()
            complete = True
        finally:
            if not complete:
                self._abandon()
        return self.busy

    def _step(self) -> None:
        if not self.rows_in_use:
            self._followed.refresh_if_changed()
            self._passes.refresh_if_changed()
        while self._cancelled:
            self._cancel(self._cancelled.popleft())
        self._admit()
        if self._reader.rows:
            self._read()
        if any(pool.ready for pool in self.cache.pools.values()):
            self._write()

    def _abandon(self) -> None:
        """Drop all that is under way: a step that was cut off, as by Ctrl-C, may have left it half done."""
        dropped = [*self._waiting, *self._reader.rows]
        self._waiting.clear()
        self._reader.rows, self._writing, self._watched, self._context = [], [], [], None
        self._kept.rows.clear()
        self.cache.pools.clear()
        self.sampler = Sampler(self.vocabulary, self.model.device)
        problem = TriviumError("the engine was interrupted in the middle of a step: ask again.")
        for row in dropped:
            if row.scored is not None:
                row.scored.failure, row.scored.done = problem, True
        for generation in list(self._under_way):
            if not generation.done:
                generation.failure = problem

    def _check(self, prompt: Sequence[int], reserved: int) -> None:
        if not prompt:
            raise TriviumError("the prompt is empty: give at least one token, such as the end-of-text token.")
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            raise TriviumError(f"the prompt has a token outside the model's vocabulary of {self.vocabulary}.")
        if reserved > self.window and not self._endless:
            raise TriviumError(
                f"the request needs {reserved} positions ({len(prompt)} in the prompt) and the model's "
                f"window is {self.window}: shorten the prompt or ask for fewer new tokens."
            )
        self.cache.check(reserved)

    def _check_ids(self, name: str, ids: Iterable[int]) -> None:
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise TriviumError(
                f"sampling: {name} names token {wrong}; ids go from 0 to {self.vocabulary - 1}."
            )

    def _check_adapter(self, name: str) -> None:
        if name not in (known := adapter_names(self.source)):
            there = ", ".join(known) or "none"
            raise TriviumError(f"the engine's model has no adapter {name!r}; there is {there}.")
        merged = self._followed.copied or not isinstance(self._passes, Modules)
        selection = selection_of(self.source)
        if merged and selection and selection.active != name:
            raise TriviumError(f"adapter {name!r} is switched off; make it act, then ask again.")
        if self.model.config.experts is not None:
            raise TriviumError(
                "adapters of a mixture of experts are not mixed in a batch: use merged models."
            )

    def _check_slide(self, request: Request, reserved: int) -> int:
        slide = request.slide
        assert slide is not None
        learned = self.model.position_embedding is not None
        if isinstance(self._passes, Modules) or learned or self._reader.stretches:
            raise TriviumError(
                "this model's positions cannot slide: choose another way to fit the conversation."
            )
        window = slide.places(self.window)
        if window < 4 * BLOCK or not 0 <= slide.sinks <= window // 2:
            raise TriviumError(
                f"slide: a window of {window} tokens with {slide.sinks} sinks is too small: "
                f"take at least {4 * BLOCK} tokens, of which at most half are sinks."
            )
        return min(window, in_blocks(reserved))

    def _admit(self) -> None:
        """Give places to those in line, in order; whoever has none holds the line."""
        while self._waiting and self.rows_in_use < self.max_rows:
            row = self._waiting[0]
            self._unsettle()
            try:
                if not self._give_place(row):
                    assert self.rows_in_use, "a request that was accepted must fit an empty cache"
                    return
            except Exception as error:
                self._fail({row: error})
                continue
            self._waiting.popleft()
            self._reader.rows.append(row)

    def _give_place(self, row: Row) -> bool:
        """A place in the cache, and whoever has read the same beginning; false if the row must wait."""
        if not row.pooled:
            others = self._reader.rows + self._writing + self._kept.rows
            stretches = self._reader.stretches
            row.lender, row.shared = shared_beginning(row, others, stretches=stretches)
        while not self.cache.place(row, row.reserved):
            # what is kept is copied where there is room: others may ask on from the same place
            if row.lender is not None and self._kept.hand_over(row, row.lender, row.shared):
                self.counts["borrowed_tokens"] += row.shared
                row.lender = None
                return True
            if not self._kept.give_up():
                return False
        return True

    def _read(self) -> None:
        failed: dict[Row, Exception] = {}
        try:
            complete = self._reader.read()
        except Exception:
            complete = []
            for row in list(self._reader.rows):
                try:
                    complete += self._reader.read([row])
                except Exception as error:
                    failed[row] = error
        for row in complete:
            assert row.pool is not None
            if row.scored is None:
                self._unsettle()
                if row.slides:
                    forget_oldest(row, self._passes)
                row.pool.promote(row)
                continue
            row.scored.done = True
            if self._waiting and self._reader.hand_over(row, self._waiting[0]):
                self._waiting.popleft()
            else:
                self._unsettle()
                row.pool.leave(row)
        self._fail(failed)

    def _write(self) -> None:
        drawn = self._draw_with_all_that_can()
        if drawn is None:
            return
        context, chosen = drawn
        failed: dict[Row, Exception] = {}
        ended: dict[Row, FinishReason] = self._hear(chosen, failed) if self._watched else {}
        if chosen.ended is not None and bool(chosen.ended.any()):
            for index in chosen.ended.nonzero()[:, 0].tolist():
                ended.setdefault(self._writing[index], self._reason(index))
        self._steps_to_slide -= 1
        if not ended and not failed and self._steps_to_slide != 0:
            context.advance()
            return
        self._unsettle()
        self._fail(failed)
        if ended:
            self._finish(ended)
        # one that is full slides also in the step in which another ends
        for row in self._writing:
            if row.slides:
                forget_oldest(row, self._passes)

    def _draw(self) -> tuple[StepContext, Chosen]:
        """One token of every row that generates; what raises leaves all rows as they were."""
        if self._context is None:
            self._context = self._settle_in()
        context = self._context
        with mixing(self._selection, [row.adapter for row in self._writing], [1] * context.tokens):
            logits = self._passes.step(self.sampler.last, context)
        chosen = self.sampler.choose(logits)
        context.stored += 1
        self.counts["steps"] += 1
        self.counts["generated_tokens"] += context.tokens
        return context, chosen

    def _draw_with_all_that_can(self) -> tuple[StepContext, Chosen] | None:
        """One token of every row but those that make this fail, which fail alone; None if that is all."""
        tried = False
        while rows := self._generating():
            try:
                return self._draw()
            except Exception as error:
                self._unsettle()
                guilty = {row: problem for row in rows if (problem := self._problem_of(row)) is not None}
                if not guilty and tried:
                    # only together do they fail, as where memory ends: the last to come goes first
                    guilty = {max(rows, key=lambda row: row.arrival): error}
                tried = True
                self._fail(guilty)
        return None

    def _problem_of(self, row: Row) -> Exception | None:
        """What a row raises when its next token is drawn without the others; the row stays as it is."""
        assert row.pool is not None
        assert row.entrant is not None
        sampler = self.sampler
        try:
            self.sampler = sampler.alone(self._writing.index(row) if row in self._writing else row.entrant)
            context = self._context_of([row.pool.alone(row)], [row])
            with mixing(self._selection, [row.adapter], [1]):
                self.sampler.choose(self._passes.step(self.sampler.last, context))
        except Exception as error:
            return error
        finally:
            self.sampler = sampler
        return None

    def _generating(self) -> list[Row]:
        """The rows that generate, in the order in which they lie in the cache."""
        pools = self.cache.pools.values()
        return [row for pool in pools for row in pool.tenants[: pool.ready] if isinstance(row, Row)]

    def _settle_in(self) -> StepContext:
        """Bring sampler and context into the order in which the rows now lie in the cache."""
        order = self._generating()
        if order != self._writing:
            known = {id(row): index for index, row in enumerate(self._writing)}
            kept = [row for row in order if id(row) in known]
            entrants = [row for row in order if id(row) not in known]
            self.sampler.rearrange(
                [known[id(row)] for row in kept], [row.entrant for row in entrants if row.entrant is not None]
            )
            now = {id(row): index for index, row in enumerate(kept + entrants)}
            if (arranged := [now[id(row)] for row in order]) != sorted(arranged):
                self.sampler.rearrange(arranged, [])
            self._writing = order
        self._watched = [(index, row) for index, row in enumerate(order) if row.watched]
        sliding = [row for row in order if row.slides]
        self._steps_to_slide = min((row.reserved_places() - row.length for row in sliding), default=0)
        return self._context_of(list(self.cache.pools.values()), order)

    def _context_of(self, pools: Sequence[Pool], rows: Sequence[Row]) -> StepContext:
        reserved: Tensor | int = 0
        if self._reader.stretches:
            reserved = torch.tensor([row.reserved for row in rows], device=self.model.device)
        return StepContext(
            pools, list(self._windows), reserved, lone=self._lone, together=self.exactness.steps
        )

    def _unsettle(self) -> None:
        """Write lengths back before rows move."""
        if self._context is not None:
            self._context.settle()
            self._context = None

    def _reason(self, index: int) -> FinishReason:
        stops = self.sampler.stops[index].tolist()
        return "stop" if int(self.sampler.last[index]) in stops else "length"

    def _hear(self, chosen: Chosen, failed: dict[Row, Exception]) -> dict[Row, FinishReason]:
        """Pass this step on to the rows that have a listener or that must look at every token."""
        ended: dict[Row, FinishReason] = {}
        tokens = chosen.tokens.tolist()
        over = [False] * len(tokens) if chosen.ended is None else chosen.ended.tolist()
        logprobs = chosen.logprobs.tolist() if chosen.logprobs is not None else None
        alternatives = None
        if chosen.alternatives is not None:
            own, values, ids = (part.tolist() for part in chosen.alternatives)
            alternatives = (own, values, ids)
        for index, row in self._watched:
            token = tokens[index]
            favourites = None
            if alternatives is not None and row.sampling.top_logprobs:
                most = row.sampling.top_logprobs
                own, values, ids = (part[index] for part in alternatives)
                favourites = {**dict(zip(ids[:most], values[:most], strict=True)), token: own}
                row.top_logprobs.append(favourites)
            stop = over[index] and self._reason(index) == "stop"
            try:
                finished = row.take(token, stop, logprobs[index] if logprobs else None, favourites)
            except Exception as error:
                failed[row] = error
                continue
            if (finished and not over[index]) or (row.stream is not None and row.stream.stopped):
                ended[row] = "stop"
        return ended

    def _finish(self, ended: Mapping[Row, FinishReason]) -> None:
        """Free the places of rows, except where prompts are kept, and hand their completions over."""
        leaving = [
            (row, ended[row], *self.sampler.drawn(index))
            for index, row in enumerate(self._writing)
            if row in ended
        ]
        self._kept.keep([row for row, *_ in leaving])
        self._keep_writing([row for row in self._writing if row not in ended])
        # last, for what listens may raise, as Ctrl-C does
        for row, reason, tokens, logprobs in leaving:
            try:
                row.deliver(tokens, logprobs, reason, self.tokenizer)
            except Exception as error:
                self._fail({row: error})

    def _keep_writing(self, rows: list[Row]) -> None:
        """Let the sampler forget all rows but these."""
        staying = set(rows)
        self.sampler.rearrange([index for index, row in enumerate(self._writing) if row in staying], [])
        self._writing = rows

    def _cancel(self, generation: Generation) -> None:
        if generation.done:
            return
        generation.cancelled = True
        for row in self._withdraw(generation):
            row.deliver([], [], "cancelled", self.tokenizer)
        writing = [row for row in self._writing if row.generation is generation]
        if writing:
            self._finish(dict.fromkeys(writing, "cancelled"))

    def _fail(self, failed: Mapping[Row, Exception]) -> None:
        """Take out rows with all others of their requests, and tell who waits for these why."""
        for row, error in failed.items():
            if row.scored is not None:
                row.scored.failure, row.scored.done = error, True
                self._withdraw(row)
            elif (generation := row.generation) is not None and not generation.done:
                generation.failure = error
                self._withdraw(generation)
                for other in [other for other in self._writing if other.generation is generation]:
                    assert other.pool is not None
                    other.pool.leave(other)
                self._keep_writing([other for other in self._writing if other.generation is not generation])
                if generation.listener is not None:
                    # it may be the listener that failed
                    with suppress(Exception):
                        generation.listener(Event(row.sample, -1, "", None, None, failure=error))

    def _withdraw(self, owner: Generation | Row) -> list[Row]:
        """Take out a row, or the rows of a request, that have drawn nothing yet."""

        def chosen(row: Row) -> bool:
            return row is owner or row.generation is owner

        self._unsettle()
        with self._lock:
            gone = [row for row in self._waiting if chosen(row)]
            self._waiting = deque(row for row in self._waiting if not chosen(row))
        gone += self._reader.take(chosen)
        for row in [row for row in self._generating() if row not in self._writing and chosen(row)]:
            assert row.pool is not None
            row.pool.leave(row)
            gone.append(row)
        return gone
