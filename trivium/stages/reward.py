"""Reward models: a score per answer, learned from pairs of which people chose one, or a score per step.

With `steps: true` it is a process reward model: solutions come step by step with a label each (TRL's stepwise
form), and the model learns to say of every step whether it is right (`learn.objectives.reward`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, WithJsonSchema, model_validator

from trivium.data.counted import CountedSource, CountedSources
from trivium.data.preferences import PreferenceBatches, read_preferences
from trivium.data.settings import Mixture, MixtureSource
from trivium.data.steps import SEPARATOR, StepBatches
from trivium.kit.numbers import Count
from trivium.learn.objectives.reward import BradleyTerry, StepCorrectness
from trivium.learn.settings import LearningRate
from trivium.model.scalar_head import (
    ScalarHead,
    architecture_of,
    is_reward_model,
    load_reward_model,
    save_reward_model,
    without_language_head,
)
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import PAIRS, PROMPTS, ROWS, mixture_references
from trivium.stages.parts.references import accuracy_of_scores
from trivium.stages.parts.stage import Product, Reference
from trivium.stages.parts.stepwise import judged_steps, read_solutions
from trivium.stages.parts.training import UNUSED_WITH_PAIRS, Opened, TrainingStage

STEPS_SCHEMA = {
    "anyOf": [
        {"const": True},
        {"type": "number"},
        {"type": "string", "pattern": r"^[-+0-9._eE]+ *[kKmMbBT]?( *tokens)?$"},
        {"type": "null"},
    ]
}


class Reward(TrainingStage):
    """Learn which of two answers people prefer, as one number per answer, or which steps are right."""

    kind: Literal["reward"]
    """Train a reward model on preference pairs."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "reward"
    starts_from: ClassVar[tuple[Product, ...]] = ("model", "reward")
    unused_in_data: ClassVar[tuple[str, ...]] = PAIRS
    gentle_rates: ClassVar[tuple[float, float] | None] = (1e-5, 0.002)
    unused: ClassVar[Mapping[str, str]] = {
        **UNUSED_WITH_PAIRS,
        "samples": "a reward model scores texts and writes none; leave `samples` out",
    }

    start: str = Field(alias="from")
    """A model, whose words are replaced by a score, or a reward model to go on from."""
    data: Mixture
    """Preference pairs, or with `process` solutions as `prompt`, `completions` (the steps) and `labels`."""
    test: Mixture | None = None
    """Pairs to measure on at the end, beside those that `validation` holds back of every source."""
    pairs: Count = Field(default=32, ge=1)
    """Pairs, or with `process` solutions, per optimiser step."""
    steps: Annotated[Count | None, Field(ge=1), WithJsonSchema(STEPS_SCHEMA)] = None
    """How many optimiser steps to train for; `true` asks for a process reward model, as `process` does."""
    process: bool = False
    """Whether every step of a solution gets a score, instead of the whole answer."""
    separator: str = Field(default=SEPARATOR, min_length=1)
    """The text after every step, at whose last token the step's score is read."""
    until_error: bool = False
    """Learn nothing from the steps after the first wrong one, which position alone gives away."""
    context: Count | None = Field(default=None, ge=2)
    """The longest prompt and answer in tokens."""
    centring: float = Field(default=0.0, ge=0)
    """How strongly rewards are drawn to a mean of zero; 0.01 is usual."""
    share_prompts: bool = True
    """Whether a prompt is computed once for both of its answers."""
    learning_rate: LearningRate = LearningRate()
    """The learning rate: a number, `parent`, or a schedule."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""
    compile: Literal["auto", "on", "off"] = "off"
    """Whether to compile the model."""

    @model_validator(mode="before")
    @classmethod
    def scores_of_steps(cls, written: Any) -> Any:
        """`steps: true` is how a person asks for a process reward model."""
        if isinstance(written, Mapping) and written.get("steps") is True:
            return {**{name: one for name, one in written.items() if name != "steps"}, "process": True}
        return written

    @model_validator(mode="after")
    def length_is_said_in_pairs(self) -> Reward:
        """Pairs differ in length: steps count them, not tokens."""
        unused = {name: type(self).model_fields[name].default for name in ("centring", "share_prompts")}
        for name, default in unused.items() if self.process else ():
            if getattr(self, name) != default:
                raise ValueError(f"`{name}` belongs to pairs of answers; leave it out with `steps: true`")
        if not self.process and self.until_error:
            raise ValueError("`until_error` is about the steps of solutions; say `steps: true`")
        if not self.process and self.separator != SEPARATOR:
            raise ValueError("`separator` divides the steps of a process reward model; say `steps: true`")
        if self.adapter is not None and "save" not in self.adapter.model_fields_set:
            self.adapter = self.adapter.model_copy(update={"save": "merged"})
        if self.adapter is not None and self.adapter.save != "merged":
            raise ValueError("a reward model is saved whole: say `save: merged` in the adapter")
        return self

    def counted(self) -> dict[str, Any]:
        """A stage that learns from every labelled step is what it was before it could leave some out."""
        found = super().counted()
        return found if self.until_error else {k: one for k, one in found.items() if k != "until_error"}

    def references(self) -> list[Reference]:
        """`from` names the model to go on from; `data` and `test` its preferences."""
        tested = mixture_references(self.test or {}, "test", needs=ROWS, without=(*PAIRS, *PROMPTS))
        return [*super().references(), *tested]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the pairs are read; a model in a folder loses its language head first."""
        known = inputs.get(self.start)
        return super().plan(inputs) if isinstance(known, Mapping) else {}

    def read(self, opened: Opened[_Scored]) -> None:
        """The preference pairs, or the labelled solutions, of every source, as batches."""
        opened.context = opened.context_within(self.context)
        opened.data = _Scored(self._sources(opened, self.data))
        opened.batches = self._batches(opened, opened.data.read.training, self.steps)

    def load(self, opened: Opened[_Scored]) -> Transformer:
        """The model without its words and a head drawn from the seed, or both as a stage left them."""
        architecture_of(opened.config.family, steps=self.process)
        if is_reward_model(opened.folder):
            model, opened.data.head = load_reward_model(
                opened.folder, dtype=torch.float32, device=opened.device, steps=self.process
            )
        else:
            model = without_language_head(super().load(opened))
            opened.data.head = ScalarHead(
                model.config.width, seed=opened.work.seed, bias=self.process
            ).to(opened.device)  # fmt: skip
        return model

    def objective(self, opened: Opened[_Scored]) -> BradleyTerry | StepCorrectness:
        """The chosen answer scores higher than the rejected one, or the right step than the wrong one."""
        if self.process:
            return StepCorrectness(opened.data.head)
        return BradleyTerry(opened.data.head, self.centring)

    def save(self, opened: Opened[_Scored], folder: Path) -> None:
        """A sequence classifier's folder, or with `process` a token classifier's."""
        save_reward_model(
            opened.model, opened.data.head, folder, pad_id=opened.tokenizer.pad_id,
            separator=self.separator if self.process else None,
        )  # fmt: skip
        opened.tokenizer.save(folder)

    def findings(self, opened: Opened[_Scored]) -> dict[str, Any]:
        """Accuracy on what is held out and on what `test` names; what became of the data."""
        read = opened.data.read
        found: dict[str, Any] = {"data": read.facts}
        if opened.leads:
            found["unseen"] = self._judged(opened, read.validation)
            if self.test is not None:
                whole = {name: one.model_copy(update={"validation": 0.0}) for name, one in self.test.items()}
                tested = self._sources(opened, whole)
                found["test"] = self._judged(opened, tested.training)
        return found

    def _sources(self, opened: Opened[_Scored], data: Mapping[str, MixtureSource]) -> CountedSources[Any]:
        work, tokenizer = opened.work, opened.tokenizer
        if self.process:
            return read_solutions(
                work, data, tokenizer, opened.context, self.separator, until_error=self.until_error
            )
        return read_preferences(work, data, tokenizer, opened.context)

    def _judged(self, opened: Opened[_Scored], sources: Sequence[CountedSource[Any]]) -> dict[str, Any]:
        """Accuracy, calibration and length bias on what nothing was learned from; of pairs also by source."""
        model, head = opened.model, opened.data.head
        if self.process:
            return judged_steps(model, head, sources, self.precision)
        batches = {one.name: self._batches(opened, [one], 1) for one in sources if len(one.items)}
        return accuracy_of_scores(model, head, batches, self.precision)

    def _batches(
        self, opened: Opened[_Scored], sources: Sequence[CountedSource[Any]], steps: int | None
    ) -> Any:
        lasting: dict[str, Any] = {
            "batch": self.pairs, "seed": opened.work.seed, "steps": steps, "epochs": self.epochs
        }  # fmt: skip
        if self.process:
            return StepBatches(sources, **lasting)
        share = self.share_prompts and opened.prompts_can_be_shared
        return PreferenceBatches(sources, share=share, **lasting)


@dataclass
class _Scored:
    """The preference pairs or labelled solutions, and the head that scores them."""

    read: CountedSources[Any]
    head: ScalarHead = field(init=False)
