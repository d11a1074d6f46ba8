"""Reward models: a score per answer, learned from pairs of which people chose one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from trivium.data.preferences import PreferenceBatches, PreferenceSource
from trivium.data.rows import collate
from trivium.evals.pairwise import pairwise
from trivium.kit import machine
from trivium.kit.files import read_json
from trivium.kit.numbers import Count
from trivium.kit.processes import world
from trivium.learn.objective import BatchSource
from trivium.learn.objectives.reward import BradleyTerry, pair_scores
from trivium.learn.optimisers import LearningRates
from trivium.learn.precision import one_pass
from trivium.learn.settings import LearningRate
from trivium.learn.validation import groups_of
from trivium.model.branches import prompts_can_be_shared
from trivium.model.config import ModelConfig
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.model.lora import merged
from trivium.model.scalar_head import (
    ScalarHead,
    architecture_of,
    is_reward_model,
    load_reward_model,
    save_reward_model,
    without_language_head,
)
from trivium.model.transformer import Transformer
from trivium.stages.parts.judged import UNUSED_WITH_PAIRS, Judged, read_preferences
from trivium.stages.parts.mixtures import JUDGED, PROMPTS, Mixture, mixture_references
from trivium.stages.parts.parents import context_within, gentle_rates_after, moments_after
from trivium.stages.parts.stage import Product, Reference, Work
from trivium.stages.parts.training import FedStage, train
from trivium.tokens.tokenizer import Tokenizer

RATE_AT_4096 = 1e-5
"""AdamW's rate for a model of width 4096; narrower ones bear more in proportion."""
MUON_RATE = 0.002
PASS_TOKENS = 4096


class Reward(FedStage):
    """Learn which of two answers people prefer, as one number per answer (Bradley-Terry)."""

    kind: Literal["reward"]
    """Train a reward model on preference pairs."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "reward"
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
        found = [Reference("from", self.start, ("model", "reward"))]
        found += mixture_references(self.data, without=JUDGED)
        if self.test is not None:
            found += mixture_references(self.test, "test", without=(*JUDGED, *PROMPTS))
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the preferences are read."""
        parent = inputs.get(self.start)
        known = {"parameters", "vocabulary"}
        return {key: parent[key] for key in known & set(parent)} if isinstance(parent, Mapping) else {}

    def run(self, work: Work) -> dict[str, Any]:
        """Read the pairs, learn, measure on those held out, and leave a sequence classifier's folder."""
        folder = resolve(str(work.path(self.start)))
        tokenizer = Tokenizer.load(folder)
        model, head = self._begun(work, folder)
        architecture_of(model.config.family)
        judged = self._read(work, self.data, tokenizer, model.config)
        batches = self._batches(work, model.config, judged.training, steps=self.steps)

        def write(folder: Path) -> None:
            if self.adapter is None:
                save_reward_model(model, head, folder, pad_id=tokenizer.pad_id)
            else:
                with merged(model):
                    save_reward_model(model, head, folder, pad_id=tokenizer.pad_id)
            tokenizer.save(folder)

        summary = train(
            work, self, model, tokenizer, BradleyTerry(head, self.centring), batches,
            self._rates(work, folder, model.config),
            parent_moments=moments_after(work, self, self.start, folder), write=write,
        )  # fmt: skip
        looks: dict[str, Any] = {}
        if world().leads:
            looks["unseen"] = self._measured(work, model, head, judged.held_out)
            if self.test is not None:
                whole = {name: one.model_copy(update={"validation": 0.0}) for name, one in self.test.items()}
                tested = self._read(work, whole, tokenizer, model.config).training
                looks["test"] = self._measured(work, model, head, tested)
        return {**summary, "data": judged.facts, **looks}

    def _begun(self, work: Work, folder: Path) -> tuple[Transformer, ScalarHead]:
        """The model without its words and a head drawn from the seed, or both as a stage left them."""
        device = machine.device()
        if is_reward_model(read_json(folder / "config.json")):
            return load_reward_model(folder, dtype=torch.float32, device=device)
        model = without_language_head(load_model(folder, dtype=torch.float32, device=device))
        return model, ScalarHead(model.config.width, seed=work.seed).to(device)

    def _read(self, work: Work, mixture: Mixture, tokenizer: Tokenizer, config: ModelConfig) -> Judged:
        context = context_within(work, self.context, config)
        return read_preferences(work, mixture, tokenizer, context)

    def _batches(
        self, work: Work, config: ModelConfig, sources: Sequence[PreferenceSource], *, steps: int | None
    ) -> PreferenceBatches:
        some = [source for source in sources if len(source.pairs)]
        share = self.share_prompts and prompts_can_be_shared(config)
        return PreferenceBatches(
            some, batch=self.pairs, seed=work.seed, steps=steps, epochs=self.epochs, share=share
        )

    @torch.no_grad()
    def _measured(
        self, work: Work, model: Transformer, head: ScalarHead, held_out: Sequence[PreferenceSource]
    ) -> dict[str, Any]:
        """Accuracy, calibration and length bias on pairs that nothing was learned from, also by source."""
        found: dict[str, Any] = {}
        parts: list[np.ndarray] = []
        for source in held_out:
            if not len(source.pairs):
                continue
            batches = self._batches(work, model.config, [source], steps=1)
            rows = [batches.row([(0, number)]) for number in range(len(source.pairs))]
            scores = []
            for some in groups_of(rows, PASS_TOKENS):
                with one_pass(self.precision, model.device):
                    scores.append(pair_scores(model, head, collate(some, model.device)))
            chosen, rejected = (torch.cat([one[side] for one in scores]).cpu().numpy() for side in (0, 1))
            lengths = [
                np.array([len(one.completions[side].tokens) for one in source.pairs]) for side in (0, 1)
            ]
            parts.append(np.stack((chosen, rejected, *lengths)))
            found[source.name] = pairwise(*parts[-1])
        if len(found) != 1:
            everything = pairwise(*np.concatenate(parts, 1)) if parts else {}
            return {**everything, "by_source": found} if parts else {}
        return next(iter(found.values()))

    def _rates(self, work: Work, folder: Path, config: ModelConfig) -> LearningRates:
        return gentle_rates_after(
            work, self, self.start, folder, config, adamw_at_4096=RATE_AT_4096, muon=MUON_RATE
        )

    def fed(self, work: Work) -> tuple[BatchSource, Tokenizer]:
        """The batch source and its tokenizer, the same whenever they are made."""
        folder = resolve(str(work.path(self.start)))
        tokenizer = Tokenizer.load(folder)
        config = load_config(folder)
        judged = self._read(work, self.data, tokenizer, config)
        return self._batches(work, config, judged.training, steps=self.steps), tokenizer
