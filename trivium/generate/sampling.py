"""How the next token is chosen: the settings of each sequence, applied to a whole batch at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import field
from numbers import Integral, Real
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf, Strict, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor

from trivium.generate.constraints import Constraint, allowed_tokens
from trivium.kit.errors import TriviumError

NEVER = float("-inf")
SHORTLIST = 64
# What these settings may be so that float32 scores stay finite: beyond them one token would always win.
MINIMUM_TEMPERATURE, MAXIMUM_TEMPERATURE = 1e-6, 100.0
MINIMUM_REPETITION, MAXIMUM_REPETITION = 0.01, 100.0
MAXIMUM_PENALTY = 100.0
MAXIMUM_BIAS = 100.0


def _plain(kind: type) -> BeforeValidator:
    """Turn numpy's numbers into Python's; a text is no number."""

    def convert(value: Any) -> Any:
        abstract = Integral if kind is int else Real
        return kind(value) if isinstance(value, abstract) else value

    return BeforeValidator(convert)


def _must(rule: str, **bounds: Any) -> Any:
    return Field(description=rule, **bounds)


def _between(least: float, most: float, note: str = "") -> Any:
    return _must(f"a number from {least:g} to {most:g}{note}", ge=least, le=most)


Number = Annotated[float, Strict(), _plain(float)]
Whole = Annotated[int, Strict(), _plain(int)]
Share = Annotated[Number, _must("a number above 0 and at most 1", gt=0, le=1)]
Penalty = Annotated[Number, _between(-MAXIMUM_PENALTY, MAXIMUM_PENALTY)]
Repetition = Annotated[Number, _between(MINIMUM_REPETITION, MAXIMUM_REPETITION, " (1 changes nothing)")]
Biases = dict[Whole, Annotated[Number, Field(ge=-MAXIMUM_BIAS, le=MAXIMUM_BIAS)]]
_TEMPERATURES = f"0 (greedy) or a number from {MINIMUM_TEMPERATURE:g} to {MAXIMUM_TEMPERATURE:g}"
_BIASES = f"a mapping of token ids to numbers from {-MAXIMUM_BIAS:g} to {MAXIMUM_BIAS:g}"


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Sampling:
    """What a person may ask of one generation; the defaults sample from the model's own distribution."""

    temperature: Annotated[Number, _must(_TEMPERATURES, ge=0, le=MAXIMUM_TEMPERATURE)] = 1.0
    top_k: Annotated[Whole, _must("at least 0, and whole (0 keeps every token)", ge=0)] = 0
    top_p: Share = 1.0
    min_p: Annotated[Number, _must("between 0 and 1", ge=0, le=1)] = 0.0
    typical_p: Share = 1.0
    repetition_penalty: Repetition = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[Biases, _must(_BIASES)] = field(default_factory=dict)
    seed: Annotated[Whole | None, _must("a whole number")] = None
    max_new_tokens: Annotated[Whole, _must("at least 1, and whole", ge=1)] = 128
    min_new_tokens: Annotated[Whole, _must("from 0 to max_new_tokens, and whole", ge=0)] = 0
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1)], ...], _must("a list of texts that are not empty")
    ] = ()
    stop_ids: Annotated[tuple[Whole, ...] | None, _must("a list of token ids")] = None
    logprobs: Annotated[bool, _must("true or false")] = False
    top_logprobs: Annotated[Whole, _must("at least 0, and whole", ge=0)] = 0
    json_schema: Annotated[InstanceOf[Mapping] | None, _must("a mapping")] = None
    regex: Annotated[str | None, _must("a text")] = None

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, settings: Any, validate: Callable[[Any], Sampling]) -> Sampling:
        """Turn what pydantic finds into one sentence."""
        try:
            checked = validate(settings)
        except ValidationError as error:
            wrong = error.errors()[0]
            raise _refusal(str(wrong["loc"][0]), wrong["input"]) from None
        if 0 < checked.temperature < MINIMUM_TEMPERATURE:
            raise _refusal("temperature", checked.temperature)
        if checked.min_new_tokens > checked.max_new_tokens:
            raise _refusal("min_new_tokens", checked.min_new_tokens)
        if checked.json_schema is not None and checked.regex is not None:
            raise TriviumError("sampling: json_schema and regex exclude each other; keep one of them.")
        return checked

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken each time."""
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether some tokens are ruled out before the draw."""
        return bool(self.top_k) or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1

    @property
    def penalised(self) -> bool:
        """Whether what was already said changes what may follow."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _refusal(name: str, value: Any) -> TriviumError:
    """The sentence for a setting that cannot be."""
    rules = Sampling.__pydantic_fields__  # type: ignore[attr-defined]
    if name not in rules:
        return TriviumError(f"sampling has no setting {name!r}; it has {', '.join(rules)}.")
    return TriviumError(f"sampling: {name} must be {rules[name].description}, not {value!r}.")


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def uniforms(seed: int, count: int, start: int = 0) -> np.ndarray:
    """A row's random numbers in [0, 1): a pure function of seed and position, never of the batch."""
    places = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = _mix(_mix(np.array([seed % 2**64], dtype=np.uint64)) + places * np.uint64(0x9E3779B97F4A7C15))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of_sample(seed: int, sample: int) -> int:
    """The seed of sample `sample` of a request; sample 0 keeps the request's own."""
    if sample == 0:
        return seed
    with np.errstate(over="ignore"):
        return int(
            _mix(
                np.array([seed % 2**64], dtype=np.uint64) + np.uint64(sample) * np.uint64(0xD1342543DE82EF95)
            )[0]
        )


