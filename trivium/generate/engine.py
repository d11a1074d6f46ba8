"""The engine: requests of any length enter and leave a running batch at every step.

`Engine` checks requests and follows the model's weights; `scheduler.Scheduler` decides which sequences are
computed when, `forward.ForwardPass` computes them over `kv_cache.Cache`, `sampling.Sampler` chooses tokens.
"""

from __future__ import annotations

import weakref
from collections import abc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.generate.constraints import Grammars
from trivium.generate.drafts import Draft, drafter_of
from trivium.generate.exactness import BIT_EXACT, CLOSE, Exactness
from trivium.generate.forward import ModuleForward, forward_pass_of
from trivium.generate.head_drafts import HeadDrafter
from trivium.generate.kv_cache import BLOCK, Cache, Shape, half_of_free_memory, in_blocks
from trivium.generate.matrices import EngineWeights, cache_dtype, engine_dtype
from trivium.generate.requests import Completion, Listener, Request, RequestHandle, Scores, Texts
from trivium.generate.sampling import SequenceSampling, seed_of_sample
from trivium.generate.scheduler import Scheduler
from trivium.generate.sequence import ScoredText, Sequence
from trivium.generate.speculation import Speculation
from trivium.generate.static_decode import StaticDecode, has_static_steps
from trivium.generate.streaming import TextStream
from trivium.kit.errors import TriviumError
from trivium.model.draft_heads import DraftHeads
from trivium.model.lora import adapter_names, selection_of
from trivium.model.transformer import Transformer
from trivium.tokens.items import is_item
from trivium.tokens.tokenizer import Tokenizer


