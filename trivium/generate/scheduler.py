"""The scheduler: sequences wait, are prefilled chunk by chunk, and decode together, one token each a step."""

from __future__ import annotations

import threading
from collections import abc, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from operator import is_

import torch
from torch import Tensor

from trivium.generate.attention import DecodeContext, Piece, PrefillContext
from trivium.generate.forward import ForwardPass
from trivium.generate.kv_cache import BLOCK, Cache, Pool, PrefixCache, in_blocks, shared_prefix
from trivium.generate.requests import Event, FinishReason, RequestHandle
from trivium.generate.sampling import Chosen, Sampler
from trivium.generate.sequence import ScoredText, Sequence
from trivium.model.lora import mixing, selection_of
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

CHUNK = 512
SCORES_AT_ONCE = 2**24


class Prefill:
    """The sequences whose prompts are not yet in the cache; texts to be scored and embedded end here."""

    def __init__(
        self, model: Transformer, forward: ForwardPass, cache: Cache, counts: dict[str, int]
    ) -> None:
        self.sequences: list[Sequence] = []
        self._forward, self._cache, self._counts = forward, cache, counts
        self._selection = selection_of(model)
        config = model.config
        self._device, self._vocabulary = model.device, config.vocabulary
        self._last_position = config.context - 1 if config.positions == "learned" else 2**62
        rotaries = (model.rotary, model.local_rotary)
        self.dynamic_positions = any(rotary is not None and rotary.grows for rotary in rotaries)

    def step(self, sequences: abc.Sequence[Sequence] | None = None) -> list[Sequence]:
        """Compute one chunk, of these sequences only where they are given; those whose prompts are complete.

        What raises leaves every sequence as it was, so that they can then be tried one by one.
        """
        pieces: list[Piece] = []
        chunk: list[tuple[Sequence, int]] = []
        room, tokens = CHUNK, []
        for sequence in self.sequences if sequences is None else sequences:
            if room <= 0:
                break
            if not sequence.copy_prefix(self._counts) or sequence.prefilled >= sequence.prefill_length:
                continue
            if sequence.slides:
                forget_oldest(sequence, self._forward)
            start, free = sequence.prefilled, (sequence.places - sequence.length) // BLOCK * BLOCK
            count = min(sequence.prefill_length - start, room, free)
            padded = in_blocks(count)
            pieces.append(Piece(sequence, sequence.length, padded))
            tokens += sequence.tokens[start : start + count] + [0] * (padded - count)
            chunk.append((sequence, count))
            room -= padded
        if pieces:
            self._compute(tokens, chunk, pieces)
        sources = {id(one.prefix_source) for one in self.sequences if one.prefix_source is not None}
        done = [one for one in self.sequences if one.prefilled >= one.prefill_length]
        # a scored text stays for those that wait to copy from it
        done = [one for one in done if one.scored is None or id(one) not in sources]
        self.sequences = [one for one in self.sequences if one not in done]
        return done

    def _compute(
        self, tokens: list[int], chunk: abc.Sequence[tuple[Sequence, int]], pieces: abc.Sequence[Piece]
    ) -> None:
        """Cache the keys and values of a chunk, and score what is to be scored."""
        counts = [piece.count for piece in pieces]
        reserved: Tensor | int = 0
        if self.dynamic_positions:
            lengths = torch.tensor([sequence.reserved for sequence, _ in chunk])
            reserved = lengths.repeat_interleave(torch.tensor(counts)).to(self._device)
        together = self._forward.exactness.prompts
        context = PrefillContext(pieces, reserved, self._last_position, together=together)
        batch = torch.tensor(tokens, device=self._device)
        with mixing(self._selection, [sequence.adapter for sequence, _ in chunk], counts):
            if any(sequence.scored is not None for sequence, _ in chunk):
                self._score(self._forward.forward(batch, context), chunk, counts)
            else:
                self._forward.prefill(batch, context)
        for sequence, count in chunk:
            sequence.prefilled += count
            sequence.length += count
            self._counts["prompt_tokens"] += count

    def _score(
        self, hidden: Tensor, chunk: abc.Sequence[tuple[Sequence, int]], counts: abc.Sequence[int]
    ) -> None:
        """Keep what scoring and embedding need of the hidden states, [tokens, width]."""
        offset = 0
        wanted: list[Tensor] = []
        targets: list[int] = []
        owners: list[tuple[ScoredText, int]] = []
        sums: list[tuple[ScoredText, Tensor]] = []
        for (sequence, count), padded in zip(chunk, counts, strict=True):
            scored, start = sequence.scored, sequence.prefilled
            if scored is not None and sequence.pooled:
                # block by block, so that the sum does not show where chunks ended
                total = scored.hidden_sum
                for block in hidden[offset : offset + count].split(BLOCK):
                    total = block.sum(0) if total is None else total + block.sum(0)
                assert total is not None, "a piece has tokens"
                sums.append((scored, total))
            elif scored is not None:
                first = max(scored.first - 1 - start, 0)
                if first < count:
                    wanted.append(hidden[offset + first : offset + count])
                    targets += sequence.tokens[start + first + 1 : start + count + 1]
                    owners.append((scored, count - first))
            offset += padded
        logprobs: list[float] = []
        best: list[dict[int, float]] = []
        if wanted:
            most = max(scored.top for scored, _ in owners)
            logprobs, best = self._logprobs(torch.cat(wanted), targets, most)
        # from here on nothing raises
        for scored, total in sums:
            scored.hidden_sum = total
        begin = 0
        for scored, count in owners:
            scored.logprobs += logprobs[begin : begin + count]
            for place in range(begin, begin + count) if scored.top else ():
                likeliest = dict(list(best[place].items())[: scored.top])
                scored.top_logprobs.append({**likeliest, targets[place]: logprobs[place]})
            begin += count

    def _logprobs(
        self, hidden: Tensor, targets: list[int], top: int
    ) -> tuple[list[float], list[dict[int, float]]]:
        """Log-probabilities of the targets and of the `top` best, few at once so that scores stay small."""
        logprobs: list[float] = []
        best: list[dict[int, float]] = []
        ids = torch.tensor(targets, device=self._device)
        size = max(16, SCORES_AT_ONCE // self._vocabulary)
        for start in range(0, len(targets), size):
            scores = torch.log_softmax(self._forward.logits(hidden[start : start + size]), dim=-1)
            logprobs += scores.gather(1, ids[start : start + size, None])[:, 0].tolist()
            if top:
                values, places = scores.topk(min(top, self._vocabulary), dim=-1)
                rows = zip(places.tolist(), values.tolist(), strict=True)
                best += [dict(zip(*row, strict=True)) for row in rows]
        return logprobs, best

    def replace(self, source: Sequence, target: Sequence) -> bool:
        """Give a scored text's slot to the next that waits, if the texts begin alike and it fits."""
        assert source.pool is not None
        if target.scored is None or target.pooled:
            return False
        _, shared = shared_prefix(target, [source], dynamic_positions=self.dynamic_positions)
        if not shared or self._cache.capacity_for(target.reserved) != source.pool.capacity:
            return False
        source.pool.replace(source, target, shared)
        target.prefilled = shared
        self._counts["copied_tokens"] += shared
        self.sequences.append(target)
        return True

    def remove(self, chosen: Callable[[Sequence], bool]) -> list[Sequence]:
        """Take sequences out and free their slots."""
        removed = [sequence for sequence in self.sequences if chosen(sequence)]
        self.sequences = [sequence for sequence in self.sequences if not chosen(sequence)]
        for sequence in removed:
            assert sequence.pool is not None
            sequence.pool.remove(sequence)
        return removed


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
    ) -> None:
        self.cache, self.max_rows = cache, max_rows
        self.counts = {"prompt_tokens": 0, "copied_tokens": 0, "generated_tokens": 0, "steps": 0}
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
        self.sampler = Sampler(self._vocabulary, self._device)
        self._lock = threading.Lock()
        self._watched: list[tuple[int, Sequence]] = []
        self._context: DecodeContext | None = None
        self._steps_to_slide = 0

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
        while self.cancelled:
            self._cancel(self.cancelled.popleft())
        self._admit()
        if self.prefill.sequences:
            self._prefill_step()
        if any(pool.decoding for pool in self.cache.pools.values()):
            self._decode_step()

    def abandon(self) -> list[Sequence]:
        """Drop everything, as after a step that was cut off half done; what had generated nothing yet."""
        dropped = [*self.waiting, *self.prefill.sequences]
        self.waiting.clear()
        self.prefill.sequences, self.decode, self._watched, self._context = [], [], [], None
        self.prefixes.sequences.clear()
        self.cache.pools.clear()
        self.sampler = Sampler(self._vocabulary, self._device)
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
        failed: dict[Sequence, Exception] = {}
        ended = self._observe(chosen, failed) if self._watched else {}
        if chosen.ended is not None and bool(chosen.ended.any()):
            for index in chosen.ended.nonzero()[:, 0].tolist():
                ended.setdefault(self.decode[index], self._reason(index))
        self._steps_to_slide -= 1
        if not ended and not failed and self._steps_to_slide != 0:
            context.advance()
            return
        self._invalidate()
        self._fail(failed)
        if ended:
            self._finish(ended)
        # one that is full slides also in the step in which another ends
        for sequence in self.decode:
            if sequence.slides:
                forget_oldest(sequence, self._forward)

    def _draw_all_that_can(self) -> tuple[DecodeContext, Chosen] | None:
        """One token of every sequence but those that make this fail, which fail alone; None if all do."""
        tried = False
        while sequences := self._in_cache_order():
            try:
                context = self._context = self._context or self._arrange()
                chosen = self._draw(self.sampler, context, self.decode)
            except Exception as error:
                self._invalidate()
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

    def _draw(self, sampler: Sampler, context: DecodeContext, sequences: abc.Sequence[Sequence]) -> Chosen:
        """The next token of each of these sequences; what raises leaves all of them as they were."""
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

    def _arrange(self) -> DecodeContext:
        """Bring sampler and context into the order in which the sequences now lie in the cache."""
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
        sliding = [sequence for sequence in order if sequence.slides]
        self._steps_to_slide = min((one.places - one.length for one in sliding), default=0)
        return self._context_of(list(self.cache.pools.values()), order)

    def _context_of(self, pools: abc.Sequence[Pool], sequences: abc.Sequence[Sequence]) -> DecodeContext:
        reserved: Tensor | int = 0
        if self.prefill.dynamic_positions:
            reserved = torch.tensor([sequence.reserved for sequence in sequences], device=self._device)
        together = self._forward.exactness.steps
        return DecodeContext(pools, self._windows, reserved, lone=self._lone, together=together)

    def _invalidate(self) -> None:
        """Synchronise the sequences' lengths and drop the context, before any of them moves."""
        if self._context is not None:
            self._context.synchronise_lengths()
            self._context = None

    def _reason(self, index: int) -> FinishReason:
        stops = self.sampler.stops[index].tolist()
        return "stop" if int(self.sampler.last[index]) in stops else "length"

    def _observe(self, chosen: Chosen, failed: dict[Sequence, Exception]) -> dict[Sequence, FinishReason]:
        """Pass this step on to the sequences that have a listener or that must look at every token."""
        ended: dict[Sequence, FinishReason] = {}
        tokens = chosen.tokens.tolist()
        over = [False] * len(tokens) if chosen.ended is None else chosen.ended.tolist()
        logprobs = chosen.logprobs.tolist() if chosen.logprobs is not None else None
        alternatives = None
        if chosen.alternatives is not None:
            alternatives = [part.tolist() for part in chosen.alternatives]
        for index, sequence in self._watched:
            token, top_logprobs = tokens[index], None
            if alternatives is not None and (most := sequence.sampling.top_logprobs):
                own, values, ids = (part[index] for part in alternatives)
                top_logprobs = {**dict(zip(ids[:most], values[:most], strict=True)), token: own}
                sequence.top_logprobs.append(top_logprobs)
            stop = over[index] and self._reason(index) == "stop"
            try:
                finished = sequence.observe(token, stop, logprobs[index] if logprobs else None, top_logprobs)
            except Exception as error:
                failed[sequence] = error
                continue
            if (finished and not over[index]) or (sequence.stream is not None and sequence.stream.stopped):
                ended[sequence] = "stop"
        return ended

    # The end

    def _finish(self, ended: Mapping[Sequence, FinishReason]) -> None:
        """Free the slots of sequences, except where prefixes are kept, and deliver their completions."""
        leaving = [
            (sequence, ended[sequence], *self.sampler.drawn(index))
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


def forget_oldest(sequence: Sequence, forward: ForwardPass) -> None:
    """Make room in a full sliding slot: the oldest quarter after the sinks goes, the rest moves back."""
    assert sequence.handle is not None
    assert sequence.pool is not None
    slide = sequence.handle.request.slide
    assert slide is not None
    if sequence.length < sequence.places:
        return
    gone = slide.at_once(sequence.places)
    for layer, places in enumerate(sequence.pool.storage[:, sequence.slot]):
        kept = places[slide.sinks + gone : sequence.length].clone()
        kept[:, 0] = forward.rotate_keys(kept[:, 0], layer, gone)
        places[slide.sinks : sequence.length - gone] = kept
    sequence.length -= gone