def penalise(
    logits: Tensor, seen: Tensor, counts: Tensor, repetition: Tensor, presence: Tensor, frequency: Tensor
) -> Tensor:
    """Repetition penalty over prompt and answer (Keskar 2019), presence and frequency over the answer."""
    shrunk = torch.where(logits < 0, logits * repetition, logits / repetition)
    logits = torch.where(seen | (counts > 0), shrunk, logits)
    return logits - frequency * counts - presence * (counts > 0)


class Filters(NamedTuple):
    """Which filters some row of a batch has, known where the batch is put together."""

    nucleus: bool
    largest_k: int
    bounded: bool
    """Whether all rows that are cut by top-p have a top-k as well."""
    min_p: bool
    typical: bool
    waits: bool = True
    """Whether the host may wait for numbers in order to sort fewer scores."""

    @classmethod
    def of(cls, settings: Sequence[Sampling], *, waits: bool) -> Filters:
        """What these rows have."""
        drawn = [one for one in settings if not one.greedy]
        return cls(
            nucleus=any(one.top_k or one.top_p < 1 for one in settings),
            largest_k=max((one.top_k for one in settings), default=0),
            bounded=all(one.top_k or one.top_p == 1 for one in drawn),
            min_p=any(one.min_p > 0 for one in settings),
            typical=any(one.typical_p < 1 for one in settings),
            waits=waits,
        )


def _nucleus(scores: Tensor, top_k: Tensor, top_p: Tensor, filters: Filters | None) -> Tensor:
    """The lowest score a row keeps under top-k, then top-p over what top-k left; ties stay together."""
    width = scores.shape[-1]
    largest_k = int(top_k.max()) if filters is None else filters.largest_k
    shortlist = min(width, max(SHORTLIST, largest_k))
    if hurries := filters is not None and not filters.waits:
        assert filters is not None
        shortlist = shortlist if filters.bounded else width
    best = torch.topk(scores, shortlist, dim=-1).values
    limit = torch.where(top_k > 0, top_k.clamp(max=width), width)
    whole = torch.logsumexp(scores, dim=-1, keepdim=True)
    if hurries:
        return _cut(best, limit, top_k > 0, top_p, whole)
    settled = torch.exp(best - whole).sum(-1) >= top_p + 1e-5
    settled |= (top_k > 0) | (top_p >= 1)
    bounded = top_k > 0
    threshold = _cut(best, limit, bounded, top_p, whole)
    if not bool(settled.all()):
        flat = (~settled).nonzero()[:, 0]
        ordered = torch.sort(scores[flat], dim=-1, descending=True).values
        threshold[flat] = _cut(ordered, limit[flat], bounded[flat], top_p[flat], whole[flat])
    return threshold