class Engine:
    """Generates, scores and embeds with one model; `step` moves every sequence on by one token."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 32,
        memory_budget: int | None = None,
        prefix_cache_size: int = 0,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        draft: Draft | DraftHeads | str | None = None,
        static_steps: bool | None = None,
        compiled: bool = False,
    ) -> None:
        """At most `max_rows` sequences are computed at once, within `memory_budget` bytes of cache.

        `prefix_cache_size` finished prompts stay cached; only for weights that do not change. `dtype` is what
        it computes and caches in; without one it is what `matrices.engine_dtype` says. `draft` is a smaller
        model, heads of this one or `"lookup"`: answers stay the same, and come sooner where it is right.
        With `static_steps` (left out: on a GPU) decode steps have constant shapes and are replayed there
        as CUDA graphs, where the model allows it and nothing drafts; with `compiled` layers are compiled
        first, for which the first answers wait.
        """
        if max_rows < 1:
            raise TriviumError(f"max_rows must be at least 1, not {max_rows}.")
        self._weights = EngineWeights(model, dtype)
        self.source, self.model = model, self._weights.model
        self.tokenizer, self.max_rows = tokenizer, max_rows
        # What the model's own generation_config says, for requests that do not say how to sample.
        self.sampling_defaults: dict[str, Any] = {}
        config = model.config
        self.vocabulary, self.window = config.vocabulary, config.context
        shape = Shape.of(config, cache_dtype(self.model, self._weights.dtype), model.device)
        if static_steps is None:
            static_steps = model.device.type == "cuda"
        static_steps = static_steps and draft is None and has_static_steps(self.model)
        shape = replace(shape, spare=int(static_steps))
        if isinstance(draft, Draft):
            # as many tokens are cached of the draft as of the model
            memory_budget = half_of_free_memory(shape.device) if memory_budget is None else memory_budget
            held = cache_dtype(draft.model, engine_dtype(draft.model))
            share = Shape.of(draft.model.config, held, shape.device).bytes_per_token
            share = memory_budget * share // (share + shape.bytes_per_token)
            memory_budget -= share
        else:
            share = None
        self.cache = Cache(shape, rows=max_rows, budget=memory_budget)
        self.grammars = Grammars(tokenizer, config.vocabulary)
        # one row that is computed as such differs in its last bits from the rows of a draft
        alike = max_rows if draft is None else max(max_rows, 2)
        self._forward = forward_pass_of(self.model, alike, compiles=compiled and static_steps)
        windows = list({config.window(layer) for layer in range(config.layers)})
        static = None
        if static_steps:
            static = StaticDecode(self.model, self._forward, windows, max_rows, compiled=compiled)
        speculation = None
        if isinstance(draft, DraftHeads):
            speculation = Speculation(HeadDrafter(draft, self.model, self._forward.logits))
        elif draft is not None:
            drafter = drafter_of(draft, tokenizer, self.vocabulary, max_rows=max_rows, memory_budget=share)
            speculation = Speculation(drafter)
        self.scheduler = Scheduler(
            self.model,
            self._forward,
            self.cache,
            tokenizer,
            max_rows=max_rows,
            prefix_cache_size=prefix_cache_size,
            speculation=speculation,
            static=static,
        )
        self.counts = self.scheduler.counts
        # A trainer may be in the middle of a pass; the engine computes in the type it has chosen.
        self._own_precision = torch.autocast(model.device.type, enabled=False)
        self._unbounded = config.positions == "rope" and config.rope.get("rope_type") == "dynamic"
        self._random = np.random.default_rng(seed)
        self._under_way: weakref.WeakSet[RequestHandle] = weakref.WeakSet()

    def generate(self, requests: abc.Sequence[Request]) -> list[list[Completion]]:
        """Answer all requests; the completions of each in the order of its samples."""
        return self.generate_from(iter(requests), sum(request.n for request in requests))

    def generate_from(self, requests: Iterator[Request], at_once: int) -> list[list[Completion]]:
        """Answer requests as they come; the next when fewer than `at_once` sequences are under way."""
        handles: list[RequestHandle] = []
        waiting = True
        try:
            while True:
                while waiting and sum(handle.results.count(None) for handle in handles) < at_once:
                    request = next(requests, None)
                    if request is None:
                        waiting = False
                    else:
                        handles.append(self.submit(request))
                if all(handle.done for handle in handles):
                    break
                self.step()
                for handle in handles:
                    if handle.failure is not None:
                        raise handle.failure
        except BaseException:
            # the next request must not wait for sequences of this one
            for handle in handles:
                self.cancel(handle)
            raise
        return [handle.completions for handle in handles]

    def score(
        self, prompts: Texts, completions: Texts, *, top: int = 0, adapter: str | None = None
    ) -> list[Scores]:
        """The log-probability of every token of each completion after its prompt; shared prefixes run once.

        An empty prompt scores the completion's tokens from the second on. With `top`, so many of the most
        likely tokens at each place come with them, and the completion's own.
        """
        if adapter is not None:
            self._check_adapter(adapter)
        texts = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
        for text in texts:
            self._check(text, len(text))
        results = [ScoredText(max(len(prompt), 1), top, adapter) for prompt in prompts]
        self._prefill(
            [
                Sequence(text, len(text) - 1, len(text), scored=scored)
                for text, scored in zip(texts, results, strict=True)
                if len(text) > scored.first
            ]
        )
        return [Scores(scored.logprobs, scored.top_logprobs) for scored in results]

    def embed(self, prompts: abc.Sequence[abc.Sequence[int]]) -> Tensor:
        """The mean of each prompt's last hidden states, [N, width]."""
        for prompt in prompts:
            self._check(prompt, len(prompt))
        results = [ScoredText(len(prompt)) for prompt in prompts]
        self._prefill(
            [
                Sequence(list(prompt), len(prompt), len(prompt), scored=scored, pooled=True)
                for prompt, scored in zip(prompts, results, strict=True)
            ]
        )
        means = [scored.hidden_sum / scored.first for scored in results if scored.hidden_sum is not None]
        return torch.stack(means).clone()

    def _prefill(self, sequences: abc.Sequence[Sequence]) -> None:
        """Prefill texts to their ends; where one fails, or the caller is interrupted, all of them leave."""
        results = [sequence.scored for sequence in sequences if sequence.scored is not None]
        self.scheduler.add(sequences)
        try:
            while not all(scored.done for scored in results):
                self.step()
                for scored in results:
                    if scored.failure is not None:
                        raise scored.failure
        except BaseException:
            mine = set(sequences)
            with torch.inference_mode():  # other sequences may move in the cache
                self.scheduler.withdraw(lambda sequence: sequence in mine)
            raise

    def submit(self, request: Request, on_token: Listener | None = None) -> RequestHandle:
        """Put a request in line, from any thread; `on_token` hears of every token."""
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
        # the tokenizer's own may lie outside the model's vocabulary, and then end nothing
        own = self.tokenizer.stop_ids
        self._check_ids("stop_ids", [token for token in sampling.stop_ids or () if token not in own])
        constraint = request.constraint or self.grammars.constraint(sampling)
        stop_ids = tuple(sorted(own)) if sampling.stop_ids is None else sampling.stop_ids
        handle = RequestHandle(request, on_token)
        self._under_way.add(handle)
        seed = int(self._random.integers(2**63)) if sampling.seed is None else sampling.seed
        # penalties are on words
        words = prompt if self.model.modalities is None else [one for one in prompt if not is_item(one)]
        sequences = []
        for sample in range(request.n):
            fork = constraint.fork() if constraint is not None else None
            state = SequenceSampling(sampling, seed_of_sample(seed, sample), words, stop_ids, fork)
            sequence = Sequence(prompt, len(prompt) - 1, reserved, handle=handle, sample=sample, state=state)
            # text is decoded on the way where someone reads along or a stop text must be found
            if on_token is not None or sampling.stop:
                sequence.stream = TextStream(self.tokenizer, sampling.stop)
            sequences.append(sequence)
        self.scheduler.add(sequences)
        return handle

    def cancel(self, handle: RequestHandle) -> None:
        """End a request at the next step; its slots are freed and what it has generated is kept."""
        self.scheduler.cancelled.append(handle)

    @property
    def exactness(self) -> Exactness:
        """What this machine's kernels were found to do with the model's shapes, and so what is promised."""
        found = self._forward.exactness
        if self.scheduler.static is not None and found.promise == BIT_EXACT:
            return replace(found, promise=CLOSE)  # how far attention reads depends on the longest row
        return found

    @property
    def drafts(self) -> bool:
        """Whether the engine was given something that drafts."""
        return self.scheduler.speculation is not None

    @property
    def drafting(self) -> bool:
        """Whether drafts are in use now; they are not where they were found to cost more than they save."""
        speculation = self.scheduler.speculation
        return speculation is not None and speculation.active

    @property
    def acceptance(self) -> float:
        """The share of the drafted tokens that were accepted; 0 where nothing was drafted."""
        return self.counts["accepted_tokens"] / max(1, self.counts["drafted_tokens"])

    @property
    def busy(self) -> bool:
        """Whether anything is under way or in line."""
        return self.scheduler.busy

    @property
    def rows_in_use(self) -> int:
        """How many sequences hold a slot of the cache."""
        return self.scheduler.in_use

    @contextmanager
    def keeping_prefixes(self, count: int) -> Iterator[None]:
        """Within it, so many finished prompts stay cached, so that what goes on from them is cheap."""
        prefixes = self.scheduler.prefixes
        before = prefixes.size
        prefixes.size = max(before, count)
        try:
            yield
        finally:
            with torch.inference_mode():
                prefixes.resize(before)

    @torch.inference_mode()
    def refresh(self) -> None:
        """Take over weights that were changed outside an optimiser's step."""
        self.scheduler.prefixes.clear()
        self._weights.refresh()
        self._forward.refresh()

    @torch.inference_mode()
    def step(self) -> bool:
        """Prefill a chunk of prompts and decode one token of every sequence; false when nothing is left.

        A sequence that makes this fail is found and fails alone; the others go on as if it were not there.
        """
        try:
            with self._own_precision:
                if not self.scheduler.in_use:
                    self._weights.refresh_if_changed()
                    self._forward.refresh_if_changed()
                self.scheduler.step()
        except BaseException:
            self._abandon()
            raise
        return self.busy

    def _abandon(self) -> None:
        """Drop all that is under way: a step that was cut off, as by Ctrl-C, may have left it half done."""
        problem = TriviumError("the engine was interrupted in the middle of a step: ask again.")
        for sequence in self.scheduler.abandon():
            if sequence.scored is not None:
                sequence.scored.failure, sequence.scored.done = problem, True
        for handle in list(self._under_way):
            if not handle.done:
                handle.failure = problem

    def _check(self, prompt: abc.Sequence[int], reserved: int) -> None:
        if not prompt:
            raise TriviumError("the prompt is empty: give at least one token, such as the end-of-text token.")
        known = prompt
        if self.model.modalities is not None:
            known = [token for token in prompt if not is_item(token)]
            if is_item(prompt[-1]):
                raise TriviumError("the prompt ends in a picture or a sound: let text follow it.")
        if min(known) < 0 or max(known) >= self.vocabulary:
            raise TriviumError(f"the prompt has a token outside the model's vocabulary of {self.vocabulary}.")
        if reserved > self.window and not self._unbounded:
            raise TriviumError(
                f"the request needs {reserved} positions ({len(prompt)} in the prompt) and the model's "
                f"window is {self.window}: shorten the prompt or ask for fewer new tokens."
            )
        self.cache.check(reserved)

    def _check_ids(self, name: str, ids: abc.Iterable[int]) -> None:
        wrong = next((token for token in ids if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise TriviumError(
                f"sampling: {name} names token {wrong}; ids go from 0 to {self.vocabulary - 1}."
            )

    def _check_adapter(self, name: str) -> None:
        if name not in (known := adapter_names(self.source)):
            there = ", ".join(known) or "none"
            raise TriviumError(f"the engine's model has no adapter {name!r}; there is {there}.")
        merged = self._weights.copied or not isinstance(self._forward, ModuleForward)
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
        if isinstance(self._forward, ModuleForward) or learned or self.scheduler.prefill.dynamic_positions:
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
