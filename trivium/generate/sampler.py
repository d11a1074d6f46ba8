"""The sampler: the settings of all rows in flight as tensors, so that one pass chooses every row's token."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from trivium.generate.constraints import Constraint, allowed_tokens
from trivium.generate.sampling import NEVER, Sampling, draw, filter_scores, greedy, penalise, uniforms


class Chosen(NamedTuple):
    """The tokens of one step with their log-probabilities under the distribution they were drawn from."""

    tokens: Tensor
    logprobs: Tensor | None
    alternatives: tuple[Tensor, Tensor, Tensor] | None
    ended: Tensor | None
    """None where no row can have ended."""


class Entrant(NamedTuple):
    """A row that joins: its settings, its seed, its prompt, what ends it, and a grammar it must follow."""

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    stop_ids: Sequence[int]
    constraint: Constraint | None


_FLOATS = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")


class Sampler:
    """Per-row sampling settings that follow the rows as they come, move and go."""

    def __init__(self, vocabulary: int, device: torch.device | str) -> None:
        self.vocabulary, self.device = vocabulary, torch.device(device)
        self.settings: list[Sampling] = []
        self.constraints: list[Constraint | None] = []
        self._rows: dict[str, Tensor] = {}
        self._tables: dict[str, Tensor] = {}
        self._read()

    def rearrange(self, keep: Sequence[int], entrants: Sequence[Entrant]) -> None:
        """Keep these rows in this order and put the entrants behind them."""
        fresh = self._enter(entrants)
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        rows: dict[str, Tensor] = {}
        for name in self._rows.keys() | fresh.keys():
            parts = [
                part for part in (_take(self._rows.get(name), index), fresh.get(name)) if part is not None
            ]
            rows[name] = _stack(parts)
        settings = [self.settings[row] for row in keep] + [entrant.sampling for entrant in entrants]
        tables = self._adjusted(settings, keep, entrants)
        # only now, so that an entrant that cannot enter leaves the others as they were
        self._rows, self.settings, self._tables = rows, settings, tables
        self.constraints = [self.constraints[row] for row in keep] + [
            entrant.constraint for entrant in entrants
        ]
        self._read()

    def alone(self, row: int | Entrant) -> Sampler:
        """A sampler of one row, one of this sampler's or one that has yet to enter; this one is unchanged."""
        other = copy(self)
        if isinstance(row, int):
            other.rearrange([row], [])
        else:
            other.rearrange([], [row])
        return other

    def _enter(self, entrants: Sequence[Entrant]) -> dict[str, Tensor]:
        if not entrants:
            return {}
        settings = [entrant.sampling for entrant in entrants]
        rows: dict[str, Tensor] = {
            name: torch.tensor([[getattr(one, name)] for one in settings], dtype=torch.float32)
            for name in _FLOATS
        }
        # a double holds top_p exactly as written; temperature 0 takes the greedy road and must not divide
        rows["top_p"] = torch.tensor([[one.top_p] for one in settings], dtype=torch.float64)
        rows["typical_p"] = torch.tensor([[one.typical_p] for one in settings], dtype=torch.float64)
        rows["temperature"] = torch.tensor(
            [[one.temperature or 1.0] for one in settings], dtype=torch.float32
        )
        rows["greedy"] = torch.tensor([[one.greedy] for one in settings])
        rows["top_k"] = torch.tensor([[one.top_k] for one in settings])
        rows["least"] = torch.tensor([[one.min_new_tokens] for one in settings])
        rows["most"] = torch.tensor([[one.max_new_tokens] for one in settings])
        rows["count"] = torch.zeros(len(entrants), 1, dtype=torch.long)
        rows["last"] = torch.tensor([[entrant.prompt[-1] if entrant.prompt else 0] for entrant in entrants])
        width = max((len(entrant.stop_ids) for entrant in entrants), default=0)
        # a tokenizer may end texts with tokens that the model lacks: what is no id of the model ends nothing,
        # and lands in the spare column when logits are masked
        ends = [
            [one if 0 <= one < self.vocabulary else self.vocabulary for one in entrant.stop_ids]
            for entrant in entrants
        ]
        stops = [some + [self.vocabulary] * (width - len(some)) for some in ends]
        rows["stops"] = torch.tensor(stops, dtype=torch.long).reshape(len(entrants), width)
        steps = max(one.max_new_tokens for one in settings)
        numbers = torch.zeros(len(entrants), steps, dtype=torch.float64)
        for row, entrant in enumerate(entrants):
            if not entrant.sampling.greedy:
                length = entrant.sampling.max_new_tokens
                numbers[row, :length] = torch.from_numpy(uniforms(entrant.seed, length))
        rows["uniforms"] = numbers
        rows["drawn"] = torch.zeros(len(entrants), steps, dtype=torch.long)
        rows["drawn_logprobs"] = torch.zeros(len(entrants), steps)
        return {name: value.to(self.device) for name, value in rows.items()}

    def _adjusted(
        self, settings: Sequence[Sampling], keep: Sequence[int], entrants: Sequence[Entrant]
    ) -> dict[str, Tensor]:
        """The tables as wide as the vocabulary, which exist only while some row needs them."""
        old, rows = self._tables, len(settings)
        tables: dict[str, Tensor] = {}
        wanted = {
            "seen": any(one.repetition_penalty != 1 for one in settings),
            "said": any(one.penalised for one in settings),
            "bias": any(one.logit_bias for one in settings),
        }
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        for name, needed in wanted.items():
            if not needed:
                continue
            kind = torch.bool if name == "seen" else torch.float32
            tables[name] = torch.zeros(rows, self.vocabulary, dtype=kind, device=self.device)
            if name in old and keep:
                tables[name][: len(keep)] = old[name].index_select(0, index)
            for row, entrant in enumerate(entrants, start=len(keep)):
                if name == "seen" and entrant.sampling.repetition_penalty != 1:
                    tables[name][row, torch.tensor(entrant.prompt, dtype=torch.long, device=self.device)] = (
                        True
                    )
                if name == "bias":
                    for token, value in entrant.sampling.logit_bias.items():
                        tables[name][row, token] = value
        return tables

    def _read(self) -> None:
        """What this set of rows needs, decided once per change of membership instead of once per step."""
        settings = self.settings
        self.all_greedy = all(one.greedy for one in settings)
        self.any_greedy = any(one.greedy for one in settings)
        self.any_filter = any(one.filtered for one in settings if not one.greedy)
        self.any_penalty = any(one.penalised for one in settings)
        self.any_bias = any(one.logit_bias for one in settings)
        self.any_tempered = any(one.temperature not in (0.0, 1.0) for one in settings)
        self.any_logprobs = any(one.logprobs for one in settings)
        self.alternatives = max((one.top_logprobs for one in settings), default=0)
        self.any_constraint = any(one is not None for one in self.constraints)
        self._guarded_steps = max((one.min_new_tokens for one in settings), default=0)
        left = (self._rows["most"] - self._rows["count"]) if settings else torch.zeros(1)
        self._steps_left = int(left.min())

    @property
    def count(self) -> Tensor:
        """How many tokens each row has drawn, [N, 1]."""
        return self._rows["count"]

    @property
    def last(self) -> Tensor:
        """The token each row ends with now, [N]."""
        return self._rows["last"][:, 0]

    def drawn(self, row: int) -> tuple[list[int], list[float]]:
        """Everything a row has drawn, with its log-probabilities."""
        count = int(self.count[row])
        rows = self._rows
        return rows["drawn"][row, :count].tolist(), rows["drawn_logprobs"][row, :count].tolist()

    @property
    def stops(self) -> Tensor:
        """The ids that end each row, [N, S]."""
        return self._rows["stops"]

    def choose(self, logits: Tensor) -> Chosen:
        """One token per row from logits [N, V], which may be overwritten; what raises draws nothing."""
        rows = self._rows
        alternatives = None
        if self.alternatives:
            own = torch.log_softmax(logits, dim=-1)
            alternatives = (own, *own.topk(min(self.alternatives, self.vocabulary), dim=-1))
        scores = self._shape(logits)
        if self.all_greedy:
            best, tokens = scores.max(dim=-1)
            logprobs = best - torch.logsumexp(scores, dim=-1) if self.any_logprobs else None
        else:
            tempered = scores / rows["temperature"] if self.any_tempered else scores
            if self.any_filter:
                flat = (rows[name][:, 0] for name in ("top_k", "top_p", "min_p", "typical_p"))
                tempered = filter_scores(tempered, *flat)
            tokens, logprobs = draw(tempered, rows["uniforms"].gather(1, rows["count"]))
            if self.any_greedy:
                best, best_logprobs = greedy(scores)
                tokens = torch.where(rows["greedy"][:, 0], best, tokens)
                logprobs = torch.where(rows["greedy"][:, 0], best_logprobs, logprobs)
        if alternatives is not None:
            own, values, ids = alternatives
            alternatives = (own.gather(1, tokens[:, None])[:, 0], values, ids)
        rows["last"] = tokens[:, None]
        rows["drawn"].scatter_(1, rows["count"], rows["last"])
        if logprobs is not None:
            rows["drawn_logprobs"].scatter_(1, rows["count"], logprobs[:, None])
        rows["count"] += 1
        self._steps_left -= 1
        ended = None
        if self.stops.shape[1]:
            ended = (rows["last"] == self.stops).any(-1)
        if self._steps_left <= 0:
            full = (rows["count"] >= rows["most"])[:, 0]
            ended = full if ended is None else ended | full
        if "said" in self._tables:
            self._tables["said"].scatter_add_(1, tokens[:, None], torch.ones_like(rows["temperature"]))
        return Chosen(tokens, logprobs, alternatives, ended)

    def _shape(self, logits: Tensor) -> Tensor:
        """Penalties, bias, grammar and minimum length, which act before temperature."""
        rows = self._rows
        if self.any_penalty:
            said = self._tables["said"]
            seen = self._tables.get("seen", torch.zeros((), dtype=torch.bool, device=self.device))
            penalties = (rows["repetition_penalty"], rows["presence_penalty"], rows["frequency_penalty"])
            logits = penalise(logits, seen, said, *penalties)
        if self.any_bias:
            logits = logits + self._tables["bias"]
        if self.any_constraint:
            logits = logits.masked_fill(
                ~allowed_tokens(self.constraints, self.vocabulary, self.device), NEVER
            )
        if self._guarded_steps and self.stops.shape[1]:
            early = (rows["count"] < rows["least"]) & (self.stops >= 0)
            spare = torch.where(early, self.stops, self.vocabulary)
            barred = torch.zeros(logits.shape[0], self.vocabulary + 1, dtype=torch.bool, device=self.device)
            longer = logits.masked_fill(barred.scatter_(1, spare, True)[:, :-1], NEVER)
            # where a grammar admits nothing but the end, the text ends early
            logits = torch.where((longer > NEVER).any(-1, keepdim=True), longer, logits)
        return logits


def _take(table: Tensor | None, index: Tensor) -> Tensor | None:
    return table.index_select(0, index) if table is not None and len(index) else None


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """One table below the other; the narrower is padded with a value that means nothing."""
    if not parts:
        return torch.zeros(0, 1)
    width = max(part.shape[1] for part in parts)
    padded = []
    for part in parts:
        filler = part.new_full((part.shape[0], width - part.shape[1]), -1) if part.shape[1] < width else None
        padded.append(part if filler is None else torch.cat([part, filler], dim=1))
    return torch.cat(padded)
