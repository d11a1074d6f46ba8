"""Learning from preferences: answers that people chose become likelier than those they rejected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field, model_validator

from trivium.data.mixture import weights_over
from trivium.data.preferences import PreferenceBatches, PreferenceSource
from trivium.data.rows import collate
from trivium.evals.results import as_json
from trivium.evals.statistics import wilson
from trivium.kit import machine
from trivium.kit.numbers import Count, Number
from trivium.kit.processes import world
from trivium.learn.objective import BatchSource
from trivium.learn.objectives.preference import (
    NEEDS_ALL,
    UNPAIRED,
    Beside,
    Preference,
    needs_reference,
)
from trivium.learn.objectives.preference_losses import (
    OF_ANY_DIVERGENCE,
    PAIR_LOSSES,
    Divergence,
    PreferenceNumbers,
)
from trivium.learn.optimisers import LearningRates
from trivium.learn.precision import Precision, one_pass
from trivium.learn.settings import LearningRate
from trivium.learn.validation import groups_of
from trivium.model.branches import prompts_can_be_shared
from trivium.model.config import ModelConfig
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.model.transformer import Transformer
from trivium.stages.parts.gauges import drift_from, sycophancy_of
from trivium.stages.parts.judged import UNUSED_WITH_PAIRS, Judged, prompts_of, read_preferences
from trivium.stages.parts.mixtures import JUDGED, Mixture, Weight, mixture_references
from trivium.stages.parts.parents import context_within, gentle_rates_after, moments_after
from trivium.stages.parts.references import clear_references, store_references
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import FedStage, adapt, train
from trivium.tokens.tokenizer import Tokenizer

RATE_AT_4096 = 1e-6
"""TRL's rate, for a model of width 4096; narrower ones bear more in proportion."""
ALSO_CALLED = {"dpo": "sigmoid", "slic-hf": "slic", "apo": "apo_zero", "dpo_norm": "sigmoid_norm"}
MIXED_WITH = {"orpo": {"sft": 1.0}, "cpo": {"sft": 1.0}}
"""What belongs to a loss in its paper, if a recipe does not say otherwise."""
DEFAULTS: dict[str, dict[str, float]] = {
    "simpo": {"beta": 2.5, "gamma": 1.375},
    "alphapo": {"beta": 2.5, "gamma": 0.25},
    "sigmoid_norm": {"beta": 5.0},
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.1},
}
"""The papers' numbers where they are not DPO's."""
MUON_RATE = 0.0005
DRIFT_PROMPTS, DRIFT_TOKENS = 64, 128
PASS_TOKENS = 4096


def _mixed(value: Any) -> Any:
    """`dpo`, and `[dpo, sft]`, are short for a mapping from losses to what each counts."""
    if isinstance(value, str):
        value = {value: 1.0} | MIXED_WITH.get(value, {})
    elif isinstance(value, list) and all(isinstance(name, str) for name in value):
        value = dict.fromkeys(value, 1.0)
    if not isinstance(value, Mapping):
        return value
    return {ALSO_CALLED.get(name, name): share for name, share in value.items()}


Losses = Annotated[
    dict[str, float],
    Field(min_length=1),
    BeforeValidator(_mixed, json_schema_input_type=str | list[str] | dict[str, float]),
]


