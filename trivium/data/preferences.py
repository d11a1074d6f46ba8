"""Preferences to tokens: pairs of answers, or single answers with a verdict, in TRL's forms and others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from trivium.data.conversations import Encoder, Piece
from trivium.data.counted import CountedBatches, CountedSource, CountedSources, RowReader, read_counted
from trivium.data.door import Place
from trivium.data.preference_forms import Form, recognised_form, shared_length
from trivium.data.rows import PackedSequence, row_of_documents
from trivium.data.settings import MixtureSource
from trivium.data.shapes import Example, Fields, arguments_of
from trivium.data.sources import Document
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint
from trivium.tokens.tokenizer import Tokenizer

PROMPT, CHOSEN, REJECTED, JUDGED, MISMATCHED = "prompt", "chosen", "rejected", "judged", "mismatched"
"""What a document of a row is, as its fact `role` says."""


@dataclass(frozen=True)
class Completion:
    """The tokens behind a prompt with the one that ends them, and which of them are the assistant's."""

    tokens: np.ndarray
    learned: np.ndarray


@dataclass(frozen=True)
class PreferencePair:
    """A prompt with a chosen and a rejected answer, or with one answer and how much it was liked."""

    id: str
    prompt: np.ndarray
    completions: tuple[Completion, ...]
    label: float = 1.0
    """How much a single answer was liked, from 0 to 1; a vote of nine in ten stays 0.9."""
    margin: float = 0.0
    """By how much the chosen answer is better, where the data says so."""
    weight: float = 1.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_pair(self) -> bool:
        """Whether there are two answers to compare."""
        return len(self.completions) == 2

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(answer.tokens) for answer in self.completions)


class PreferenceData(RowReader[PreferencePair]):
    """Reads the preferences of one source in the form its first row has, those whose answers fit whole."""

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        super().__init__()
        self.context = context
        self.encoder = Encoder(tokenizer, context)
        self.shape: Form | None = None

    def parsed(self, fields: Fields) -> tuple[Sequence[Example], list[Piece], tuple[float, float, float]]:
        if self.shape is None:
            self.shape = recognised_form(fields)
            self.tally.shape = self.shape.name
        examples = self._examples(self.shape, fields)
        return examples, [self.encoder.whole(one) for one in examples], _numbers(fields, self.shape)

    def fitted(self, document: Document, *parsed: Any) -> PreferencePair | None:
        examples, pieces, (label, margin, weight) = parsed
        kept = self._whole(document, examples, pieces)
        if kept is None:
            return None
        return PreferencePair(document.id, *_divided(kept), label, margin, weight, document.fields)

    def _examples(self, shape: Form, fields: Fields) -> tuple[Example, ...]:
        for column in shape.columns:
            if fields.get(column) is None:
                raise TriviumError(f"has no {column!r} as the first row of its source has")
        arguments = arguments_of(fields)
        return tuple(replace(example, **arguments) for example in shape.read(fields))

    def _whole(
        self, document: Document, examples: Sequence[Example], pieces: list[Piece]
    ) -> list[Piece] | None:
        """The answers whole: of what is too long the oldest turns go, alike for both, or the row goes."""
        before, why = sum(map(len, pieces)), "teaches nothing: an answer of it has no token"
        if any(len(piece) > self.context for piece in pieces):
            why = f"has {max(map(len, pieces))} tokens: its answers do not fit whole into {self.context}"
            pieces = self._shortened(examples) or []
        learned = [piece.predicted for piece in pieces]
        after = sum(map(len, pieces))
        cut = f"lost the oldest turns of its prompt, {before - after} tokens"
        total = sum(learned) if all(learned) else 0
        return pieces if self.tally.settle(document, before, after, total, why=why, cut=cut) else None

    def _shortened(self, examples: Sequence[Example]) -> list[Piece] | None:
        messages, given = examples[0].messages, examples[0].given
        system = next((i for i, one in enumerate(messages) if one["role"] != "system"), len(messages))
        for start in range(system + 1, given):
            if messages[start]["role"] != "user":
                continue
            pieces = [
                self.encoder.whole(
                    Example(
                        messages=(*example.messages[:system], *example.messages[start:]),
                        given=given - (start - system),
                        tools=example.tools,
                        template_arguments=example.template_arguments,
                    )
                )
                for example in examples
            ]
            if all(len(piece) <= self.context for piece in pieces):
                return pieces
        return None


