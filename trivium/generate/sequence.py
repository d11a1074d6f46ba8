"""A sequence: one sample of a request, or one text to be scored, on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from torch import Tensor

from trivium.generate.kv_cache import CacheSlot
from trivium.generate.requests import Completion, Event, FinishReason, RequestHandle
from trivium.generate.sampling import Sampling, SequenceSampling
from trivium.generate.streaming import TextStream

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer

_arrivals = count()


@dataclass
class ScoredText:
    """What the prefill of a text has shown so far, from its token number `first` on."""

    first: int
    top: int = 0
    adapter: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """At each place the `top` most likely tokens and the text's own, if any were asked for."""
    hidden_sum: Tensor | None = None
    """The sum of the last hidden states, [width], where an embedding is asked for."""
    done: bool = False
    failure: Exception | None = None
    """Why the text could not be scored; it is then done."""


@dataclass(eq=False)
class Sequence(CacheSlot):
    """One text between its first prompt token and its last generated one: waiting, in prefill or in decode.

    Prefill computes all of a prompt but the last token, which the first decode step takes in: so the
    distribution of every generated token comes out of the same kernels, whatever was prefilled beside it.
    """

    tokens: list[int]
    prefill_length: int
    """How many of the tokens are prefilled."""
    reserved: int
    """How many cached tokens it may need in the end."""
    handle: RequestHandle | None = None
    sample: int = 0
    state: SequenceSampling | None = None
    scored: ScoredText | None = None
    pooled: bool = False
    prefilled: int = 0
    prefix_source: Sequence | None = None
    """The sequence from whose cache the first `prefix_tokens` will be copied."""
    prefix_tokens: int = 0
    stream: TextStream | None = None
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    arrival: int = field(default_factory=lambda: next(_arrivals))

    @property
    def sampling(self) -> Sampling:
        """The settings of a sequence that generates."""
        assert self.state is not None
        return self.state.sampling

    @property
    def adapter(self) -> str | None:
        """The adapter it is computed with."""
        if self.scored is not None:
            return self.scored.adapter
        return None if self.handle is None else self.handle.request.adapter

    @property
    def slides(self) -> bool:
        """Whether it forgets its oldest tokens when its slot is full."""
        return self.handle is not None and self.handle.request.slide is not None

    @property
    def places(self) -> int:
        """How many cached tokens it may hold."""
        assert self.pool is not None
        return self.reserved if self.slides else self.pool.capacity

    @property
    def watched(self) -> bool:
        """Whether Python looks at each of its tokens."""
        if self.state is None:
            return False
        return self.stream is not None or self.state.constraint is not None or self.sampling.top_logprobs > 0

    def copy_prefix(self, counts: dict[str, int]) -> bool:
        """Copy a shared prefix if it is there; false while it is still being computed."""
        if self.prefix_source is None:
            return True
        source, pool = self.prefix_source, self.pool
        assert pool is not None
        if source.pool is not None:
            if source.prefilled < self.prefix_tokens:
                return False
            pool.copy(source, self, self.prefix_tokens)
            self.prefilled = self.prefix_tokens
            counts["copied_tokens"] += self.prefix_tokens
        self.prefix_source = None
        return True

    def observe(
        self, token: int, stop: bool, logprob: float | None, top_logprobs: dict[int, float] | None
    ) -> bool:
        """Look at a generated token; true when the text or its form ends with it."""
        assert self.state is not None
        assert self.handle is not None
        finished = False
        if self.state.constraint is not None and not stop:
            finished = self.state.constraint.advance(token)
        if self.stream is not None:
            text = "" if stop else self.stream.push(token)
            finished |= self.stream.stopped
            if self.handle.listener is not None:
                unsettled = self.stream.unsettled
                event = Event(self.sample, token, text, logprob, top_logprobs, ends=stop, unsettled=unsettled)
                self.handle.listener(event)
        return finished

    def deliver(
        self, tokens: list[int], logprobs: list[float], reason: FinishReason, tokenizer: Tokenizer
    ) -> None:
        """Make the completion and pass it to the handle and its listener."""
        assert self.handle is not None
        assert self.state is not None
        if reason == "stop" and self.state.constraint is not None and self.state.constraint.broken:
            reason = "length"  # the text was cut off: nothing says that it has its form
        rest, cut = "", 0
        if self.stream is not None:
            rest = self.stream.finish()
            text = self.stream.text
            cut = self.stream.unsettled if self.stream.stopped else 0
        else:
            ended = bool(tokens) and tokens[-1] in self.state.stop_ids
            text = tokenizer.decode(tokens[:-1] if ended else tokens)
        logprobs = logprobs if self.sampling.logprobs else []
        completion = Completion(text, tokens, logprobs, reason, len(self.tokens), self.top_logprobs)
        self.handle.results[self.sample] = completion
        if self.handle.listener is not None:
            self.handle.listener(Event(self.sample, -1, rest, None, None, completion, unsettled=cut))
