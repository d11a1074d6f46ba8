"""Reading prompts: chunk by chunk, shared beginnings once; texts to be scored and embedded end here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trivium.generate.attending import Piece, PromptContext
from trivium.generate.cache import BLOCK, Cache, in_blocks
from trivium.generate.passes import Passes
from trivium.generate.rows import Row, Scored, shared_beginning
from trivium.model.lora import mixing, selection_of
from trivium.model.transformer import Transformer

CHUNK = 512
SCORES_AT_ONCE = 2**24


class Reader:
    """The rows whose prompts are not yet in the cache."""

    def __init__(self, model: Transformer, passes: Passes, cache: Cache, counts: dict[str, int]) -> None:
        self.rows: list[Row] = []
        self._passes, self._cache, self._counts = passes, cache, counts
        self._selection = selection_of(model)
        config = model.config
        self._device, self._vocabulary = model.device, config.vocabulary
        self._last_position = config.context - 1 if config.positions == "learned" else 2**62
        rotaries = (model.rotary, model.local_rotary)
        self.stretches = any(rotary is not None and rotary.grows for rotary in rotaries)

    def read(self, rows: Sequence[Row] | None = None) -> list[Row]:
        """Read one chunk, of these rows only where they are given; the rows whose prompts are now complete.

        What raises leaves every row as it was, so that the rows can then be read one by one.
        """
        pieces: list[Piece] = []
        reading: list[tuple[Row, int]] = []
        room, tokens = CHUNK, []
        for row in self.rows if rows is None else rows:
            if room <= 0:
                break
            if not row.ready_to_read(self._counts) or row.filled >= row.goal:
                continue
            if row.slides:
                forget_oldest(row, self._passes)
            free = (row.reserved_places() - row.length) // BLOCK * BLOCK
            count = min(row.goal - row.filled, room, free)
            padded = in_blocks(count)
            pieces.append(Piece(row, row.length, padded))
            tokens += row.tokens[row.filled : row.filled + count] + [0] * (padded - count)
            reading.append((row, count))
            room -= padded
        if pieces:
            reserved: Tensor | int = 0
            if self.stretches:
                sizes = torch.tensor([piece.count for piece in pieces])
                lengths = torch.tensor([row.reserved for row, _ in reading])
                reserved = lengths.repeat_interleave(sizes).to(self._device)
            context = PromptContext(
                pieces, reserved, self._last_position, together=self._passes.exactness.prompts
            )
            batch = torch.tensor(tokens, device=self._device)
            adapters = [row.adapter for row, _ in reading]
            with mixing(self._selection, adapters, [piece.count for piece in pieces]):
                if any(row.scored is not None for row, _ in reading):
                    self._take_in(self._passes.forward(batch, context), reading, pieces)
                else:
                    self._passes.fill(batch, context)
            for row, count in reading:
                row.filled += count
                row.length += count
                self._counts["prompt_tokens"] += count
        lenders = {id(row.lender) for row in self.rows if row.lender is not None}
        done = [row for row in self.rows if row.filled >= row.goal]
        # a scored row stays for those that wait to copy from it
        done = [row for row in done if row.scored is None or id(row) not in lenders]
        self.rows = [row for row in self.rows if row not in done]
        return done

    def _take_in(self, hidden: Tensor, reading: Sequence[tuple[Row, int]], pieces: Sequence[Piece]) -> None:
        """Keep what scoring and embedding want of what was read."""
        offset = 0
        wanted: list[Tensor] = []
        targets: list[int] = []
        owners: list[tuple[Scored, int]] = []
        totals: list[tuple[Scored, Tensor]] = []
        for (row, count), piece in zip(reading, pieces, strict=True):
            if row.pooled and row.scored is not None:
                # block by block, so that the sum does not show where chunks ended
                total = row.scored.total
                for block in hidden[offset : offset + count].split(BLOCK):
                    total = block.sum(0) if total is None else total + block.sum(0)
                assert total is not None, "a piece has tokens"
                totals.append((row.scored, total))
            elif row.scored is not None:
                first = max(row.scored.first - 1 - row.filled, 0)
                if first < count:
                    wanted.append(hidden[offset + first : offset + count])
                    targets += row.tokens[row.filled + first + 1 : row.filled + count + 1]
                    owners.append((row.scored, count - first))
            offset += piece.count
        logprobs: list[float] = []
        favourites: list[list[tuple[int, float]]] = []
        if wanted:
            top = max(scored.top for scored, _ in owners)
            logprobs, favourites = self._logprobs(
                torch.cat(wanted), torch.tensor(targets, device=self._device), top
            )
        # from here on nothing raises
        for scored, total in totals:
            scored.total = total
        start = 0
        for scored, count in owners:
            scored.logprobs += logprobs[start : start + count]
            for place in range(start, start + count) if scored.top else ():
                weighed = dict(favourites[place][: scored.top])
                scored.favourites.append({**weighed, targets[place]: logprobs[place]})
            start += count

    def _logprobs(
        self, hidden: Tensor, targets: Tensor, top: int
    ) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """Log-probabilities of the targets and of the `top` best, few at once so that scores stay small."""
        found: list[float] = []
        favourites: list[list[tuple[int, float]]] = []
        size = max(16, SCORES_AT_ONCE // self._vocabulary)
        for start in range(0, len(targets), size):
            scores = torch.log_softmax(self._passes.logits(hidden[start : start + size]), dim=-1)
            found += scores.gather(1, targets[start : start + size, None])[:, 0].tolist()
            if top:
                best, ids = scores.topk(min(top, self._vocabulary), dim=-1)
                rows = zip(ids.tolist(), best.tolist(), strict=True)
                favourites += [list(zip(*row, strict=True)) for row in rows]
        return found, favourites

    def hand_over(self, row: Row, heir: Row) -> bool:
        """Give a scored row's place to the next in line, if their texts begin alike and it fits."""
        assert row.pool is not None
        if heir.scored is None or heir.pooled:
            return False
        _, shared = shared_beginning(heir, [row], stretches=self.stretches)
        if not shared or self._cache.capacity_for(heir.reserved) != row.pool.capacity:
            return False
        row.pool.replace(row, heir, shared)
        heir.filled = shared
        self._counts["borrowed_tokens"] += shared
        self.rows.append(heir)
        return True

    def take(self, chosen: Callable[[Row], bool]) -> list[Row]:
        """Take rows out and free their places."""
        gone = [row for row in self.rows if chosen(row)]
        self.rows = [row for row in self.rows if not chosen(row)]
        for row in gone:
            assert row.pool is not None
            row.pool.leave(row)
        return gone


def forget_oldest(row: Row, passes: Passes) -> None:
    """Make room in a full sliding row: the oldest quarter after the sinks goes, the rest moves back."""
    assert row.generation is not None
    assert row.pool is not None
    slide, places = row.generation.request.slide, row.reserved_places()
    assert slide is not None
    if row.length < places:
        return
    gone = slide.at_once(places)
    cached = row.pool.storage[:, row.slot]
    for layer, places_of_layer in enumerate(cached):
        kept = places_of_layer[slide.sinks + gone : row.length].clone()
        kept[:, 0] = passes.turn_keys(kept[:, 0], layer, gone)
        places_of_layer[slide.sinks : row.length - gone] = kept
    row.length -= gone