def unpaired(pairs: Iterable[PreferencePair]) -> list[PreferencePair]:
    """Every pair as two single answers, the chosen one liked and the rejected one not."""
    found = []
    for one in pairs:
        if not one.is_pair:
            found.append(one)
            continue
        for name, label, answer in zip((CHOSEN, REJECTED), (1.0, 0.0), one.completions, strict=True):
            identity = f"{one.id}/{name}"
            found.append(replace(one, id=identity, completions=(answer,), label=label, margin=0.0))
    return found


def row_of(
    pairs: Sequence[PreferencePair],
    *,
    share: bool = True,
    mismatched: Sequence[Completion] | None = None,
    references: Sequence[Sequence[float]] | None = None,
    source: Sequence[int] | None = None,
) -> PackedSequence:
    """One row of all answers; where `share`, a prompt is a document of its own that its answers go on from.

    `mismatched` gives every prompt an answer to another one as well, which KTO compares with.
    The facts of a document: `back` (see `Branches`), `role`, `label`, `margin`, `weight`, `reference` (the
    summed log-probability its answer had under the reference, where `references` gives them).
    """
    documents: list[np.ndarray] = []
    learned: list[np.ndarray] = []
    ids: list[str] = []
    sources: list[int] = []
    facts: dict[str, list] = {name: [] for name in ("back", "role", "label", "margin", "weight", "reference")}
    for place, pair in enumerate(pairs):
        roles = (CHOSEN, REJECTED) if pair.is_pair else (JUDGED,)
        answers = list(zip(roles, pair.completions, strict=True))
        if mismatched is not None:
            answers.append((MISMATCHED, mismatched[place]))
        known = [0.0] * len(answers) if references is None else list(references[place])
        # The last token of a prompt goes with every answer: its hidden state predicts the first token.
        shares = share and len(answers) > 1 and len(pair.prompt) > 1
        beginning = pair.prompt[-1:] if shares else pair.prompt
        if shares:
            documents.append(pair.prompt[:-1])
            learned.append(np.zeros(len(pair.prompt) - 1, dtype=np.float32))
        for _, answer in answers:
            documents.append(np.concatenate((beginning, answer.tokens)))
            learned.append(np.concatenate((np.zeros(len(beginning)), answer.learned)).astype(np.float32))
        count = len(answers) + shares
        facts["back"] += range(count) if shares else [0] * count
        facts["role"] += [PROMPT] * shares + [role for role, _ in answers]
        facts["reference"] += [0.0] * shares + known
        for name in ("label", "margin", "weight"):
            facts[name] += [getattr(pair, name)] * count
        ids += [pair.id] * count
        sources += [0 if source is None else source[place]] * count
    return row_of_documents(documents, learned=learned, facts=facts, ids=ids, sources=sources)


def typical_tokens(pairs: Iterable[PreferencePair], *, whole: bool = False) -> float:
    """The tokens of a first answer in the mean over a step: no part of the batch can know them."""
    tokens = weights = 0.0
    for one in pairs:
        count = int(one.completions[0].learned.sum())
        if whole:
            count = len(one.prompt) + len(one.completions[0].tokens) - 1
        tokens += one.weight * count
        weights += one.weight
    return tokens / max(weights, 1e-12)


class PreferenceBatches(CountedBatches[PreferencePair]):
    """Preference pairs as batches: a row for each, or one for all of a step."""

    changed: ClassVar[str] = "preferences, their weights or the seed have changed"

    def __init__(
        self,
        sources: Sequence[CountedSource[PreferencePair]],
        *,
        share: bool = True,
        together: bool = False,
        mismatched: bool = False,
        whole_chosen: bool = False,
        **lasting: Any,
    ) -> None:
        super().__init__(sources, **lasting)
        self.share, self.together, self.mismatched = share, together, mismatched
        self.whole_chosen = whole_chosen
        self.memory: dict[str, float] = {}
        """What an objective wants to find again after a stop."""
        self.references: Sequence[np.ndarray] | None = None
        """For every source the log-probabilities [pairs, completions] under the reference, once computed."""

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.plan.hash, self.plan.batch, self.together, self.mismatched])

    def rows(self, step: int) -> list[PackedSequence]:
        places = self.plan.rows(step)
        groups = [places] if self.together else [[place] for place in places]
        progress, typical = step / max(1, self.steps - 1), self._typical(places)
        found = []
        for group in groups:
            row = self.row(group)
            count = len(row.lengths)
            facts = {**row.facts, "progress": [progress] * count, "typical": [typical] * count}
            found.append(replace(row, facts=facts))
        return found

    def _typical(self, places: Sequence[tuple[int, int]]) -> float:
        pairs = [self.sources[source].items[number] for source, number in places]
        return typical_tokens(pairs, whole=self.whole_chosen)

    def row(self, places: Sequence[tuple[int, int]]) -> PackedSequence:
        """One row of the pairs at these places, each a source and a number in it."""
        return row_of(
            [self.sources[source].items[number] for source, number in places],
            share=self.share,
            mismatched=[_mismatched(self.sources[source].items, number) for source, number in places]
            if self.mismatched
            else None,
            references=None
            if self.references is None
            else [self.references[source][number] for source, number in places],
            source=[source for source, _ in places],
        )

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {**self.order(), "memory": dict(self.memory)}, {}

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().restore(json, tensors)
        self.memory.clear()
        self.memory.update(json["memory"])


