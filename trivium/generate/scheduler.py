"""The scheduler: sequences wait, are prefilled chunk by chunk, and decode together, one token each a step.

With drafts a step may verify several tokens of each (`speculation`)."""

from __future__ import annotations

import threading
import time
from collections import abc, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import accumulate
from operator import is_

import torch
from torch import Tensor

from trivium.generate.attention import DecodeContext
from trivium.generate.forward import ForwardPass
from trivium.generate.kv_cache import Cache, Pool, PrefixCache, shared_prefix
from trivium.generate.prefill import Prefill, forget_oldest
from trivium.generate.requests import Event, FinishReason, RequestHandle
from trivium.generate.sampling import Chosen, Sampler
from trivium.generate.sequence import Sequence
from trivium.generate.spans import SpanContext
from trivium.generate.speculation import Speculation
from trivium.generate.static_decode import EndedRows, StaticDecode, StaticRows
from trivium.model.lora import mixing, selection_of
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer


class Scheduler:
    """Moves sequences from waiting to prefill to decode; what makes a step fail is found and fails alone."""

    def __init__(
        self,
        model: Transformer,
        forward: ForwardPass,
        cache: Cache,
        tokenizer: Tokenizer,
        *,
        max_rows: int,
        prefix_cache_size: int,
        speculation: Speculation | None = None,
        static: StaticDecode | None = None,
    ) -> None:
        self.cache, self.max_rows, self.speculation, self.static = cache, max_rows, speculation, static
        names = ("prompt", "copied", "generated", "drafted", "accepted")
        self.counts = {**{f"{name}_tokens": 0 for name in names}, "steps": 0}
        self.waiting: deque[Sequence] = deque()
        self.prefill = Prefill(model, forward, cache, self.counts)
        self.decode: list[Sequence] = []
        self.prefixes = PrefixCache(cache, prefix_cache_size)
        self.cancelled: deque[RequestHandle] = deque()
        self._forward, self._tokenizer = forward, tokenizer
        self._selection = selection_of(model)
        config = model.config
        self._device, self._vocabulary = model.device, config.vocabulary
        self._windows = list({config.window(layer) for layer in range(config.layers)})
        self._lone = config.heads == config.key_value_heads
        self.sampler = self._new_sampler()
        self._lock = threading.Lock()
        self._watched: list[tuple[int, Sequence]] = []
        self._context: DecodeContext | StaticRows | None = None
        self._steps_to_slide = 0
        self._unread: EndedRows | None = None

    def _new_sampler(self) -> Sampler:
        return Sampler(self._vocabulary, self._device, waits=self.static is None)

    @property
    def in_use(self) -> int:
        """How many sequences hold a slot, kept prefixes aside."""
        return len(self.prefill.sequences) + len(self.decode)

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self.waiting or self.in_use or self.cancelled)

    def add(self, sequences: abc.Iterable[Sequence]) -> None:
        """Put sequences in line, from any thread."""
        with self._lock:
            self.waiting.extend(sequences)

    def step(self) -> None:
        """Admit those that wait, prefill a chunk and decode one token of every sequence."""
        if self.cancelled or self.prefill.sequences or (self.waiting and self.in_use < self.max_rows):
            # rows may move
            self._read_ended()
        while self.cancelled:
            self._cancel(self.cancelled.popleft())
        self._admit()
        if self.prefill.sequences:
            self._prefill_step()
        if any(pool.decoding for pool in self.cache.pools.values()):
            if self.speculation is None:
                self._decode_step()
            else:
                self._speculative_step(self.speculation)

    def abandon(self) -> list[Sequence]:
        """Drop everything, as after a step that was cut off half done; what had generated nothing yet."""
        dropped = [*self.waiting, *self.prefill.sequences]
        self.waiting.clear()
        self.prefill.sequences, self.decode, self._watched, self._context = [], [], [], None
        self.prefixes.sequences.clear()
        self.cache.pools.clear()
        if self.speculation is not None:
            self.speculation.forget()
        self.sampler, self._unread = self._new_sampler(), None
        return dropped

    def withdraw(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Take out those of the chosen sequences that have generated nothing yet."""
        self._invalidate()
        with self._lock:
            removed = [sequence for sequence in self.waiting if chosen(sequence)]
            self.waiting = deque(sequence for sequence in self.waiting if not chosen(sequence))
        removed += self.prefill.remove(chosen)
        for sequence in [one for one in self._in_cache_order() if one not in self.decode and chosen(one)]:
            assert sequence.pool is not None
            sequence.pool.remove(sequence)
            removed.append(sequence)
        return removed

    # From waiting to prefill

    def _admit(self) -> None:
        """Give slots to those that wait, in order; one for which there is none holds up the others."""
        while self.waiting and self.in_use < self.max_rows:
            sequence = self.waiting[0]
            self._invalidate()
            try:
                if not self._place(sequence):
                    assert self.in_use, "a request that was accepted must fit an empty cache"
                    return
            except Exception as error:
                self._fail({sequence: error})
                continue
            self.waiting.popleft()
            self.prefill.sequences.append(sequence)

    def _place(self, sequence: Sequence) -> bool:
        """Find a slot, and a source for the prefix; false if the sequence must wait."""
        if not sequence.pooled:
            sequence.prefix_source, sequence.prefix_tokens = shared_prefix(
                sequence,
                self.prefill.sequences + self.decode + self.prefixes.sequences,
                dynamic_positions=self.prefill.dynamic_positions,
            )
        while not self.cache.place(sequence, sequence.reserved):
            # a kept prefix is copied where there is room: others may continue from it too
            source = sequence.prefix_source
            if source is not None and self.prefixes.replace(source, sequence, sequence.prefix_tokens):
                self.counts["copied_tokens"] += sequence.prefix_tokens
                sequence.prefix_source = None
                return True
            if not self.prefixes.evict():
                return False
        if sequence.prefix_source in self.prefixes.sequences:
            # now, as the next sequence that is admitted may need the slot of the kept prefix
            sequence.copy_prefix(self.counts)
        return True

    # From prefill to decode

    def _prefill_step(self) -> None:
        failed: dict[Sequence, Exception] = {}
        try:
            complete = self.prefill.step()
        except Exception:
            complete = []
            for sequence in list(self.prefill.sequences):
                try:
                    complete += self.prefill.step([sequence])
                except Exception as error:
                    failed[sequence] = error
        for sequence in complete:
            assert sequence.pool is not None
            if sequence.scored is None:
                self._invalidate()
                if sequence.slides:
                    forget_oldest(sequence, self._forward)
                sequence.pool.move_to_decode(sequence)
                continue
            sequence.scored.done = True
            if self.waiting and self.prefill.replace(sequence, self.waiting[0]):
                self.waiting.popleft()
            else:
                self._invalidate()
                sequence.pool.remove(sequence)
        self._fail(failed)

    # Decode

    def _decode_step(self) -> None:
        drawn = self._draw_all_that_can()
        if drawn is None:
            return
        context, chosen = drawn
        if self.speculation is not None:
            self.speculation.observe(self.decode, self._forward.hidden)
        failed: dict[Sequence, Exception] = {}
        ended: dict[Sequence, FinishReason] = {}
        late = [] if self._unread is None else self._unread.wait()
        self._unread = None
        if not late and self._may_read_late():
            if chosen.ended is not None:
                self._unread = EndedRows(chosen.ended, self.decode)
        else:
            ended = self._ended(chosen, range(len(self.decode)), failed)
            ended.update(dict.fromkeys(late, "stop"))
            self.counts["generated_tokens"] -= len(late)
        self._steps_to_slide -= 1
        if not ended and not failed and self._steps_to_slide != 0:
            context.advance()
            return
        self._invalidate()
        self._leave(ended, failed, late)

    def _may_read_late(self) -> bool:
        """Whether the next step may be computed before it is known which rows this one ended."""
        return (
            self.static is not None
            and not self._watched
            and self.sampler.steps_left > 0
            and not any(sequence.slides for sequence in self.decode)
        )

    def _read_ended(self) -> bool:
        """End the sequences that the last step ended and that are not yet known to have; true if any are."""
        ended = [] if self._unread is None else self._unread.wait()
        self._unread = None
        if ended:
            self._invalidate()
            self._leave(dict.fromkeys(ended, "stop"), {})
        return bool(ended)

    def _leave(
        self,
        ended: Mapping[Sequence, FinishReason],
        failed: Mapping[Sequence, Exception],
        late: abc.Collection[Sequence] = (),
    ) -> None:
        """End a step in which sequences ended or failed, or in which one is full; `late` ended one ago."""
        self._fail(failed)
        if ended:
            self._finish(ended, late)
        # one that is full slides also in the step in which another ends
        for sequence in self.decode:
            if sequence.slides:
                forget_oldest(sequence, self._forward)

    def _speculative_step(self, speculation: Speculation) -> None:
        """Verify drafts where there are any, else decode one token of every sequence."""
        began, before = time.perf_counter(), self.counts["generated_tokens"]
        try:
            if self._context is None:
                self._bring_into_order()
            rows, drafts = len(self.decode), speculation.drafts(self.decode, self.sampler)
        except Exception:
            rows, drafts = 0, None  # the step without drafts finds whose fault it is
        drafted = drafts is not None and self._verify(drafts, speculation)
        if not drafted:
            self._decode_step()
        tokens = self.counts["generated_tokens"] - before
        speculation.payoff.note(rows, drafted, tokens, time.perf_counter() - began)

    def _verify(self, drafts: abc.Sequence[list[int]], speculation: Speculation) -> bool:
        """Draw the next token of every sequence, and more as long as they are those of its draft.

        False where not even the first could be drawn, which leaves all as they were.
        """
        self._invalidate()
        sequences, counts = self.decode, [1 + len(draft) for draft in drafts]
        context = SpanContext(
            sequences, counts, self._windows, self._reserved(sequences, counts),
            lone=self._lone, together=self._forward.exactness.steps,
        )  # fmt: skip
        lasts = self.sampler.last.tolist()
        read = [token for last, draft in zip(lasts, drafts, strict=True) for token in (last, *draft)]
        starts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
        rows: list[int] = list(range(len(sequences)))
        ended: dict[Sequence, FinishReason] = {}
        failed: dict[Sequence, Exception] = {}
        accepted, drawn = [0] * len(sequences), False
        try:
            with mixing(self._selection, [one.adapter for one in sequences], counts):
                logits = self._forward.decode(torch.tensor(read, device=self._device), context)
            for place in range(max(counts)):
                where = torch.tensor([starts[row] + place for row in rows], device=self._device)
                chosen = self.sampler.choose_of(rows, logits.index_select(0, where))
                drawn = True
                self.counts["generated_tokens"] += len(rows)
                for row in rows:
                    sequences[row].length += 1
                ended |= self._ended(chosen, rows, failed)
                right = [
                    row
                    for row, token in zip(rows, chosen.tokens.tolist(), strict=True)
                    if place < len(drafts[row]) and drafts[row][place] == token
                ]
                for row in right:
                    accepted[row] += 1
                rows = [row for row in right if sequences[row] not in ended and sequences[row] not in failed]
                if not rows:
                    break
        except Exception:
            if not drawn:
                return False
            # what was drawn before this place stands; a step without drafts finds whose fault it is
        places = [start + right_ones for start, right_ones in zip(starts, accepted, strict=True)]
        speculation.observe(sequences, self._forward.hidden, places)
        for sequence, draft, right_ones in zip(sequences, drafts, accepted, strict=True):
            self.counts["drafted_tokens"] += len(draft)
            self.counts["accepted_tokens"] += right_ones
            speculation.learn(sequence, len(draft), right_ones)
        self.counts["steps"] += 1
        self._leave(ended, failed)
        return True

    def _draw_all_that_can(self) -> tuple[DecodeContext | StaticRows, Chosen] | None:
        """One token of every sequence but those that make this fail, which fail alone; None if all do."""
        tried = False
        while sequences := self._in_cache_order():
            try:
                context = self._context = self._context or self._arrange()
                chosen = self._draw(self.sampler, context, self.decode)
            except Exception as error:
                self._invalidate()
                if self._read_ended():
                    continue
                guilty = {one: problem for one in sequences if (problem := self._problem_of(one)) is not None}
                if not guilty and tried:
                    # only together do they fail, as where memory ends: the last to come goes first
                    guilty = {max(sequences, key=lambda one: one.arrival): error}
                tried = True
                self._fail(guilty)
            else:
                context.stored += 1
                self.counts["steps"] += 1
                self.counts["generated_tokens"] += context.tokens
                return context, chosen
        return None

    def _draw(
        self, sampler: Sampler, context: DecodeContext | StaticRows, sequences: abc.Sequence[Sequence]
    ) -> Chosen:
        """The next token of each of these sequences; what raises leaves all of them as they were."""
        if isinstance(context, StaticRows):
            return sampler.choose(context.decode(sampler.last))
        with mixing(self._selection, [one.adapter for one in sequences], [1] * context.tokens):
            logits = self._forward.decode(sampler.last, context)
        return sampler.choose(logits)

    def _problem_of(self, sequence: Sequence) -> Exception | None:
        """What a sequence raises when its next token is drawn without the others; it stays as it is."""
        assert sequence.pool is not None
        assert sequence.state is not None
        try:
            known = sequence in self.decode
            sampler = self.sampler.alone(self.decode.index(sequence) if known else sequence.state)
            self._draw(sampler, self._context_of([sequence.pool.only(sequence)], [sequence]), [sequence])
        except Exception as error:
            return error
        return None

    def _in_cache_order(self) -> list[Sequence]:
        """The sequences that decode, in the order in which they lie in the cache."""
        pools = self.cache.pools.values()
        return [one for pool in pools for one in pool.slots[: pool.decoding] if isinstance(one, Sequence)]

    def _arrange(self) -> DecodeContext | StaticRows:
        """Bring sampler and context into the order in which the sequences now lie in the cache."""
        self._bring_into_order()
        sliding = [sequence for sequence in self.decode if sequence.slides]
        self._steps_to_slide = min((one.places - one.length for one in sliding), default=0)
        pools = list(self.cache.pools.values())
        return self._context_of(pools, self.decode) if self.static is None else self.static.arrange(pools)

    def _bring_into_order(self) -> None:
        """Let the sampler's rows follow the order in which the sequences now lie in the cache."""
        order = self._in_cache_order()
        if order != self.decode:
            known = {id(sequence): index for index, sequence in enumerate(self.decode)}
            kept = [sequence for sequence in order if id(sequence) in known]
            entering = [sequence for sequence in order if id(sequence) not in known]
            states = [sequence.state for sequence in entering if sequence.state is not None]
            self.sampler.rearrange([known[id(sequence)] for sequence in kept], states)
            now = {id(sequence): index for index, sequence in enumerate(kept + entering)}
            if (arranged := [now[id(sequence)] for sequence in order]) != sorted(arranged):
                self.sampler.rearrange(arranged, [])
            self.decode = order
        self._watched = [(index, sequence) for index, sequence in enumerate(order) if sequence.watched]

    def _context_of(self, pools: abc.Sequence[Pool], sequences: abc.Sequence[Sequence]) -> DecodeContext:
        reserved = self._reserved(sequences, [1] * len(sequences))
        together = self._forward.exactness.steps
        return DecodeContext(pools, self._windows, reserved, lone=self._lone, together=together)

    def _reserved(self, sequences: abc.Sequence[Sequence], counts: abc.Sequence[int]) -> Tensor | int:
        """How long each token's sequence may become, [tokens], where that decides how keys are rotated."""
        if not self.prefill.dynamic_positions:
            return 0
        lengths = torch.tensor([sequence.reserved for sequence in sequences])
        return lengths.repeat_interleave(torch.tensor(counts)).to(self._device)

    def _invalidate(self) -> None:
        """Synchronise the sequences' lengths and drop the context, before any of them moves."""
        if self._context is not None:
            self._context.synchronise_lengths()
            self._context = None

    def _reason(self, index: int) -> FinishReason:
        stops = self.sampler.stops[index].tolist()
        return "stop" if int(self.sampler.last[index]) in stops else "length"

    def _ended(
        self, chosen: Chosen, rows: abc.Sequence[int], failed: dict[Sequence, Exception]
    ) -> dict[Sequence, FinishReason]:
        """The sequences that a step ends, after those that look at each token have looked at theirs."""
        ended = self._observe(chosen, rows, failed) if self._watched else {}
        if chosen.ended is not None and bool(chosen.ended.any()):
            for place in chosen.ended.nonzero()[:, 0].tolist():
                ended.setdefault(self.decode[rows[place]], self._reason(rows[place]))
        return ended

    def _observe(
        self, chosen: Chosen, rows: abc.Sequence[int], failed: dict[Sequence, Exception]
    ) -> dict[Sequence, FinishReason]:
        """Pass this step on to the sequences that have a listener or that must look at every token."""
        ended: dict[Sequence, FinishReason] = {}
        places = {row: place for place, row in enumerate(rows)}
        tokens = chosen.tokens.tolist()
        over = [False] * len(tokens) if chosen.ended is None else chosen.ended.tolist()
        logprobs = chosen.logprobs.tolist() if chosen.logprobs is not None else None
        alternatives = None
        if chosen.alternatives is not None:
            alternatives = [part.tolist() for part in chosen.alternatives]
        for index, sequence in self._watched:
            if (place := places.get(index)) is None:
                continue
            token, top_logprobs = tokens[place], None
            if alternatives is not None and (most := sequence.sampling.top_logprobs):
                own, values, ids = (part[place] for part in alternatives)
                top_logprobs = {**dict(zip(ids[:most], values[:most], strict=True)), token: own}
                sequence.top_logprobs.append(top_logprobs)
            stop = over[place] and self._reason(index) == "stop"
            try:
                finished = sequence.observe(token, stop, logprobs[place] if logprobs else None, top_logprobs)
            except Exception as error:
                failed[sequence] = error
                continue
            if (finished and not over[place]) or (sequence.stream is not None and sequence.stream.stopped):
                ended[sequence] = "stop"
        return ended

    # The end

    def _finish(self, ended: Mapping[Sequence, FinishReason], late: abc.Collection[Sequence] = ()) -> None:
        """Free the slots of sequences, except where prefixes are kept, and deliver their completions.

        Those that ended `late` have drawn one token after their end.
        """
        leaving = [
            (sequence, ended[sequence], *self.sampler.drawn(index, surplus=int(sequence in late)))
            for index, sequence in enumerate(self.decode)
            if sequence in ended
        ]
        self.prefixes.keep([sequence for sequence, *_ in leaving])
        self._keep_in_decode([sequence for sequence in self.decode if sequence not in ended])
        # last, for what listens may raise, as Ctrl-C does
        for sequence, reason, tokens, logprobs in leaving:
            try:
                sequence.deliver(tokens, logprobs, reason, self._tokenizer)
            except Exception as error:
                self._fail({sequence: error})

    def _keep_in_decode(self, staying: list[Sequence]) -> None:
        """Let the sampler forget all sequences but these."""
        ids = set(staying)
        self.sampler.rearrange([index for index, one in enumerate(self.decode) if one in ids], [])
        self.decode = staying

    def _cancel(self, handle: RequestHandle) -> None:
        if handle.done:
            return
        handle.cancelled = True
        for sequence in self.withdraw(lambda one: one.handle is handle):
            sequence.deliver([], [], "cancelled", self._tokenizer)
        if decoding := [sequence for sequence in self.decode if sequence.handle is handle]:
            self._finish(dict.fromkeys(decoding, "cancelled"))

    def _fail(self, failed: Mapping[Sequence, Exception]) -> None:
        """Remove sequences with all others of their requests, and pass the reason on."""
        for sequence, error in failed.items():
            if sequence.scored is not None:
                sequence.scored.failure, sequence.scored.done = error, True
                self.withdraw(partial(is_, sequence))
            elif (handle := sequence.handle) is not None and not handle.done:
                self._fail_request(handle, sequence.sample, error)

    def _fail_request(self, handle: RequestHandle, sample: int, error: Exception) -> None:
        handle.failure = error
        self.withdraw(lambda one: one.handle is handle)
        for sequence in [one for one in self.decode if one.handle is handle]:
            assert sequence.pool is not None
            sequence.pool.remove(sequence)
        self._keep_in_decode([one for one in self.decode if one.handle is not handle])
        if handle.listener is not None:
            # it may be the listener that failed
            with suppress(Exception):
                handle.listener(Event(sample, -1, "", None, None, failure=error))