class PreferenceStage(FedStage):
    """Learn from pairs of answers, or from single ones that were liked or not."""

    kind: Literal["preference"]
    """Learn from preferences without a reward model."""
    formerly: ClassVar[Mapping[str, str]] = {"flattery": "sycophancy"}
    version: ClassVar[int] = 1
    unused: ClassVar[Mapping[str, str]] = UNUSED_WITH_PAIRS

    start: str = Field(alias="from")
    """The model to start from."""
    data: Mixture
    """Preference pairs, or answers with a label."""
    loss: Losses = Field(default_factory=lambda: {"sigmoid": 1.0})
    """A loss by TRL's name, or several with what each counts: {sigmoid: 1, sft: 0.1}."""
    beta: Weight | list[Weight | tuple[Number, Weight]] | None = None
    """How strongly the model is held to the reference; a list moves it over the stage, as weights do."""
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)
    """The probability that a label is wrong."""
    gamma: float | None = None
    """The margin that SimPO wants."""
    temperature: float = Field(default=0.05, gt=0)
    """DiscoPOP's."""
    alpha: float = Field(default=0.25, gt=0)
    """AlphaPO's."""
    ld_alpha: float = Field(default=1.0, ge=0, le=1)
    """How much counts what an answer has beyond the length of the other one (LD-DPO)."""
    divergence: Divergence = "reverse_kl"
    """What holds the model to its reference (f-DPO)."""
    bend: float = Field(default=0.5, ge=0)
    """The alpha of `divergence: alpha_divergence`; at 1 it would be the reverse KL."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """KTO: the weight of desirable answers."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """KTO: the weight of undesirable answers."""
    imitate: Literal["answer", "everything"] = "answer"
    """What the `sft` share learns of the chosen text: TRL's ORPO learns the prompt as well."""
    reference: Literal["auto", "parent", "adapter off", "stored", "none"] = "auto"
    """A frozen copy, the model without its adapter, numbers computed once, or none at all."""
    pairs: Count = Field(default=32, ge=1)
    """Preference pairs per optimiser step."""
    context: Count | None = Field(default=None, ge=2)
    """The longest prompt and answer in tokens."""
    share_prompts: bool = True
    """Whether a prompt is computed once for both of its answers."""
    sycophancy: Count = Field(default=60, ge=0)
    """How many questions the sycophancy evaluation asks at the end; 0 for none."""
    learning_rate: LearningRate = LearningRate()
    """The learning rate: a number, `parent`, or a schedule."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""
    compile: Literal["auto", "on", "off"] = "off"
    """Whether to compile the model."""

    @model_validator(mode="after")
    def losses_fit_together(self) -> PreferenceStage:
        """Names are known; losses of pairs and of single answers do not mix; references are as needed."""
        known = [*PAIR_LOSSES, "sft", *sorted(UNPAIRED)]
        for name in self.loss:
            if name not in known:
                raise ValueError(f"there is no loss '{name}'; there are {', '.join([*ALSO_CALLED, *known])}")
        single = UNPAIRED.intersection(self.loss)
        if single and single != set(self.loss):
            raise ValueError(f"{', '.join(single)} judges single answers; losses of pairs do not mix with it")
        if self.divergence != "reverse_kl" and not OF_ANY_DIVERGENCE.issuperset(self.loss):
            raise ValueError(f"`divergence` has a meaning for {', '.join(sorted(OF_ANY_DIVERGENCE))} alone")
        if self.divergence == "alpha_divergence" and self.bend == 1:
            raise ValueError("`bend: 1` is the reverse KL; say `divergence: reverse_kl`")
        if self.reference == "adapter off" and (self.adapter is None or self.adapter.train):
            raise ValueError("`reference: adapter off` needs an `adapter`, with no part trained whole")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("say how long to train with one of `steps` and `epochs`")
        return self

    def references(self) -> list[Reference]:
        """`from` names the model to go on from, which is also the reference; `data` its preferences."""
        return [Reference("from", self.start, ("model",)), *mixture_references(self.data, without=JUDGED)]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the preferences are read."""
        parent = inputs.get(self.start)
        known = {"parameters", "vocabulary"}
        return {key: parent[key] for key in known & set(parent)} if isinstance(parent, Mapping) else {}

    def run(self, work: Work) -> dict[str, Any]:
        """Read, store what the reference says if that pays, learn, and look at what it did to the model."""
        folder = resolve(str(work.path(self.start)))
        tokenizer = Tokenizer.load(folder)
        judged, batches = self._prepared(work, folder, tokenizer)
        model = load_model(folder, dtype=torch.float32, device=machine.device())
        adapt(work, self, model)
        beside = self._beside()
        work.say(f"loss {self._told()}; reference: {beside}; {batches.steps} steps of {self.pairs}")
        validation = self._validation(work, model.config, judged.held_out)
        stored = {
            "train": batches if beside == "stored" else None,
            "unseen": None if beside == "none" else validation,
        }
        for name, one in stored.items():
            if one is not None:
                store_references(
                    work, name, model, one, parent=str(folder), tail=self.ld_alpha, precision=self.precision
                )
        objective = self.objective(
            beside, batches, copy.deepcopy(model).requires_grad_(False) if beside == "parent" else None
        )
        summary = train(
            work, self, model, tokenizer, objective, batches, self._rates(work, folder, model.config),
            parent_moments=moments_after(work, self, self.start, folder),
        )  # fmt: skip
        looks: dict[str, Any] = {}
        if world().leads:
            if validation is not None:
                settled = replace(objective, reference=None, beside="none" if beside == "none" else "stored")
                looks["unseen"] = _measured(model, settled, validation, self.precision)
            looks |= self._gauged(work, folder, model, tokenizer, judged)
        clear_references(work.folder)
        return {**summary, "data": judged.facts, **looks}

    def _gauged(
        self, work: Work, folder: Path, model: Transformer, tokenizer: Tokenizer, judged: Judged
    ) -> dict[str, Any]:
        """How far the model drifted from its parent on held-out prompts, and whether it flatters."""
        looks: dict[str, Any] = {}
        prompts = [one.prompt.tolist() for one in prompts_of(judged.held_out, DRIFT_PROMPTS)]
        room = model.config.context - max(map(len, prompts), default=0)
        if prompts and room > 0:
            parent = load_model(folder, dtype=torch.float32, device=model.device)
            looks["kl"] = drift_from(
                parent, model, tokenizer, prompts, longest=min(DRIFT_TOKENS, room), seed=work.seed
            )
        if self.sycophancy:
            looks["sycophancy"] = sycophancy_of(model, tokenizer, self.sycophancy)
        return looks

    def objective(
        self, beside: Beside, batches: PreferenceBatches, reference: Transformer | None
    ) -> Preference:
        """The mix of losses with its numbers."""
        betas = weights_over(self._number("beta", 0.1))
        numbers = PreferenceNumbers(
            beta=betas[0][1], label_smoothing=self._number("label_smoothing", 0.0),
            gamma=self._number("gamma", 0.5), temperature=self.temperature, alpha=self.alpha,
        )  # fmt: skip
        return Preference(
            self.loss, numbers, betas=betas if len(betas) > 1 else None, beside=beside, reference=reference,
            desirable=self.desirable_weight, undesirable=self.undesirable_weight,
            whole_chosen=self.imitate == "everything", ld_alpha=self.ld_alpha, memory=batches.memory,
            divergence=self.divergence, bend=self.bend,
        )  # fmt: skip

    def _number(self, name: str, otherwise: float) -> Any:
        """A number as it was given, as the loss's paper has it, or DPO's."""
        given = getattr(self, name)
        if given is not None:
            return given
        return next((DEFAULTS[loss][name] for loss in self.loss if name in DEFAULTS.get(loss, {})), otherwise)

    def _beside(self) -> Beside:
        if not needs_reference(self.loss):
            return "none"
        return cast(Beside, "stored" if self.reference == "auto" else self.reference)

    def _told(self) -> str:
        return " + ".join(name if share == 1 else f"{share:g} {name}" for name, share in self.loss.items())

    def _prepared(self, work: Work, folder: Path, tokenizer: Tokenizer) -> tuple[Judged, PreferenceBatches]:
        """Preference pairs and batches, the same whenever they are made."""
        config = load_config(folder)
        context = context_within(work, self.context, config)
        single = not UNPAIRED.isdisjoint(self.loss)
        judged = read_preferences(work, self.data, tokenizer, context, single=single)
        return judged, self._batches(work, config, judged.training, steps=self.steps)

    def _validation(
        self, work: Work, config: ModelConfig, held_out: Sequence[PreferenceSource]
    ) -> PreferenceBatches | None:
        """All validation pairs as one batch of many rows."""
        count = sum(len(source.pairs) for source in held_out)
        if not count:
            return None
        batches = self._batches(work, config, held_out, steps=1)
        return PreferenceBatches(batches.sources, batch=count, seed=work.seed, steps=1, share=batches.share)

    def _batches(
        self, work: Work, config: ModelConfig, sources: Sequence[PreferenceSource], *, steps: int | None
    ) -> PreferenceBatches:
        some = [source for source in sources if len(source.pairs)]
        whole = self.imitate == "everything"
        return PreferenceBatches(
            some, batch=self.pairs, seed=work.seed, steps=steps, epochs=self.epochs,
            share=self.share_prompts and prompts_can_be_shared(config) and not whole,
            together=not NEEDS_ALL.isdisjoint(self.loss), mismatched="kto" in self.loss, whole_chosen=whole,
        )  # fmt: skip

    def _rates(self, work: Work, folder: Path, config: ModelConfig) -> LearningRates:
        return gentle_rates_after(
            work, self, self.start, folder, config, adamw_at_4096=RATE_AT_4096, muon=MUON_RATE
        )

    def fed(self, work: Work) -> tuple[BatchSource, Tokenizer]:
        """The batch source and its tokenizer, the same whenever they are made."""
        folder = resolve(str(work.path(self.start)))
        tokenizer = Tokenizer.load(folder)
        _, batches = self._prepared(work, folder, tokenizer)
        return batches, tokenizer


@torch.no_grad()
def _measured(
    model: Transformer, objective: Preference, batches: PreferenceBatches, precision: Precision
) -> dict[str, Any]:
    """Rewards on validation pairs, and the share of pairs that the model ranks as people did."""
    totals: dict[str, tuple[float, float]] = {}
    for group in groups_of(batches.rows(0), PASS_TOKENS):
        with one_pass(precision, model.device):
            rewards = objective.rewards(model, collate(group, model.device))
        for name, (total, weight) in rewards.items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + float(total), before[1] + float(weight))
    found: dict[str, Any] = {name: total / weight for name, (total, weight) in totals.items() if weight}
    if "rewards/accuracies" in totals:
        right, count = totals["rewards/accuracies"]
        found["rewards/accuracies"] = as_json(wilson(right, int(count)))
    return found
