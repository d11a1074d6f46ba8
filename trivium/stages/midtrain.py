"""Mid-training: a trained model goes on learning, for a purpose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from trivium.data.mixture import weight_at, weights_over
from trivium.data.packed import Ingredient, PackedBatches
from trivium.data.shards import Shards, in_validation, text_hash
from trivium.data.sources import Reading
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.learn.objective import BatchSource
from trivium.learn.objectives.next_token import NextToken
from trivium.model.config import ModelConfig
from trivium.model.context_extension import describe_positions, extend_context
from trivium.model.flops import flops_per_token, parameter_count
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.model.preset import preset
from trivium.model.transformer import Transformer
from trivium.model.vocabulary import Compression, Start, compression, grow_vocabulary
from trivium.stages.parts.context_extension import ContextSetting
from trivium.stages.parts.documents import Sources, documents, source_references
from trivium.stages.parts.inheritance import consumed_by, held_out_by, learnt_by, trained_on
from trivium.stages.parts.mixtures import (
    MEASURED,
    Mixture,
    Portion,
    TokenisedData,
    held_out_share,
    held_out_texts,
    ingredients,
    mixture_references,
    validation_rows,
)
from trivium.stages.parts.parents import moments_after, rates_after
from trivium.stages.parts.ramps import Knots, RampedBatches
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import FedStage, train, with_new_rows
from trivium.tokens.extend import extend_tokenizer
from trivium.tokens.tokenizer import Tokenizer

EASED = 16
"""Straight pieces that stand for one half wave of a cosine ramp."""


class Replay(Settings):
    """What the parent learnt from, or `data` in its place, seen again at a share of every stretch."""

    data: Mixture | None = None
    """What is replayed; the parent's own mixture where it is left out."""
    share: float = Field(gt=0, lt=1)
    """The share of all tokens that is replayed."""


def _share(value: Any) -> Any:
    """A bare number is the share of what the parent learnt from."""
    return {"share": value} if isinstance(value, (int, float, str)) else value


Replayed = Annotated[Replay, BeforeValidator(_share, json_schema_input_type=float | Replay)]


class Added(Settings):
    """Tokens learnt from the texts in `data`, and how their rows begin."""

    formerly: ClassVar[Mapping[str, str]] = {"letters": "characters"}

    data: Sources
    """Texts to learn the new tokens from."""
    added: Count = Field(gt=0)
    """How many tokens to add."""
    start: Start = "mean"
    """How the new rows of the embedding begin."""
    characters: Count = 20_000_000
    """Read at most so many characters of text."""


