"""Reward models: a score per answer, learned from pairs of which people chose one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from trivium.data.preference_sources import Preferences, read_preferences
from trivium.data.preferences import PreferenceBatches, PreferenceSource
from trivium.data.settings import Mixture
from trivium.kit.numbers import Count
from trivium.kit.processes import world
from trivium.learn.objectives.reward import BradleyTerry
from trivium.learn.settings import LearningRate
from trivium.model.branches import prompts_can_be_shared
from trivium.model.scalar_head import (
    ScalarHead,
    architecture_of,
    is_reward_model,
    load_reward_model,
    save_reward_model,
    without_language_head,
)
from trivium.model.transformer import Transformer
from trivium.stages.parts.mixtures import PAIRS, PROMPTS, ROWS, mixture_references
from trivium.stages.parts.references import accuracy_of_scores
from trivium.stages.parts.stage import Product, Reference
from trivium.stages.parts.training import UNUSED_WITH_PAIRS, Opened, TrainingStage

PASS_TOKENS = 4096


class Reward(TrainingStage):
    """Learn which of two answers people prefer, as one number per answer (Bradley-Terry)."""

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
    """Preference pairs."""
    test: Mixture | None = None
    """Pairs to measure on at the end, beside those that `validation` holds back of every source."""
    pairs: Count = Field(default=32, ge=1)
    """Pairs per optimiser step."""
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

    @model_validator(mode="after")
    def length_is_said_in_pairs(self) -> Reward:
        """Pairs differ in length: steps count them, not tokens."""
        if self.steps is not None and self.epochs is not None:
            raise ValueError("say how long to train with one of `steps` and `epochs`")
        if self.adapter is not None and "save" not in self.adapter.model_fields_set:
            self.adapter = self.adapter.model_copy(update={"save": "merged"})
        if self.adapter is not None and self.adapter.save != "merged":
            raise ValueError("a reward model is saved whole: say `save: merged` in the adapter")
        return self

    def references(self) -> list[Reference]:
        """`from` names the model to go on from; `data` and `test` its preferences."""
        tested = mixture_references(self.test or {}, "test", needs=ROWS, without=(*PAIRS, *PROMPTS))
        return [*super().references(), *tested]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the pairs are read; a model in a folder loses its language head first."""
        known = inputs.get(self.start)
        return super().plan(inputs) if isinstance(known, Mapping) else {}

    def read(self, opened: Opened[_Scored]) -> None:
        """The preference pairs of every source, as batches of pairs."""
        opened.context = opened.context_within(self.context)
        pairs = read_preferences(opened.work, self.data, opened.tokenizer, opened.context)
        opened.data = _Scored(pairs)
        opened.batches = self._batches(opened, pairs.training, self.steps)

    def load(self, opened: Opened[_Scored]) -> Transformer:
        """The model without its words and a head drawn from the seed, or both as a stage left them."""
        architecture_of(opened.config.family)
        if is_reward_model(opened.folder):
            model, opened.data.head = load_reward_model(
                opened.folder, dtype=torch.float32, device=opened.device
            )
        else:
            model = without_language_head(super().load(opened))
            opened.data.head = ScalarHead(model.config.width, seed=opened.work.seed).to(opened.device)
        return model

    def objective(self, opened: Opened[_Scored]) -> BradleyTerry:
        """The chosen answer scores higher than the rejected one."""
        return BradleyTerry(opened.data.head, self.centring)

    def save(self, opened: Opened[_Scored], folder: Path) -> None:
        """A sequence classifier's folder."""
        save_reward_model(opened.model, opened.data.head, folder, pad_id=opened.tokenizer.pad_id)
        opened.tokenizer.save(folder)

    def findings(self, opened: Opened[_Scored]) -> dict[str, Any]:
        """Accuracy on the pairs held out and on those of `test`; what became of the data."""
        found: dict[str, Any] = {"data": opened.data.pairs.facts}
        if world().leads:
            found["unseen"] = self._measured(opened, opened.data.pairs.validation)
            if self.test is not None:
                whole = {name: one.model_copy(update={"validation": 0.0}) for name, one in self.test.items()}
                tested = read_preferences(opened.work, whole, opened.tokenizer, opened.context)
                found["test"] = self._measured(opened, tested.training)
        return found

    def _measured(self, opened: Opened[_Scored], sources: Sequence[PreferenceSource]) -> dict[str, Any]:
        """Accuracy, calibration and length bias on pairs that nothing was learned from, also by source."""
        batches = {one.name: self._batches(opened, [one], 1) for one in sources if len(one.pairs)}
        return accuracy_of_scores(opened.model, opened.data.head, batches, self.precision)

    def _batches(
        self, opened: Opened[_Scored], sources: Sequence[PreferenceSource], steps: int | None
    ) -> PreferenceBatches:
        return PreferenceBatches(
            [source for source in sources if len(source.pairs)],
            batch=self.pairs, seed=opened.work.seed, steps=steps, epochs=self.epochs,
            share=self.share_prompts and prompts_can_be_shared(opened.config),
        )  # fmt: skip


@dataclass
class _Scored:
    """The preference pairs, and the head that scores them."""

    pairs: Preferences
    head: ScalarHead = field(init=False)
