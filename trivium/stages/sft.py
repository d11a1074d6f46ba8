"""Supervised fine-tuning: the model learns to answer as the assistant of its examples does."""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from trivium.data.conversations import Learned
from trivium.data.packed import PackedBatches
from trivium.data.preview import previewed
from trivium.data.rows import PackedSequence
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.learn.objective import BatchSource
from trivium.learn.objectives.near_parent import Guard, NearParent, NearPredictions, NearWeights
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates
from trivium.model.config import ModelConfig
from trivium.model.flops import parameter_count
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.model.transformer import Transformer
from trivium.model.vocabulary import grow_vocabulary
from trivium.stages.midtrain import Replayed
from trivium.stages.parts.examples import (
    Examples,
    any_conversation,
    ingredients,
    prepared,
    report,
    told,
    validation_rows,
    with_examples_replayed,
)
from trivium.stages.parts.inheritance import DOCUMENTS, learnt_by
from trivium.stages.parts.mixtures import Mixture, Portion, mixture_references
from trivium.stages.parts.parents import context_within, gentle_rates_after, moments_after
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import FedStage, adapt, train, with_new_rows
from trivium.tokens.adopt import with_chat_template
from trivium.tokens.tokenizer import Tokenizer

ROWS_PER_BATCH = 8
RATE_AT_4096 = 2e-5
"""AdamW's usual rate for models about 4096 wide; narrower ones bear proportionally more."""
MUON_RATE = 0.002
"""A tenth of what pre-training begins with."""