class Midtrain(FedStage):
    """Go on training a model: on better data, a new language or domain, or longer texts."""

    kind: Literal["midtrain"]
    """Continue training on curated data."""
    version: ClassVar[int] = 4

    start: str = Field(alias="from")
    """The model to start from."""
    data: Mixture
    """The mixture to learn from."""
    ramp: Literal["linear", "cosine"] = "linear"
    """How weights move between the places that a list of them names."""
    replay: Replayed | None = None
    """A share of what the parent learned from, or a mixture, seen again against forgetting."""
    watch: Mixture | None = None
    """Sources that are measured and not trained on, to see what is forgotten."""
    vocabulary: Added | None = None
    """New tokens for the tokenizer."""
    context: ContextSetting | None = None
    """The length of the sequences, and how positions are extended to it."""

    @model_validator(mode="after")
    def what_is_watched_is_not_learnt(self) -> Midtrain:
        """A source cannot be both learnt from and only watched."""
        learnt = self.data | ((self.replay and self.replay.data) or {})
        for name in learnt.keys() & (self.watch or {}).keys():
            raise ValueError(
                f"`watch` names `{name}`, which is learnt from and measured anyway; leave it out"
            )
        return self

    def references(self) -> list[Reference]:
        """`from` names the parent; the others outside data or corpora."""
        found = [Reference("from", self.start, ("model",)), *mixture_references(self.data, by_length=True)]
        if self.replay is not None and self.replay.data is not None:
            found += mixture_references(self.replay.data, "replay.data", by_length=True)
        if self.watch is not None:
            found += mixture_references(self.watch, "watch", by_length=True, without=MEASURED)
        if self.vocabulary is not None:
            found += source_references("vocabulary.data", self.vocabulary.data)
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """The model's size, and what so many tokens cost."""
        parent = inputs.get(self.start)
        numbers: dict[str, Any] = {}
        cost = None
        if isinstance(parent, Mapping):
            numbers = {key: parent[key] for key in ("parameters", "vocabulary") if key in parent}
            cost = 6.0 * numbers["parameters"] if "parameters" in numbers else None
        elif parent is not None and (parent / "config.json").is_file():
            config = load_config(parent)
            numbers = {"parameters": parameter_count(config), "vocabulary": config.vocabulary}
            cost = flops_per_token(config, self.context.longest if self.context else config.reach)
        tokens = self.tokens or (self.steps * self.batch if self.steps and self.batch else None)
        if tokens is not None:
            numbers["tokens"] = tokens
            if cost is not None:
                numbers["flops"] = cost * tokens
        return numbers

    def run(self, work: Work) -> dict[str, Any]:
        """Say what is taken over and what changes, train, and leave a Hugging Face folder."""
        going = self._prepared(work)
        model = load_model(going.folder, dtype=torch.float32, device=machine.device())
        tables = _tables(model)
        before = Tokenizer.load(going.folder)
        if self.vocabulary is not None:
            work.change("vocabulary", before.vocabulary_size, going.tokenizer.vocabulary_size)
            for name, found in self._compression(going, before).items():
                work.change(f"bytes per token of {name}", round(found.before, 3), round(found.after, 3))
            grow_vocabulary(model, before, going.tokenizer, start=self.vocabulary.start, seed=work.seed)
        if self.context is not None and self.context.method is not None:
            changes = extend_context(
                model, self.context.longest, self.context.method, seed=work.seed, **self.context.options
            )
            work.change("positions", *changes)
        else:
            work.change("positions", *[describe_positions(model.config)] * 2)
        for name, passes in going.seen.items():
            after = going.batches.report()[name]["passes"]
            work.change(f"passes over {name}", round(passes, 3), round(after, 3))
        adapter = self.adapter
        if adapter is not None and _tables(model) != tables:
            adapter = with_new_rows(adapter)
        rates = rates_after(work, self, self.start, going.folder, model.config)
        measured = self.data | going.replayed | (self.watch or {})
        learnt = [*trained_on([going.folder]), *map(TokenisedData, going.shards)]
        summary = train(
            work,
            self.model_copy(update={"batch": going.batch, "adapter": adapter}),
            model,
            going.tokenizer,
            NextToken(sources=tuple(going.batches.names), z_loss=self.z_loss),
            going.batches,
            rates,
            validation=validation_rows(
                going.work,
                measured,
                going.tokenizer,
                going.context,
                self.validation.tokens,
                learnt=learnt,
                required=list(self.watch or ()),
            ),
            parent_moments=moments_after(work, self, self.start, going.folder),
            consumed=going.batches.consumed,
            shares=going.batches.shares,
        )
        return {**summary, "data": going.batches.report()}

    def fed(self, work: Work) -> tuple[BatchSource, Tokenizer]:
        """The batch source and its tokenizer, the same whenever they are made."""
        going = self._prepared(work)
        return going.batches, going.tokenizer

    def _prepared(self, work: Work) -> _Prepared:
        """Tokenizer and batches, the same whenever they are made."""
        folder = resolve(str(work.path(self.start)))
        config = load_config(folder)
        tokenizer = self._tokenizer(work, folder)
        contexts = self.context.length if self.context is not None else [config.reach]
        context = max(contexts)
        self._check_reach(work, config, context)
        suited = preset(config.layers, config.vocabulary, context, width=config.width).values["batch_tokens"]
        batch = max(self.batch or suited, context)
        work, replayed = self._replayed(work, folder)
        before = consumed_by(folder)
        mixed = [
            replace(one, seen=before.get(one.origin, 0.0))
            for one in self._ingredients(work, tokenizer, replayed)
        ]
        lasting: dict[str, Any] = {"tokens": self.tokens, "steps": self.steps, "epochs": self.epochs}
        batches: PackedBatches | RampedBatches
        if len(contexts) == 1:
            batches = PackedBatches(mixed, context=context, batch_tokens=batch, seed=work.seed, **lasting)
        else:
            weighed = _weighted(mixed)
            batches = RampedBatches(weighed, contexts=contexts, batch_tokens=batch, seed=work.seed, **lasting)
        shards = [one.shards for one in mixed]
        seen = {one.name: one.seen for one in mixed}
        return _Prepared(work, folder, tokenizer, batches, replayed, context, batch, shards, seen)

    def _check_reach(self, work: Work, config: ModelConfig, context: int) -> None:
        """Refuse rows that the positions do not reach, and stretching what reaches far enough."""
        method = self.context.method if self.context is not None else None
        if method is None and context > config.reach:
            raise TriviumError(
                f"{work.stage}: the model reads {config.reach} tokens at most and `context` is {context}; "
                "add a `method` that scales its positions, for instance yarn."
            )
        if method not in (None, "base", "nope") and context <= config.reach:
            raise TriviumError(
                f"{work.stage}: the model reads {config.reach} tokens already, so `{method}` has nothing to "
                f"stretch for {context}; leave `method` out or raise `length`."
            )
        if self.context is not None and self.context.options and config.positions != "rope":
            raise TriviumError(
                f"{work.stage}: this model's positions do not turn, so `{next(iter(self.context.options))}` "
                "says nothing about them; leave it out."
            )

    def _replayed(self, work: Work, folder: Path) -> tuple[Work, dict[str, Portion]]:
        """What is seen again, and the work that knows where it lies."""
        if self.replay is None:
            return work, {}
        again = self.replay.data
        if again is None:
            learnt = learnt_by(work.stage, self.start, folder)
            work, again = replace(work, inputs={**work.inputs, **learnt.places}), learnt.mixture
        for setting, mixture in (("data", self.data), ("watch", self.watch or {})):
            for name in sorted(mixture.keys() & again.keys()):
                raise TriviumError(
                    f"{work.stage}: `{name}` is in `{setting}` and in `replay`; leave it in one."
                )
        weights = {name: "by its tokens" if one.weight is None else one.weight for name, one in again.items()}
        work.change("replay", "nothing", {"share": self.replay.share, **weights})
        return work, again

    def _tokenizer(self, work: Work, folder: Path) -> Tokenizer:
        """The parent's tokenizer, with the added tokens where some are asked for."""
        tokenizer = Tokenizer.load(folder)
        if self.vocabulary is None:
            return tokenizer
        # What `data` holds out tells how well the new tokens fit, so they are not learnt from it.
        share = max(held_out_share(work, name, portion) for name, portion in self.data.items())
        texts: list[str] = []
        characters = 0
        for document in documents(work, self.vocabulary.data, Reading()):
            if document.text and not in_validation(text_hash(document), share):
                texts.append(document.text)
                characters += len(document.text)
            if characters >= self.vocabulary.characters:
                break
        if not texts:
            raise TriviumError(f"{work.stage}: `vocabulary.data` has no text to learn tokens from.")
        return extend_tokenizer(tokenizer, texts, self.vocabulary.added)

    def _compression(self, going: _Prepared, before: Tokenizer) -> dict[str, Compression]:
        """How both vocabularies spell what is held out: of the new texts, and of what the parent knew."""
        mixture = self.data | going.replayed | (self.watch or {})
        work = going.work
        try:
            known, places = held_out_by(work.stage, {self.start: going.folder})
        except TriviumError:
            # Of a model from outside it is not known what it learnt from.
            known, places = {}, {}
        # Behind what is named here, as a source's place in this order names its folder.
        further = {name: place for name, place in places.items() if name not in work.inputs}
        work = replace(work, inputs={**work.inputs, **further})
        found = {}
        for name, portion in {**known, **mixture}.items():
            texts = held_out_texts(work, name, portion, going.tokenizer, 1000)
            if texts:
                found[name] = compression(before, going.tokenizer, texts)
        return found

    def _ingredients(
        self, work: Work, tokenizer: Tokenizer, replayed: Mapping[str, Portion]
    ) -> list[Ingredient]:
        beside = {**replayed, **(self.watch or {})}
        new = ingredients(work, self.data, tokenizer, beside)
        if self.replay is None:
            return self._ramped(new)
        old = ingredients(work, replayed, tokenizer)
        return with_replay(_weighted(self._ramped(new)), _weighted(self._ramped(old)), self.replay.share)

    def _ramped(self, given: list[Ingredient]) -> list[Ingredient]:
        """The sources with their weights moving as `ramp` says."""
        if self.ramp == "linear":
            return given
        return [one if one.weights is None else replace(one, weights=eased(one.weights)) for one in given]


