"""A row of the batch: one sample of a request, or one text to be scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from trivium.generate.cache import BLOCK, Pool
from trivium.generate.requests import Completion, Event, FinishReason, Generation
from trivium.generate.sampler import Entrant
from trivium.generate.sampling import Sampling
from trivium.generate.streaming import TextStream

if TYPE_CHECKING:
    from trivium.tokens.tokenizer import Tokenizer

_arrivals = count()


@dataclass
class Scored:
    """What reading a text has shown so far, from its token number `first` on."""

    first: int
    top: int = 0
    adapter: str | None = None
    logprobs: list[float] = field(default_factory=list)
    favourites: list[dict[int, float]] = field(default_factory=list)
    """At each place the `top` likeliest tokens and the text's own, if any were asked for."""
    total: Tensor | None = None
    done: bool = False
    failure: Exception | None = None
    """Why the text could not be read; it is then done."""


@dataclass(eq=False)
class Row:
    """Where one text stands between its first prompt token and its last drawn one.

    A row that generates reads all of its prompt but the last token, which its first step of writing takes in:
    so the distribution of every drawn token comes out of the same kernels, whatever was read beside it.
    """

    tokens: list[int]
    goal: int
    reserved: int
    generation: Generation | None = None
    sample: int = 0
    entrant: Entrant | None = None
    scored: Scored | None = None
    pooled: bool = False
    pool: Pool | None = None
    slot: int = 0
    length: int = 0
    filled: int = 0
    lender: Row | None = None
    shared: int = 0
    stream: TextStream | None = None
    heard: int = 0
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    arrival: int = field(default_factory=lambda: next(_arrivals))

    @property
    def sampling(self) -> Sampling:
        """The settings of a row that generates."""
        assert self.entrant is not None
        return self.entrant.sampling

    @property
    def adapter(self) -> str | None:
        """The adapter the row is computed with."""
        if self.scored is not None:
            return self.scored.adapter
        return None if self.generation is None else self.generation.request.adapter

    @property
    def slides(self) -> bool:
        """Whether the row forgets its oldest tokens when it is full."""
        return self.generation is not None and self.generation.request.slide is not None

    def reserved_places(self) -> int:
        """How many cached tokens the row may hold."""
        assert self.pool is not None
        return self.reserved if self.slides else self.pool.capacity

    def listen(self, tokenizer: Tokenizer) -> None:
        """Decode while drawing if someone reads along or a stop text must be found."""
        assert self.generation is not None
        if self.generation.listener is not None or self.sampling.stop:
            self.stream = TextStream(tokenizer, self.sampling.stop)

    @property
    def watched(self) -> bool:
        """Whether each of its tokens is looked at in Python."""
        if self.entrant is None:
            return False
        return (
            self.stream is not None or self.entrant.constraint is not None or self.sampling.top_logprobs > 0
        )

    def ready_to_read(self, counts: dict[str, int]) -> bool:
        """Take over a shared beginning if it is there; false while it is still being computed."""
        if self.lender is None:
            return True
        lender, self_pool = self.lender, self.pool
        assert self_pool is not None
        if lender.pool is not None:
            if lender.filled < self.shared:
                return False
            self_pool.borrow(self, lender, self.shared)
            self.filled = self.shared
            counts["borrowed_tokens"] += self.shared
        self.lender = None
        return True

    def take(
        self, token: int, stop: bool, logprob: float | None, favourites: dict[int, float] | None
    ) -> bool:
        """Look at a drawn token; true when the text or the grammar ends with it."""
        assert self.entrant is not None
        assert self.generation is not None
        finished = False
        if self.entrant.constraint is not None and not stop:
            finished = self.entrant.constraint.advance(token)
        if self.stream is not None:
            text = "" if stop else self.stream.push(token)
            finished |= self.stream.stopped
            if self.generation.listener is not None:
                unsettled = self.stream.unsettled
                event = Event(self.sample, token, text, logprob, favourites, ends=stop, unsettled=unsettled)
                self.generation.listener(event)
        return finished

    def deliver(
        self, tokens: list[int], logprobs: list[float], reason: FinishReason, tokenizer: Tokenizer
    ) -> None:
        """Make the completion and tell the listener."""
        assert self.generation is not None
        assert self.entrant is not None
        if reason == "stop" and self.entrant.constraint is not None and self.entrant.constraint.broken:
            reason = "length"  # the text was cut off: nothing says that it has its form
        rest, cut = "", 0
        if self.stream is not None:
            rest = self.stream.finish()
            text = self.stream.text
            cut = self.stream.unsettled if self.stream.stopped else 0
        else:
            ended = bool(tokens) and tokens[-1] in self.entrant.stop_ids
            text = tokenizer.decode(tokens[:-1] if ended else tokens)
        completion = Completion(
            text,
            tokens,
            logprobs if self.sampling.logprobs else [],
            reason,
            len(self.tokens),
            self.top_logprobs,
        )
        self.generation.results[self.sample] = completion
        if self.generation.listener is not None:
            self.generation.listener(Event(self.sample, -1, rest, None, None, completion, unsettled=cut))


def shared_beginning(row: Row, others: Sequence[Row], *, stretches: bool) -> tuple[Row | None, int]:
    """The row that has, or will have, most of this one's prompt, and how many tokens of it can be copied."""
    best, longest = None, 0
    for other in others:
        # Under another adapter the same tokens have other keys and values.
        if other.slides or row.slides or other.adapter != row.adapter:
            continue
        # Positions that stretch turn keys by how long the whole row may become.
        if stretches and other.reserved != row.reserved:
            continue
        if other.generation is not None and other.generation is row.generation:
            return other, row.goal
        limit = min(row.goal, other.goal)
        if limit <= longest or row.tokens[:BLOCK] != other.tokens[:BLOCK]:
            continue
        mine, theirs = np.array(row.tokens[:limit]), np.array(other.tokens[:limit])
        differences = np.flatnonzero(mine != theirs)
        common = int(differences[0]) if len(differences) else limit
        # whole blocks, unless the whole prompt is there: the rest is then read in the same blocks as alone
        usable = common if common == row.goal else common // BLOCK * BLOCK
        if row.scored is not None:
            usable = min(usable, (row.scored.first - 1) // BLOCK * BLOCK)
        if usable > longest:
            best, longest = other, usable
    return best, longest