def _cut(best: Tensor, limit: Tensor, bounded: Tensor, top_p: Tensor, whole: Tensor) -> Tensor:
    """The score of the last kept token, from scores sorted downwards."""
    places = torch.arange(best.shape[-1], device=best.device)
    # sums run in double and in order, so that the width of the list does not change where a row is cut
    mass = torch.exp((best - whole).double()).masked_fill(places >= limit[:, None], 0.0)
    running = mass.cumsum(-1)
    total = torch.where(bounded[:, None], running[:, -1:], 1.0)
    inside = ((running - mass) < top_p[:, None] * total) | (top_p >= 1)[:, None]
    last = (inside & (places < limit[:, None])).sum(-1, keepdim=True).clamp(min=1) - 1
    everything = ~bounded & (top_p >= 1)
    return torch.where(everything[:, None], NEVER, best.gather(-1, last))[:, 0]


def _typical(scores: Tensor, typical_p: Tensor) -> Tensor:
    """Locally typical sampling (Meister et al. 2022): keep what is about as surprising as expected."""
    logs = torch.log_softmax(scores, dim=-1)
    mass = logs.exp()
    expected = -(logs * mass).nansum(-1, keepdim=True)
    distance = (-logs - expected).abs()
    ordered, order = torch.sort(distance, dim=-1, stable=True)
    running = mass.gather(-1, order).cumsum(-1, dtype=torch.float64)
    last = (running < typical_p[:, None]).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    ruled_out = (distance > ordered.gather(-1, last)) & (typical_p < 1)[:, None]
    return scores.masked_fill(ruled_out, NEVER)


def filter_scores(
    scores: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    typical_p: Tensor,
    *,
    filters: Filters | None = None,
) -> Tensor:
    """Scores [N, V] (already divided by temperature), with minus infinity for what each row rules out."""
    threshold = torch.full_like(scores[:, 0], NEVER)
    if filters.nucleus if filters else bool(((top_k > 0) | (top_p < 1)).any()):
        threshold = _nucleus(scores, top_k, top_p, filters)
    if filters.min_p if filters else bool((min_p > 0).any()):
        floor = scores.amax(-1) + torch.log(min_p)
        threshold = torch.maximum(threshold, floor)
    scores = torch.where(scores < threshold[:, None], NEVER, scores)
    typical = filters.typical if filters else bool((typical_p < 1).any())
    return _typical(scores, typical_p) if typical else scores


def filtered_log_probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities [N, V] under one sampling's temperature and filters: what the engine drew from."""
    scores = logits.float() / (sampling.temperature or 1.0)
    if sampling.filtered and not sampling.greedy:
        row = scores.new_ones(scores.shape[0])
        scores = filter_scores(
            scores,
            (row * sampling.top_k).long(),
            row.double() * sampling.top_p,
            row * sampling.min_p,
            row.double() * sampling.typical_p,
        )
    return torch.log_softmax(scores, dim=-1)


