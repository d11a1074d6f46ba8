"""Learning from preferences: answers that people chose become likelier than those they rejected."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from trivium.data.counted import CountedSource
from trivium.data.mixture import weights_over
from trivium.data.preferences import (
    PreferenceBatches,
    PreferencePair,
    Preferences,
    prompts_of,
    read_preferences,
)
from trivium.data.settings import Mixture, Weight
from trivium.kit.numbers import Count, Number
from trivium.learn.objectives.preference import NEEDS_ALL, UNPAIRED, Beside, Preference, needs_reference
from trivium.learn.objectives.preference_losses import (
    OF_ANY_DIVERGENCE,
    PAIR_LOSSES,
    Divergence,
    PreferenceNumbers,
)
from trivium.model.branches import prompts_can_be_shared
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import PAIRS
from trivium.stages.parts.gauges import gauges
from trivium.stages.parts.online import (
    Asked,
    Judges,
    Prompts,
    check_judges,
    judged_by,
    online_pairs,
    online_prompts,
    online_references,
)
from trivium.stages.parts.references import clear_references, measured, store_references
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.training import UNUSED_WITH_PAIRS, Opened, TrainingStage

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
DRIFT_PROMPTS = 64


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


USED_BY = {
    "gamma": {"simpo", "alphapo"}, "temperature": {"discopop"}, "alpha": {"alphapo"},
    "desirable_weight": UNPAIRED, "undesirable_weight": UNPAIRED,
}  # fmt: skip
"""Settings of single losses, which others would leave unread."""


class PreferenceStage(TrainingStage):
    """Learn from pairs of answers, or from single ones that were liked or not."""

    kind: Literal["preference"]
    """Learn from preferences without a reward model."""
    formerly: ClassVar[Mapping[str, str]] = {"flattery": "sycophancy"}
    version: ClassVar[int] = 1
    unused: ClassVar[Mapping[str, str]] = UNUSED_WITH_PAIRS
    unused_in_data: ClassVar[tuple[str, ...]] = PAIRS
    # TRL's rate.
    gentle_rates: ClassVar[tuple[float, float] | None] = (1e-6, 0.0005)

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
    online: Asked = None
    """The model itself answers the prompts in `data` at every step, and `reward` says which answer is better:
    `true`, or settings."""
    reward: Judges = []
    """The scorers that judge what the model answers, as in `rlvr`: a name, `file.py:function`, or {model: rm}
    for a reward stage."""
    context: Count | None = Field(default=None, ge=2)
    """The longest prompt and answer in tokens."""
    share_prompts: bool = True
    """Whether a prompt is computed once for both of its answers."""
    sycophancy: Count = Field(default=60, ge=0)
    """How many questions the sycophancy evaluation asks at the end; 0 for none."""
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
                raise ValueError(
                    f"there is no loss `{name}`; write one of {', '.join([*ALSO_CALLED, *known])}"
                )
        single = UNPAIRED.intersection(self.loss)
        if single and single != set(self.loss):
            raise ValueError(f"{', '.join(single)} judges single answers; losses of pairs do not mix with it")
        if self.divergence != "reverse_kl" and not OF_ANY_DIVERGENCE.issuperset(self.loss):
            raise ValueError(f"`divergence` has a meaning for {', '.join(sorted(OF_ANY_DIVERGENCE))} alone")
        for name, losses in USED_BY.items():
            if getattr(self, name) != type(self).model_fields[name].default and losses.isdisjoint(self.loss):
                raise ValueError(f"`{name}` is used by {' and '.join(sorted(losses))} alone; leave it out")
        if self.divergence != "alpha_divergence" and self.bend != type(self).model_fields["bend"].default:
            raise ValueError("`bend` belongs to `divergence: alpha_divergence`; leave it out")
        if self.divergence == "alpha_divergence" and self.bend == 1:
            raise ValueError("`bend: 1` is the reverse KL; say `divergence: reverse_kl`")
        if self.reference == "adapter off" and (self.adapter is None or self.adapter.train):
            raise ValueError("`reference: adapter off` needs an `adapter`, with no part trained whole")
        return self

    @model_validator(mode="after")
    def online_pairs_are_judged(self) -> PreferenceStage:
        """What the model answers needs a judge, a loss of pairs, and a reference that is there by then."""
        if self.online is None:
            if self.reward:
                raise ValueError(
                    "`reward` judges what the model answers: say `online: true`, or leave it out"
                )
            return self
        if not self.reward:
            raise ValueError("`online` needs a judge: name a scorer or a reward model as `reward`")
        if not UNPAIRED.isdisjoint(self.loss):
            raise ValueError(f"`online` makes pairs, and {', '.join(self.loss)} learns from single answers")
        if self.reference == "stored":
            raise ValueError("what the model will answer is not known before: say `reference: parent`")
        if self.imitate == "everything" or self.ld_alpha != 1:
            raise ValueError("`imitate` and `ld_alpha` belong to pairs that are given; leave them out")
        return self

    @property
    def draws_batches(self) -> bool:
        return self.online is not None

    def references(self) -> list[Reference]:
        """`from` names the model, `data` pairs or prompts, `reward` who judges answers to these."""
        if self.online is None:
            return super().references()
        return [Reference("from", self.start, self.starts_from), *online_references(self.data, self.reward)]

    def counted(self) -> dict[str, Any]:
        found = super().counted()
        if self.online is None:
            return found
        # Our own engine is what every earlier pair was made with, and no setting of those.
        if self.online.engine.kind == "own":
            del found["online"]["engine"]
        return {**found, **judged_by(self.reward)}

    def check_machine(self) -> None:
        super().check_machine()
        check_judges(self.reward)
        if self.online is not None:
            self.online.engine.check_machine()

    def read(self, opened: Opened[_Pairs]) -> None:
        """The preference pairs of every source, as batches of pairs; or the prompts that will be answered."""
        opened.context = opened.context_within(self.context)
        if self.online is not None:
            opened.data = _Pairs(prompts=online_prompts(opened, self.online, self.data))
            return
        single = not UNPAIRED.isdisjoint(self.loss)
        pairs = read_preferences(opened.work, self.data, opened.tokenizer, opened.context, single=single)
        opened.data = _Pairs(pairs)
        opened.batches = self._batches(opened, pairs.training, self.steps)

    def prepare_batches(self, opened: Opened[_Pairs]) -> None:
        """The engine keeps the model's layers, so whatever is laid on them is there by now."""
        if self.online is None:
            return
        opened.batches = online_pairs(
            opened, self.online, opened.data.prompts, self.reward, pairs=self.pairs, steps=self.steps,
            epochs=self.epochs, precision=self.precision, together=not NEEDS_ALL.isdisjoint(self.loss),
            share=self.share_prompts and prompts_can_be_shared(opened.model.config),
        )  # fmt: skip

    def objective(self, opened: Opened[_Pairs]) -> Preference:
        """The mix of losses, with the log-probabilities of the reference computed once where that pays."""
        work, beside = opened.work, self._beside()
        work.say(f"loss {self._told()}; reference: {beside}; {opened.batches.steps} steps of {self.pairs}")
        reference = copy.deepcopy(opened.model).requires_grad_(False) if beside == "parent" else None
        if self.online is not None:
            return self.losses(beside, {}, reference)
        opened.data.validation = self._validation(opened)
        stored = {
            "train": opened.batches if beside == "stored" else None,
            "unseen": None if beside == "none" else opened.data.validation,
        }
        for name, batches in stored.items():
            if batches is not None:
                store_references(
                    work, name, opened.model, batches, parent=str(opened.folder), tail=self.ld_alpha,
                    precision=self.precision,
                )  # fmt: skip
        return self.losses(beside, opened.batches.memory, reference)

    def losses(self, beside: Beside, memory: dict[str, float], reference: Transformer | None) -> Preference:
        """The mix of losses with its numbers; `memory` is what lasts from step to step."""
        betas = weights_over(self._number("beta", 0.1))
        numbers = PreferenceNumbers(
            beta=betas[0][1], label_smoothing=self._number("label_smoothing", 0.0),
            gamma=self._number("gamma", 0.5), temperature=self.temperature, alpha=self.alpha,
        )  # fmt: skip
        return Preference(
            self.loss, numbers, betas=betas if len(betas) > 1 else None, beside=beside, reference=reference,
            desirable=self.desirable_weight, undesirable=self.undesirable_weight,
            whole_chosen=self.imitate == "everything", ld_alpha=self.ld_alpha, memory=memory,
            divergence=self.divergence, bend=self.bend,
        )  # fmt: skip

    def findings(self, opened: Opened[_Pairs]) -> dict[str, Any]:
        """The validation pairs, the drift from the parent, and sycophancy; what became of the data."""
        data = opened.data
        found: dict[str, Any] = (
            {"prompts": len(data.prompts)} if data.pairs is None else {"data": data.pairs.facts}
        )
        if data.validation is not None:
            beside: Beside = "none" if self._beside() == "none" else "stored"
            settled = replace(cast(Preference, opened.objective), reference=None, beside=beside)
            found["unseen"] = measured(opened.model, settled, data.validation, self.precision)
        found |= gauges(
            opened.folder, opened.model, opened.tokenizer, data.asked(), self.sycophancy, opened.work.seed
        )
        clear_references(opened.work.folder)
        return found

    def _number(self, name: str, otherwise: float) -> Any:
        """A number as it was given, as the loss's paper has it, or DPO's."""
        given = getattr(self, name)
        if given is not None:
            return given
        return next((DEFAULTS[loss][name] for loss in self.loss if name in DEFAULTS.get(loss, {})), otherwise)

    def _beside(self) -> Beside:
        if not needs_reference(self.loss):
            return "none"
        if self.online is not None and self.reference == "auto":
            return "adapter off" if self.adapter is not None and not self.adapter.train else "parent"
        return cast(Beside, "stored" if self.reference == "auto" else self.reference)

    def _told(self) -> str:
        return " + ".join(name if share == 1 else f"{share:g} {name}" for name, share in self.loss.items())

    def _validation(self, opened: Opened[_Pairs]) -> PreferenceBatches | None:
        """All validation pairs as one batch of many rows."""
        assert opened.data.pairs is not None, "what the model will answer is not held out"
        count = sum(len(source.items) for source in opened.data.pairs.validation)
        if not count:
            return None
        batches = self._batches(opened, opened.data.pairs.validation, 1)
        seed, share = opened.work.seed, batches.share
        return PreferenceBatches(batches.sources, batch=count, seed=seed, steps=1, share=share)

    def _batches(
        self, opened: Opened[_Pairs], sources: Sequence[CountedSource[PreferencePair]], steps: int | None
    ) -> PreferenceBatches:
        whole = self.imitate == "everything"
        return PreferenceBatches(
            sources, batch=self.pairs, seed=opened.work.seed, steps=steps, epochs=self.epochs,
            share=self.share_prompts and prompts_can_be_shared(opened.config) and not whole,
            together=not NEEDS_ALL.isdisjoint(self.loss), mismatched="kto" in self.loss, whole_chosen=whole,
        )  # fmt: skip


@dataclass
class _Pairs:
    """The preference pairs, and those held out as one batch; or the prompts whose answers make pairs."""

    pairs: Preferences | None = None
    validation: PreferenceBatches | None = None
    prompts: Prompts = field(default_factory=list)

    def asked(self) -> list[list[int]]:
        """Prompts that tell how far the model has moved: held-out ones, where there are any."""
        if self.pairs is None:
            return [one.ids for one in self.prompts[:DRIFT_PROMPTS]]
        return [one.prompt.tolist() for one in prompts_of(self.pairs.validation, DRIFT_PROMPTS)]