def _mismatched(pairs: Sequence[PreferencePair], number: int) -> Completion:
    """The answer of the nearest pair before this one that answers another prompt."""
    mine = pairs[number].prompt
    for back in range(1, len(pairs)):
        other = pairs[number - back]
        if not np.array_equal(other.prompt, mine):
            return other.completions[0]
    return pairs[number - 1].completions[0]


def _divided(pieces: Sequence[Piece]) -> tuple[np.ndarray, tuple[Completion, ...]]:
    """The prompt that all answers have in common, and each answer behind it."""
    masks = [piece.learned for piece in pieces if piece.learned is not None]
    assert len(masks) == len(pieces), "an answer is learned and its prompt is not"
    border = min(mask.index(True) for mask in masks)
    border = min(border, shared_length([piece.tokens for piece in pieces]))
    answers = tuple(
        Completion(np.array(piece.tokens[border:], dtype=np.int64), np.array(mask[border:], dtype=bool))
        for piece, mask in zip(pieces, masks, strict=True)
    )
    return np.array(pieces[0].tokens[:border], dtype=np.int64), answers


def _numbers(fields: Fields, shape: Form) -> tuple[float, float, float]:
    """Label, margin and weight of a row."""
    label = 1.0
    if "label" in shape.columns:
        label = _number(fields, "label", 1.0)
        if not 0 <= label <= 1:
            raise TriviumError(f"has the `label` {label:g}, which is not from 0 (disliked) to 1 (liked)")
    weight = _number(fields, "weight", 1.0)
    if weight < 0:
        raise TriviumError(f"has the `weight` {weight:g}, which is below 0")
    return label, _number(fields, "margin", 0.0), weight


def _number(fields: Fields, column: str, otherwise: float) -> float:
    value = fields.get(column)
    if value is None:
        return otherwise
    if isinstance(value, str):
        # Tables hold text alone.
        value = {"true": "1", "false": "0"}.get(value.lower(), value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TriviumError(f"has the `{column}` {value!r}, which is no number") from None
    if not np.isfinite(number):
        raise TriviumError(f"has the `{column}` {number}, which is no finite number")
    return number


Preferences = CountedSources[PreferencePair]


def read_preferences(
    work: Place,
    mixture: Mapping[str, MixtureSource],
    tokenizer: Tokenizer,
    context: int,
    *,
    single: bool = False,
) -> Preferences:
    """Read every source; where `single`, pairs count as two answers, else every row has to be a pair."""

    def accept(name: str, pairs: list[PreferencePair]) -> list[PreferencePair]:
        if not single and not all(one.is_pair for one in pairs):
            raise TriviumError(
                f"{name}: holds single answers with a `label`, and this loss compares two; use `loss: kto`, "
                "apo_zero_unpaired or bco, or give it `chosen` and `rejected`."
            )
        return unpaired(pairs) if single else pairs

    return read_counted(
        work, mixture, lambda: PreferenceData(tokenizer, context), accept=accept,
        called="pairs", cut="without their oldest turns", learned="in answers",
    )  # fmt: skip


def prompts_of(sources: Sequence[CountedSource[PreferencePair]], most: int) -> list[PreferencePair]:
    """Up to `most` pairs with different prompts, some of every source."""
    found: dict[bytes, PreferencePair] = {}
    queues = [list(source.items) for source in sources]
    for place in range(max(map(len, queues), default=0)):
        for queue in queues:
            if place < len(queue) and len(found) < most:
                found.setdefault(queue[place].prompt.tobytes(), queue[place])
    return list(found.values())
