"""Pre-training: a new model learns to predict the next token of a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from trivium.data.packed import PackedBatches
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count, Number
from trivium.kit.settings import Settings
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates
from trivium.model.flops import flops_per_token
from trivium.model.initialise import new_model
from trivium.model.preset import Preset, preset
from trivium.stages.parts.mixtures import (
    Mixture,
    ingredients,
    mixture_references,
    planned_vocabulary,
    sources_of,
    validation_rows,
)
from trivium.stages.parts.shapes import shape_of
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import TrainingStage, documents_in, rows_of, train
from trivium.tokens.tokenizer import Tokenizer


class Architecture(Settings):
    """`depth` sets a whole model; every value that follows from it can be given instead."""

    family: Literal["qwen3", "llama", "gpt2"] = "qwen3"
    """Layers of llama's shape can do without positions; GPT-2's learns a table of them."""
    depth: int = Field(default=4, ge=1)
    """The number of layers, which sets every other value."""
    layers: int | None = Field(default=None, ge=1)
    """The number of layers, where it is not the depth."""
    width: Count | None = Field(default=None, ge=1)
    """The width of the residual stream."""
    heads: int | None = Field(default=None, ge=1)
    """The number of attention heads."""
    key_value_heads: int | None = Field(default=None, ge=1)
    """The number of key-value heads (GQA)."""
    head_width: int | None = Field(default=None, ge=1)
    """The width of a head."""
    inner_width: Count | None = Field(default=None, ge=1)
    """The width of the feed-forward layer."""
    tied: bool | None = None
    """Whether embedding and head share their weights."""
    rope_theta: Number | None = Field(default=None, gt=0)
    """The RoPE base."""


class Pretrain(TrainingStage):
    """Train a model from random weights on `data`."""

    kind: Literal["pretrain"]
    """Train a model from random weights."""
    version: ClassVar[int] = 1
    unused: ClassVar[Mapping[str, str]] = {
        "adapter": "a new model has nothing to lay an adapter on; train all of its weights",
        "optimiser_state": "a new model has no parent whose moments it could keep; leave it out",
    }

    data: Mixture
    """The mixture to learn from."""
    tokenizer: str | None = None
    """The tokenizer, where no corpus in `data` brings one."""
    model: Architecture = Architecture()
    """The architecture."""
    context: Count = Field(default=512, ge=2)
    """The length of the sequences in tokens."""

    def references(self) -> list[Reference]:
        """`data` names corpora or outside data; `tokenizer` is needed only where no corpus brings one."""
        found = mixture_references(self.data, by_length=True)
        if self.tokenizer is not None:
            found.append(Reference("tokenizer", self.tokenizer, ("tokenizer", "model")))
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What follows from the depth, and what training it costs."""
        known = planned_vocabulary(inputs, [*sources_of(self.data), self.tokenizer])
        if known is None:
            return {}
        derived = self._preset(known)
        batch = self._batch(derived)
        tokens = self.tokens or (self.steps * batch if self.steps else None)
        if tokens is None and self.epochs is None:
            tokens = derived.values["token_budget"]
        shape = ("layers", "width", "heads", "parameters")
        numbers = {name: derived.values[name] for name in shape} | {"batch": batch}
        numbers["model"] = shape_of(derived.config)
        if tokens is not None:
            cost = flops_per_token(derived.config, self.context) * tokens
            numbers |= {"tokens": tokens, "steps": max(1, round(tokens / batch)), "flops": cost}
        return {**numbers, **{f"{name} rate": rate for name, rate in derived.learning_rates.items()}}

    def run(self, work: Work) -> dict[str, Any]:
        """Build the model, train it, and write it as a Hugging Face folder."""
        going = self._prepared(work)
        config = going.derived.config
        for name in ("parameters", "width", "layers", "heads", "token_budget", "batch_tokens"):
            work.change(name, "preset", going.derived.values[name])
        extra = {"eos_token_id": going.tokenizer.end_of_text_id, "pad_token_id": going.tokenizer.pad_id}
        # The same weights on every machine: they are drawn on the processor from the seed alone.
        model = new_model(config.changed(extra=extra), seed=work.seed, device=machine.device())
        validation = validation_rows(work, self.data, going.tokenizer, self.context, self.validation.tokens)
        summary = train(
            work,
            self.model_copy(update={"batch": going.batch}),
            model,
            going.tokenizer,
            NextToken(sources=tuple(self.data), z_loss=self.z_loss),
            going.batches,
            self._rates(going.derived),
            validation=validation,
            consumed=going.batches.consumed,
            shares=going.batches.shares,
        )
        return {
            "parameters": going.derived.values["parameters"],
            **summary,
            "data": going.batches.report(),
        }

    def documents_of(self, work: Work, step: int) -> list[str]:
        """The documents of an optimiser step, counted from 1 as in the log."""
        batches = self._prepared(work).batches
        return documents_in(rows_of(work, batches, step))

    def _prepared(self, work: Work) -> _Prepared:
        """Tokenizer, preset and batches, the same whenever they are made."""
        tokenizer = Tokenizer.load(self._tokenizer_folder(work))
        derived = self._preset(tokenizer.vocabulary_size)
        batch = self._batch(derived)
        tokens = self.tokens
        if (self.tokens, self.steps, self.epochs) == (None, None, None):
            tokens = derived.values["token_budget"]
        batches = PackedBatches(
            ingredients(work, self.data, tokenizer),
            context=self.context,
            batch_tokens=batch,
            seed=work.seed,
            tokens=tokens,
            steps=self.steps,
            epochs=self.epochs,
        )
        return _Prepared(tokenizer, derived, batches, batch)

    def _batch(self, derived: Preset) -> int:
        """The tokens of a batch: whole rows, and at least one."""
        tokens = self.batch or derived.values["batch_tokens"]
        return int(max(1, tokens // self.context) * self.context)

    def _tokenizer_folder(self, work: Work) -> Path:
        if self.tokenizer is not None:
            path = work.path(self.tokenizer)
            return path
        for name in sources_of(self.data):
            if (work.path(name) / "tokenizer").is_dir():
                return work.path(name) / "tokenizer"
        raise TriviumError(
            f"{work.stage}: no source in `data` is a corpus that brings a tokenizer; name one in `tokenizer`."
        )

    def _preset(self, vocabulary: int) -> Preset:
        settings = self.model.model_dump()
        depth = settings.pop("depth")
        # How long the training is decides the batch that suits it.
        return preset(depth, vocabulary, self.context, token_budget=self.tokens, **settings)

    def _rates(self, derived: Preset) -> LearningRates:
        """The preset's rates, or the number a person gave for the matrices and the others in proportion."""
        start = self.learning_rate.start
        if start == "parent":
            raise TriviumError("learning_rate: a new model has no parent; give a number or leave it out.")
        decay = derived.values["weight_decay"] if self.weight_decay is None else self.weight_decay
        if self.optimiser == "adamw":
            # AdamW moves every weight by about its rate, so one rate fits all and shrinks with the width.
            rate = 1e-3 * (derived.config.width / 768) ** -0.5 if start == "preset" else float(start)
            return LearningRates(rate, rate, rate, rate, decay)
        rates = derived.learning_rates
        scale = 1.0 if start == "preset" else float(start) / rates["matrices"]
        return LearningRates(**{name: rate * scale for name, rate in rates.items()}, weight_decay=decay)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Prepared:
    """What training needs before the first step."""

    tokenizer: Tokenizer
    derived: Preset
    batches: PackedBatches
    batch: int
