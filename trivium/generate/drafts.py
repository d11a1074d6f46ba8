"""Where drafts come from: guesses at the next few tokens that cost less than the model's own.

Speculative decoding (Leviathan, Kalman and Matias 2023; Chen et al. 2023) lets the model verify several
guessed tokens in one pass. `PromptLookup` guesses that a text goes on as it did where its last few tokens
stood before (Saxena 2023); `DraftModel` asks a smaller model. How guesses are verified is in `speculation`.
"""

from __future__ import annotations

import weakref
from collections import abc
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.generate.attention import DecodeContext
from trivium.generate.forward import forward_pass_of
from trivium.generate.kv_cache import BLOCK, Cache, Shape, shared_prefix
from trivium.generate.matrices import EngineWeights, cache_dtype
from trivium.generate.prefill import Prefill
from trivium.generate.sampling import NEVER, Sampler
from trivium.generate.sequence import Sequence
from trivium.generate.spans import SpanContext
from trivium.kit.errors import TriviumError
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

LOOKUP = "lookup"
NGRAMS = (4, 3, 2)


@dataclass(frozen=True)
class Draft:
    """A smaller model that drafts, with the tokenizer that it was trained with."""

    model: Transformer
    tokenizer: Tokenizer


@dataclass
class DraftedText:
    """The text of one sequence so far, and how many tokens of a draft it can use."""

    sequence: Sequence
    tokens: list[int]
    """The prompt and everything that was generated."""
    limit: int = 0


class Drafter(Protocol):
    """Guesses how texts go on."""

    longest: int
    """How many tokens a draft may have."""

    def propose(self, texts: abc.Sequence[DraftedText], sampler: Sampler) -> list[list[int]]:
        """At most `limit` tokens for each text, or none; `sampler` holds the texts in this order."""

    def forget(self) -> None:
        """Drop all texts."""


@dataclass
class NgramIndex:
    """Where in one text every run of a few tokens was last seen; the index grows with the text."""

    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    """The place that follows the last occurrence of a run, but for the one at the end of the text."""
    indexed: int = 0

    def follow(self, tokens: list[int], limit: int) -> list[int]:
        """At most `limit` tokens that followed the longest known run at the end of the text."""
        end = len(tokens)
        for place in range(max(self.indexed, 1), end):
            for size in NGRAMS:
                if size <= place:
                    self.after[tuple(tokens[place - size : place])] = place
        self.indexed = end
        for size in NGRAMS:
            source = self.after.get(tuple(tokens[end - size :])) if size < end else None
            if source is not None:
                draft: list[int] = []
                for place in range(source, source + limit):
                    # a run that overlaps the end repeats what it has drafted itself
                    draft.append(tokens[place] if place < end else draft[place - end])
                return draft
        return []


class PromptLookup:
    """Drafts what followed the last few tokens of a text where they stood before in the same text."""

    longest = 10

    def __init__(self) -> None:
        self._indices: weakref.WeakKeyDictionary[Sequence, NgramIndex] = weakref.WeakKeyDictionary()

    def propose(self, texts: abc.Sequence[DraftedText], sampler: Sampler) -> list[list[int]]:
        drafts = []
        for text in texts:
            index = self._indices.setdefault(text.sequence, NgramIndex())
            drafts.append(index.follow(text.tokens, text.limit) if text.limit else [])
        return drafts

    def forget(self) -> None:
        self._indices.clear()


@dataclass(eq=False)
class Twin(Sequence):
    """A sequence's text in the draft model's cache."""

    agreed: int = 0
    """How many of the cached tokens are the text's own; what was cached after them was a draft."""

    def rewind(self, text: list[int]) -> None:
        """Forget the drafted tokens that the text does not have."""
        while self.agreed < min(self.length, len(text) - 1) and self.tokens[self.agreed] == text[self.agreed]:
            self.agreed += 1
        self.length = min(self.length, self.agreed)
        self.tokens = list(text)