class Sft(FedStage):
    """Fine-tune a model on prompts with completions, conversations or texts."""

    kind: Literal["sft"]
    """Supervised fine-tuning."""
    version: ClassVar[int] = 2

    start: str = Field(alias="from")
    """The model to start from."""
    data: Mixture
    """Conversations, or prompts with completions, or texts."""
    replay: Replayed | None = None
    """What the parent learnt from, seen again at this share, so that it is not forgotten."""
    near_parent: NearParent | None = None
    """A pull towards the parent, in weights or in what is said."""
    context: Count | None = Field(default=None, ge=2)
    """The length of the packed sequences; the model's, at most 1,024, where it is left out."""
    loss: Learned = "assistant"
    """What is learned: every turn of the assistant, the last only, or everything."""
    neftune: float = Field(default=0.0, ge=0)
    """Strength of the noise on the embeddings, usually 5 to 15."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """The share of the target probability spread over the vocabulary."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""

    def references(self) -> list[Reference]:
        """`from` names the model to go on from; `data` what to learn, `replay.data` what not to forget."""
        found = [Reference("from", self.start, ("model",)), *mixture_references(self.data)]
        if self.replay is not None and self.replay.data is not None:
            found += mixture_references(self.replay.data, "replay.data")
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the data is read: the model's size, and what a given length costs."""
        parent = inputs.get(self.start)
        numbers: dict[str, Any] = {}
        if isinstance(parent, Mapping):
            numbers = {key: parent[key] for key in ("parameters", "vocabulary") if key in parent}
        elif parent is not None and (parent / "config.json").is_file():
            config = load_config(parent)
            numbers = {"parameters": parameter_count(config), "vocabulary": config.vocabulary}
        tokens = self.tokens or (self.steps * self.batch if self.steps and self.batch else None)
        if tokens is not None:
            numbers["tokens"] = tokens
            if "parameters" in numbers:
                # Short documents: attention costs next to nothing beside the matrices.
                numbers["flops"] = 6.0 * numbers["parameters"] * tokens
        return numbers

    def run(self, work: Work) -> dict[str, Any]:
        """Report on the data, show an example, train, and leave a Hugging Face folder."""
        going = self._prepared(work)
        found = report(going.examples, dict(zip(going.batches.names, going.batches.packed, strict=True)))
        for name, planned in going.batches.report().items():
            found[name]["share"] = planned["share"]
        for name, facts in found.items():
            for line in told(name, facts):
                work.say(line)
        example = going.batches.rows(0)[0]
        work.say("the first row of the first batch:\n" + shown(example, going.tokenizer))
        model = load_model(going.folder, dtype=torch.float32, device=machine.device())
        if going.tokenizer is not going.before:
            work.change("chat template", "none", "ChatML")
            grow_vocabulary(model, going.before, going.tokenizer, seed=work.seed)
        changes: dict[str, Any] = {"batch": going.batch}
        if self.adapter is not None and model.config.vocabulary > load_config(going.folder).vocabulary:
            changes["adapter"] = with_new_rows(self.adapter)
        rates = self._rates(work, going.folder, model.config)
        settings = self.model_copy(update=changes)
        objective = NextToken(
            sources=tuple(going.mixture), z_loss=self.z_loss, label_smoothing=self.label_smoothing,
            noise=self.neftune, guards=settings._guards(work, model, tuple(going.mixture)),
        )  # fmt: skip
        summary = train(
            work,
            settings,
            model,
            going.tokenizer,
            objective,
            going.batches,
            rates,
            validation=validation_rows(
                going.examples, going.tokenizer, going.context, self.validation.tokens
            ),
            shares=going.batches.shares,
            parent_moments=moments_after(work, self, self.start, going.folder),
        )
        return {**summary, "data": found}

    def _guards(self, work: Work, model: Transformer, sources: tuple[str, ...]) -> list[Guard]:
        """What holds the training near its parent; the parent is the model as it is now."""
        if self.near_parent is None:
            return []
        held: list[int] = []
        for name in self.near_parent.on:
            if name not in sources:
                raise TriviumError(
                    f"{work.stage}: `near_parent.on` names {name}, which is not trained on; "
                    f"there are {', '.join(sources)}."
                )
            held.append(sources.index(name))
        # Switched off, an adapter leaves its parent only if nothing else of the model is trained.
        apart = self.adapter is None or bool(self.adapter.train)
        needed = self.near_parent.kl > 0
        parent = copy.deepcopy(model).requires_grad_(False) if needed and apart else None
        adapt(work, self, model)
        guards: list[Guard] = []
        if self.near_parent.weights:
            guards.append(NearWeights(model, self.near_parent.weights))
        if needed:
            guards.append(NearPredictions(self.near_parent.kl, parent, tuple(held)))
        return guards

    def fed(self, work: Work) -> tuple[BatchSource, Tokenizer]:
        """The batch source and its tokenizer, the same whenever they are made."""
        going = self._prepared(work)
        return going.batches, going.tokenizer

    def _prepared(self, work: Work) -> _Prepared:
        """Tokenizer, examples and batches, the same whenever they are made."""
        folder = resolve(str(work.path(self.start)))
        before = Tokenizer.load(folder)
        work, replayed = self._replayed(work, folder)
        mixture = self.data | replayed
        tokenizer = with_chat_template(before) if any_conversation(work, mixture) else before
        context = context_within(work, self.context, load_config(folder))
        examples = prepared(work, mixture, tokenizer, context, self.loss)
        # Of little data a batch takes one pass at most, or `epochs` would not mean what it says.
        rows = max(1, min(ROWS_PER_BATCH, -(-examples.tokens // context)))
        batch = max(self.batch or rows * context, context)
        lasting = (self.tokens, self.steps, self.epochs)
        mixed = ingredients(examples, self.data, work.stage)
        if self.replay is not None:
            old = ingredients(examples, replayed, work.stage)
            mixed = with_examples_replayed(mixed, old, self.replay.share)
        batches = PackedBatches(
            mixed,
            context=context,
            batch_tokens=batch,
            seed=work.seed,
            tokens=self.tokens,
            steps=self.steps,
            epochs=1.0 if lasting == (None, None, None) else self.epochs,
        )
        return _Prepared(folder, before, tokenizer, mixture, examples, batches, context, batch)

    def _replayed(self, work: Work, folder: Path) -> tuple[Work, dict[str, Portion]]:
        """What is seen again, and the work that knows where it lies."""
        if self.replay is None:
            return work, {}
        replayed = self.replay.data
        if replayed is None:
            learnt = learnt_by(work.stage, self.start, folder, (*DOCUMENTS, "sft"))
            work = replace(work, inputs={**learnt.places, **work.inputs})
            replayed = learnt.mixture
            for name, portion in replayed.items():
                if portion.within != (0, None):
                    raise TriviumError(
                        f"{work.stage}: `replay` is a bare share, but {self.start} chose `{name}` by the "
                        "length of its documents, which this stage cannot do; say `replay: {share: 0.2, "
                        "data: ...}`."
                    )
            work.change("replay", "nothing", {name: one.weight for name, one in replayed.items()})
        both = sorted(self.data.keys() & replayed.keys())
        if both:
            raise TriviumError(f"{work.stage}: `{both[0]}` is in `data` and in `replay`; leave it in one.")
        return work, replayed

    def _rates(self, work: Work, folder: Path, config: ModelConfig) -> LearningRates:
        return gentle_rates_after(
            work, self, self.start, folder, config, adamw_at_4096=RATE_AT_4096, muon=MUON_RATE
        )


def shown(row: PackedSequence, tokenizer: Tokenizer) -> str:
    """A row with its learned tokens marked, in colours where a terminal can show them."""
    return previewed(row, tokenizer, colour=sys.stderr.isatty())


@dataclass(frozen=True)
class _Prepared:
    """What fine-tuning needs before the first step."""

    folder: Path
    before: Tokenizer
    tokenizer: Tokenizer
    mixture: Mapping[str, Portion]
    examples: Examples
    batches: PackedBatches
    context: int
    batch: int
