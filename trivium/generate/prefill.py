"""Prefill: prompts enter the cache chunk by chunk; texts to be scored and embedded end here."""

from __future__ import annotations

from collections import abc
from collections.abc import Callable

import torch
from torch import Tensor

from trivium.generate.attention import Piece, PrefillContext
from trivium.generate.forward import ForwardPass
from trivium.generate.kv_cache import BLOCK, Cache, in_blocks, shared_prefix
from trivium.generate.sequence import ScoredText, Sequence
from trivium.model.lora import mixing, selection_of
from trivium.model.transformer import Transformer

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