class DraftModel:
    """A smaller model with a cache of its own that follows the texts and runs a few tokens ahead.

    It draws with the settings, the grammar and the very random numbers with which the model will draw: where
    both distributions agree, so do the tokens.
    """

    longest = 8

    def __init__(self, draft: Draft, vocabulary: int, *, max_rows: int, memory_budget: int | None) -> None:
        self._weights = EngineWeights(draft.model)
        self.model = self._weights.model
        config = self.model.config
        self._forward = forward_pass_of(self.model, max_rows)
        shape = Shape.of(config, cache_dtype(self.model, self._weights.dtype), self.model.device)
        self.cache = Cache(shape, rows=max_rows, budget=memory_budget)
        self._prefill = Prefill(
            self.model, self._forward, self.cache, {"prompt_tokens": 0, "copied_tokens": 0}
        )
        self._twins: dict[Sequence, Twin] = {}
        self._vocabulary, self._own_vocabulary = vocabulary, config.vocabulary
        self._window = config.context
        self._windows = list({config.window(layer) for layer in range(config.layers)})
        self._lone = config.heads == config.key_value_heads

    def propose(self, texts: abc.Sequence[DraftedText], sampler: Sampler) -> list[list[int]]:
        self._follow(texts)
        drafts: list[list[int]] = [[] for _ in texts]
        ready = [row for row, text in enumerate(texts) if text.limit and self._is_ready(text)]
        if not ready:
            return drafts
        ahead = sampler.forked(ready)
        twins = [self._twins[texts[row].sequence] for row in ready]
        # what each of the rows that are ready takes in next; those that draft no more leave the list
        pending = [twin.tokens[twin.length :] for twin in twins]
        # in the order in which they lie in the cache, so that neighbours are read together
        active = sorted(range(len(ready)), key=lambda one: _place(twins[one]))
        step: DecodeContext | None = None
        while active:
            if len(ready) == 1 and len(pending[0]) == 1:
                # A lone text moves on token by token: what the next one takes is laid out once.
                step = self._lone_step(step, twins[0])
            logits = self._logits([twins[one] for one in active], [pending[one] for one in active], step)
            chosen = ahead.choose_of(active, logits)
            going = []
            for one, token in zip(active, chosen.tokens.tolist(), strict=True):
                text, twin, draft = texts[ready[one]], twins[one], drafts[ready[one]]
                twin.length += len(pending[one])
                twin.tokens.append(token)
                draft.append(token)
                pending[one] = [token]
                constraint, state = ahead.constraints[one], text.sequence.state
                assert state is not None
                ends = token in state.stop_ids or (constraint is not None and constraint.advance(token))
                if len(draft) < text.limit and not ends and self._fits(twin, token):
                    going.append(one)
            active = going
        return drafts

    def forget(self) -> None:
        self._twins.clear()
        self._prefill.sequences.clear()
        self.cache.pools.clear()

    def _fits(self, twin: Twin, token: int) -> bool:
        """Whether a twin can take in one more token."""
        return twin.length < min(twin.reserved, self._window) and token < self._own_vocabulary

    def _reserved(self, twins: abc.Sequence[Twin], counts: abc.Sequence[int]) -> Tensor | int:
        """How long each token's text may become, [tokens], where that decides how keys are rotated."""
        if not self._prefill.dynamic_positions:
            return 0
        reserved = torch.tensor([twin.reserved for twin in twins]).repeat_interleave(torch.tensor(counts))
        return reserved.to(self.model.device)

    def _lone_step(self, step: DecodeContext | None, twin: Twin) -> DecodeContext:
        """The next token of one text, after the step before it where there is one."""
        if step is not None:
            step.advance()
            return step
        assert twin.pool is not None
        pool, reserved = twin.pool.only(twin), self._reserved([twin], [1])
        return DecodeContext([pool], self._windows, reserved, lone=self._lone)

    def _logits(
        self,
        twins: abc.Sequence[Twin],
        pending: abc.Sequence[list[int]],
        step: DecodeContext | None = None,
    ) -> Tensor:
        """Scores over the model's vocabulary after the pending tokens of each twin, [N, V]."""
        counts = [len(tokens) for tokens in pending]
        device = self.model.device
        context = step or SpanContext(
            twins, counts, self._windows, self._reserved(twins, counts), lone=self._lone
        )
        tokens = torch.tensor([token for some in pending for token in some], device=device)
        logits = self._forward.decode(tokens, context)
        last = torch.tensor(list(accumulate(counts)), device=device) - 1
        scores = logits[last, : self._vocabulary].float()
        return F.pad(scores, (0, self._vocabulary - scores.shape[1]), value=NEVER)

    def _follow(self, texts: abc.Sequence[DraftedText]) -> None:
        """Let twins come and go with the texts, and prefill a chunk of what they have not read."""
        here = {text.sequence for text in texts}
        for sequence in [one for one in self._twins if one not in here]:
            twin = self._twins.pop(sequence)
            self._prefill.sequences = [one for one in self._prefill.sequences if one is not twin]
            assert twin.pool is not None
            twin.pool.remove(twin)
        if not self._twins:
            self._weights.refresh_if_changed()
            self._forward.refresh_if_changed()
        for text in texts:
            if not text.limit or len(text.tokens) >= self._window:
                continue
            if max(text.tokens) >= self._own_vocabulary:
                continue
            mine = self._twins.get(text.sequence) or self._twin(text)
            if mine is None or mine in self._prefill.sequences:
                continue
            mine.rewind(text.tokens)
            if len(text.tokens) - mine.length > BLOCK:
                self._read_on(mine)
        if self._prefill.sequences:
            self._prefill.step()
            for one in self._twins.values():
                one.agreed = max(one.agreed, min(one.prefilled, one.length))

    def _twin(self, text: DraftedText) -> Twin | None:
        """A place for a text in the cache, if there is room, and a prompt to copy from."""
        prompt, reserved = text.tokens, min(text.sequence.reserved, self._window)
        twin = Twin(list(prompt), len(prompt) - 1, reserved)
        # the samples of one request have one prompt
        handle = text.sequence.handle
        same = (twin for sequence, twin in self._twins.items() if sequence.handle is handle)
        others = [one] if (one := next(same, None)) is not None else self._twins.values()
        dynamic = self._prefill.dynamic_positions
        twin.prefix_source, twin.prefix_tokens = shared_prefix(twin, others, dynamic_positions=dynamic)
        if self.cache.capacity_for(reserved) > self.cache.places or not self.cache.place(twin, reserved):
            return None
        self._twins[text.sequence] = twin
        self._prefill.sequences.append(twin)
        return twin

    def _read_on(self, twin: Twin) -> None:
        """Prefill what was generated without drafts, from a whole block on."""
        twin.length = twin.prefilled = twin.agreed = twin.length // BLOCK * BLOCK
        twin.prefill_length = len(twin.tokens) - 1
        self._prefill.sequences.append(twin)

    def _is_ready(self, text: DraftedText) -> bool:
        twin = self._twins.get(text.sequence)
        if twin is None or twin in self._prefill.sequences or not twin.length < len(text.tokens):
            return False
        return len(text.tokens) <= min(twin.reserved, self._window)