def draw(scores: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverting the cumulative distribution, and its log-probability."""
    mass = torch.softmax(scores, dim=-1)
    running = mass.cumsum(-1, dtype=torch.float64)
    tokens = torch.searchsorted(running, uniform * running[:, -1:], right=True)
    tokens.clamp_(max=scores.shape[-1] - 1)
    return tokens[:, 0], mass.gather(-1, tokens)[:, 0].log()


def greedy(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row (lowest id among equals), and its log-probability at temperature 1."""
    best, tokens = scores.max(dim=-1)
    return tokens, best - torch.logsumexp(scores, dim=-1)


class Chosen(NamedTuple):
    """The tokens of one step with their log-probabilities under the distribution they were drawn from."""

    tokens: Tensor
    logprobs: Tensor | None
    alternatives: tuple[Tensor, Tensor, Tensor] | None
    ended: Tensor | None
    """None where no row can have ended."""


class SequenceSampling(NamedTuple):
    """How one sequence is sampled: its settings, seed, prompt, stop ids, and the form it must follow."""

    sampling: Sampling
    seed: int
    prompt: Sequence[int]
    stop_ids: Sequence[int]
    constraint: Constraint | None


_FLOATS = ("temperature", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_DOUBLES = ("top_p", "typical_p")  # a double holds them exactly as written
_OTHERS = ("greedy", "top_k", "min_new_tokens", "max_new_tokens")


class Sampler:
    """The sampling settings of all sequences in decode, as tensors that follow them as they come and go."""

    def __init__(self, vocabulary: int, device: torch.device | str, *, waits: bool = True) -> None:
        """Without `waits` no draw makes the host wait for the device."""
        self.vocabulary, self.device, self.waits = vocabulary, torch.device(device), waits
        self.settings: list[Sampling] = []
        self.constraints: list[Constraint | None] = []
        self._rows: dict[str, Tensor] = {}
        self._tables: dict[str, Tensor] = {}
        self._summarise()

    def rearrange(self, keep: Sequence[int], entering: Sequence[SequenceSampling]) -> None:
        """Keep these rows in this order and put those that enter behind them."""
        fresh = self._enter(entering)
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        rows: dict[str, Tensor] = {}
        for name in self._rows.keys() | fresh.keys():
            parts = (_take(self._rows.get(name), index), fresh.get(name))
            rows[name] = _stack([part for part in parts if part is not None])
        settings = [self.settings[row] for row in keep] + [one.sampling for one in entering]
        tables = self._adjusted(settings, keep, entering)
        # only now, so that what cannot enter leaves the others as they were
        self._rows, self.settings, self._tables = rows, settings, tables
        self.constraints = [self.constraints[row] for row in keep] + [one.constraint for one in entering]
        self._summarise()

    def part(self, rows: Sequence[int]) -> Sampler:
        """A sampler of these rows alone, which draws as they do; this one is unchanged."""
        other = copy(self)
        other.rearrange(rows, [])
        return other

    def alone(self, row: int | SequenceSampling) -> Sampler:
        """A sampler of one row, one of this sampler's or one that has yet to enter; this one is unchanged."""
        if isinstance(row, int):
            return self.part([row])
        other = copy(self)
        other.rearrange([], [row])
        return other

    def forked(self, rows: Sequence[int]) -> Sampler:
        """A part that may run ahead: it draws with the same numbers, and follows grammars in copies."""
        other = self.part(rows)
        other.constraints = [None if one is None else one.fork() for one in other.constraints]
        other.any_logprobs, other.alternatives = False, 0
        return other

    def choose_of(self, rows: Sequence[int], logits: Tensor) -> Chosen:
        """One token of each of these rows from their logits [n, V]; the others stay as they are."""
        if list(rows) == list(range(len(self.settings))):
            return self.choose(logits)
        part = self.part(rows)
        chosen = part.choose(logits)
        index = torch.tensor(rows, device=self.device)
        for name in ("last", "count", "drawn", "drawn_logprobs"):
            self._rows[name][index] = part._rows[name]
        if "generated" in part._tables:
            self._tables["generated"][index] = part._tables["generated"]
        self._steps_left -= 1  # of the row with the fewest left it may now be too few: it is only looked at
        return chosen

    def _enter(self, entering: Sequence[SequenceSampling]) -> dict[str, Tensor]:
        """The rows of those that enter: their settings, [N, 1], and what they will draw with, [N, steps]."""
        if not entering:
            return {}
        settings = [one.sampling for one in entering]
        rows: dict[str, Tensor] = {}
        for names, dtype in ((_FLOATS, torch.float32), (_DOUBLES, torch.float64), (_OTHERS, None)):
            for name in names:
                rows[name] = torch.tensor([[getattr(one, name)] for one in settings], dtype=dtype)
        # temperature 0 is greedy and must not divide
        rows["temperature"].masked_fill_(rows["greedy"], 1.0)
        rows["count"] = torch.zeros(len(entering), 1, dtype=torch.long)
        rows["last"] = torch.tensor([[one.prompt[-1] if one.prompt else 0] for one in entering])
        # a tokenizer may end texts with tokens that the model lacks: what is no id of the model ends nothing,
        # and lands in the spare column when logits are masked
        width = max(len(one.stop_ids) for one in entering)
        stops = torch.full((len(entering), width), self.vocabulary)
        steps = max(one.max_new_tokens for one in settings)
        numbers = torch.zeros(len(entering), steps, dtype=torch.float64)
        for row, one in enumerate(entering):
            known = [token for token in one.stop_ids if 0 <= token < self.vocabulary]
            stops[row, : len(known)] = torch.tensor(known, dtype=torch.long)
            if not one.sampling.greedy:
                length = one.sampling.max_new_tokens
                numbers[row, :length] = torch.from_numpy(uniforms(one.seed, length))
        rows["stops"], rows["uniforms"] = stops, numbers
        rows["drawn"] = torch.zeros(len(entering), steps, dtype=torch.long)
        rows["drawn_logprobs"] = torch.zeros(len(entering), steps)
        return {name: value.to(self.device) for name, value in rows.items()}

    def _adjusted(
        self, settings: Sequence[Sampling], keep: Sequence[int], entering: Sequence[SequenceSampling]
    ) -> dict[str, Tensor]:
        """The tables [N, vocabulary], which exist only while some row needs them."""
        wanted = {
            "seen": any(one.repetition_penalty != 1 for one in settings),
            "generated": any(one.penalised for one in settings),
            "bias": any(one.logit_bias for one in settings),
        }
        tables: dict[str, Tensor] = {}
        index = torch.tensor(keep, dtype=torch.long, device=self.device)
        for name in (name for name, needed in wanted.items() if needed):
            kind = torch.bool if name == "seen" else torch.float32
            table = torch.zeros(len(settings), self.vocabulary, dtype=kind, device=self.device)
            tables[name] = table
            if name in self._tables and keep:
                table[: len(keep)] = self._tables[name].index_select(0, index)
            for row, one in enumerate(entering, start=len(keep)):
                if name == "seen" and one.sampling.repetition_penalty != 1:
                    table[row, torch.tensor(one.prompt, dtype=torch.long, device=self.device)] = True
                if name == "bias":
                    for token, value in one.sampling.logit_bias.items():
                        table[row, token] = value
        return tables

    def _summarise(self) -> None:
        """What this set of rows needs, decided once per change of membership instead of once per step."""
        settings = self.settings
        self.all_greedy = all(one.greedy for one in settings)
        self.any_greedy = any(one.greedy for one in settings)
        self.any_filter = any(one.filtered for one in settings if not one.greedy)
        self._filters = Filters.of(settings, waits=self.waits)
        self.any_penalty = any(one.penalised for one in settings)
        self.any_bias = any(one.logit_bias for one in settings)
        self.any_tempered = any(one.temperature not in (0.0, 1.0) for one in settings)
        self.any_logprobs = any(one.logprobs for one in settings)
        self.alternatives = max((one.top_logprobs for one in settings), default=0)
        self.any_constraint = any(one is not None for one in self.constraints)
        self._guarded_steps = max((one.min_new_tokens for one in settings), default=0)
        left = (self._rows["max_new_tokens"] - self._rows["count"]) if settings else torch.zeros(1)
        self._steps_left = int(left.min())

    @property
    def steps_left(self) -> int:
        """How many tokens may yet be drawn before a row may be full."""
        return self._steps_left

    @property
    def count(self) -> Tensor:
        """How many tokens each row has drawn, [N, 1]."""
        return self._rows["count"]

    @property
    def last(self) -> Tensor:
        """The token each row ends with now, [N]."""
        return self._rows["last"][:, 0]

    def drawn(self, row: int, surplus: int = 0) -> tuple[list[int], list[float]]:
        """Everything a row has drawn, with its log-probabilities, but for the last `surplus` tokens."""
        count = int(self.count[row]) - surplus
        rows = self._rows
        return rows["drawn"][row, :count].tolist(), rows["drawn_logprobs"][row, :count].tolist()

    def drawn_since(self, row: int, start: int) -> list[int]:
        """What a row has drawn after its first `start` tokens."""
        drawn: list[int] = self._rows["drawn"][row, start : int(self.count[row])].tolist()
        return drawn

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
                tempered = filter_scores(tempered, *flat, filters=self._filters)
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
            full = (rows["count"] >= rows["max_new_tokens"])[:, 0]
            ended = full if ended is None else ended | full
        if "generated" in self._tables:
            self._tables["generated"].scatter_add_(1, tokens[:, None], torch.ones_like(rows["temperature"]))
        return Chosen(tokens, logprobs, alternatives, ended)

    def _shape(self, logits: Tensor) -> Tensor:
        """Penalties, bias, grammar and minimum length, which act before temperature."""
        rows = self._rows
        if self.any_penalty:
            generated = self._tables["generated"]
            seen = self._tables.get("seen", torch.zeros((), dtype=torch.bool, device=self.device))
            penalties = (rows["repetition_penalty"], rows["presence_penalty"], rows["frequency_penalty"])
            logits = penalise(logits, seen, generated, *penalties)
        if self.any_bias:
            logits = logits + self._tables["bias"]
        if self.any_constraint:
            allowed = torch.from_numpy(allowed_tokens(self.constraints, self.vocabulary))
            logits = logits.masked_fill(~allowed.to(self.device), NEVER)
        if self._guarded_steps and self.stops.shape[1]:
            early = (rows["count"] < rows["min_new_tokens"]) & (self.stops >= 0)
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