def _tables(model: Transformer) -> tuple[int, int]:
    """How many rows the tables of tokens and of positions have."""
    places = model.position_embedding
    return model.config.vocabulary, 0 if places is None else places.num_embeddings


def _weighted(given: list[Ingredient]) -> list[Ingredient]:
    """Sources without weights count by their tokens."""
    return [
        one if one.weights is not None else replace(one, weights=weights_over(float(one.tokens)))
        for one in given
    ]


def eased(knots: Knots) -> Knots:
    """The same places and weights, joined by half waves of a cosine."""
    found = [knots[0]]
    for (a, low), (b, high) in pairwise(knots):
        for piece in range(1, EASED + 1):
            way = piece / EASED
            level = low + (high - low) * (1 - math.cos(math.pi * way)) / 2
            if b > a or piece == EASED:
                found.append((a + (b - a) * way, level))
    return tuple(found)


def with_replay(new: list[Ingredient], old: list[Ingredient], share: float) -> list[Ingredient]:
    """Both lists as one mixture in which the old sources have `share` together at every moment."""
    return _scaled(new, 1 - share) + _scaled(old, share)


def _scaled(given: list[Ingredient], share: float) -> list[Ingredient]:
    """The same proportions at the places that have a weight, with a constant sum."""
    curves = [one.weights or ((0.0, 1.0),) for one in given]
    places = sorted({0.0, 1.0} | {place for curve in curves for place, _ in curve})
    # A mixture whose sum moves is not straight after division: short pieces follow it closely.
    fine = sorted(set(places) | {a + (b - a) * k / EASED for a, b in pairwise(places) for k in range(EASED)})
    knots: list[list[tuple[float, float]]] = [[] for _ in given]
    for place in fine:
        for after in (False, True):
            now = [weight_at(curve, place, after=after) for curve in curves]
            if sum(now) <= 0:
                names = ", ".join(f"`{one.name}`" for one in given)
                raise TriviumError(
                    f"At {place:.0%} of the stage {names} have weight 0 together, or no documents: raise a "
                    "weight, or name a source that is not empty."
                )
            for found, weight in zip(knots, now, strict=True):
                found.append((place, share * weight / sum(now)))
    return [replace(one, weights=tuple(found)) for one, found in zip(given, knots, strict=True)]


@dataclass(frozen=True)
class _Prepared:
    """What mid-training needs before the first step."""

    work: Work
    folder: Path
    tokenizer: Tokenizer
    batches: PackedBatches | RampedBatches
    replayed: dict[str, Portion]
    context: int
    batch: int
    shards: list[Shards]
    seen: dict[str, float]