def _place(twin: Twin) -> tuple[int, int]:
    assert twin.pool is not None
    return twin.pool.capacity, twin.slot


def drafter_of(
    draft: Draft | str, tokenizer: Tokenizer, vocabulary: int, *, max_rows: int, memory_budget: int | None
) -> Drafter:
    """What drafts for a model with this tokenizer and so many tokens."""
    if isinstance(draft, Draft):
        check_tokens(tokenizer, draft.tokenizer)
        return DraftModel(draft, vocabulary, max_rows=max_rows, memory_budget=memory_budget)
    if draft != LOOKUP:
        raise TriviumError(f"draft must be a model that is open or {LOOKUP!r}, not {draft!r}.")
    return PromptLookup()


def check_tokens(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Refuse a draft whose ids stand for other tokens: hardly any of its guesses would be right."""
    names, others = (
        {token: name for name, token in one.backend.get_vocab(with_added_tokens=True).items()}
        for one in (tokenizer, other)
    )
    shared = names.keys() & others.keys()
    differing = sorted(token for token in shared if names[token] != others[token])
    if differing:
        first = differing[0]
        raise TriviumError(
            f"the draft has other tokens than the model ({len(differing)} of {len(shared)} differ: token "
            f"{first} is {others[first]!r}, not {names[first]!r}): take a draft with the same tokenizer."
        )
