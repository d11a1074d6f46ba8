"""Knowledge distillation: a student learns what a teacher expects at every place, not only what came next.

With the teacher's next-token distribution p, the student's q, and the label y, every learned token costs

    (1 - label_weight) D(p, q) + label_weight (-log q(y)),

where D is one of the divergences in `distillation_losses.py`, or the squared distance of the hidden states.
The tokens come from the data (Hinton et al. 2015), or the student writes them itself and the teacher judges
(on-policy; GKD, 2306.13649).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trivium.data.conversations import Learned
from trivium.data.settings import Mixture
from trivium.kit.numbers import Count
from trivium.kit.processes import world
from trivium.learn.objectives.distillation import Distillation
from trivium.learn.objectives.distillation_losses import DistillationNumbers
from trivium.model.config import ModelConfig
from trivium.model.vocabulary import grow_vocabulary
from trivium.stages.parts.examples import ExampleSources, batch_of_examples, open_examples
from trivium.stages.parts.on_policy import Sampled, StudentAnswers
from trivium.stages.parts.shapes import planned_shape, planned_size, shape_of
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.teachers import (
    TaughtBatches,
    agreement,
    clear_stored,
    in_common,
    open_teacher,
    projection,
    shuffled_tokens,
    stored_teacher,
    vocabularies_fit,
)
from trivium.stages.parts.training import Opened, TrainingStage, ValidationRows


class Distill(TrainingStage):
    """Train a student on the next-token distributions of a teacher with the same vocabulary."""

    kind: Literal["distill"]
    """Learn from a teacher's probabilities."""
    version: ClassVar[int] = 1
    trains_on: ClassVar[Literal["documents", "examples"] | None] = "examples"

    start: str = Field(alias="from")
    """The student: any model, such as one that `shrink` made of the teacher."""
    teacher: str
    """The model whose probabilities are learned."""
    data: Mixture
    """Texts, corpora, conversations, or prompts with completions."""
    context: Count | None = Field(default=None, ge=2)
    """The length of the packed sequences; the model's, at most 1,024, where it is left out."""
    learned: Learned = "assistant"
    """What of a conversation is learned: every turn of the assistant, the last only, or everything."""
    loss: Literal["forward_kl", "reverse_kl", "js", "mse_hidden"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher), a Jensen-Shannon divergence, or the squared distance of
    the final hidden states."""
    js_weight: float = Field(default=0.5, gt=0, lt=1)
    """The weight of the teacher in the mixture of `loss: js`: near 0 it is like the forward KL, near 1 like
    the reverse."""
    temperature: float = Field(default=1.0, gt=0)
    """What both models' logits are divided by before they are compared."""
    label_weight: float = Field(default=0.0, ge=0, le=1)
    """The share of the labels' cross-entropy in the loss; at 1 the teacher is not asked."""
    top_k: Count | None = Field(default=None, ge=1)
    """How many of the teacher's likeliest tokens are stored once, before training; left out, the teacher
    computes along."""
    on_policy: Sampled = None
    """The student answers the prompts itself: `true`, the share of steps in which it does, or settings."""
    shuffle_teacher: bool = False
    """A control: the teacher's probabilities are given to other tokens, so that it can teach nothing."""

    @model_validator(mode="after")
    def settings_fit_together(self) -> Self:
        hidden, silent = self.loss == "mse_hidden", self.label_weight == 1
        if self.js_weight != 0.5 and self.loss != "js":
            raise ValueError("`js_weight` belongs to `loss: js`; leave it out")
        if hidden and self.temperature != 1:
            raise ValueError("`temperature` divides logits, and `loss: mse_hidden` has none; leave it out")
        if hidden and self.z_loss and not silent:
            raise ValueError("`z_loss` keeps logits small, and `loss: mse_hidden` has none; leave it out")
        for name, given in (("top_k", self.top_k), ("shuffle_teacher", self.shuffle_teacher)):
            if hidden and given:
                raise ValueError(f"`{name}` is about the teacher's probabilities, not its hidden states")
        if silent and (self.top_k or self.on_policy or self.shuffle_teacher):
            raise ValueError("at `label_weight: 1` the teacher is not asked; lower it")
        if self.top_k and self.on_policy:
            raise ValueError(
                "what the student will write is not known before: leave `top_k` out with `on_policy`"
            )
        return self

    def references(self) -> list[Reference]:
        return [*super().references(), Reference("teacher", self.teacher, ("model",))]

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """The student's size and the teacher's, and what both compute; refuses vocabularies that differ."""
        numbers, theirs = super().plan(inputs), planned_size(inputs.get(self.teacher))
        vocabularies_fit(self.start, self.teacher, inputs.get(self.start), inputs.get(self.teacher))
        if "parameters" in theirs and self.label_weight < 1:
            numbers["teacher_parameters"] = theirs["parameters"]
            if (shape := planned_shape(inputs.get(self.teacher))) is not None:
                numbers["teacher_model"] = shape_of(shape)
            if "flops" in numbers:
                numbers["flops"] += 2.0 * theirs["parameters"] * numbers["tokens"]
        return numbers

    def flops_per_token(self, config: ModelConfig) -> float:
        """What a token costs the student to learn, and to write where it does."""
        share = 0.0 if self.on_policy is None else self.on_policy.share
        return super().flops_per_token(config) * (1 + share / 3)

    def read(self, opened: Opened[ExampleSources]) -> None:
        """Examples in the tokenizer that both models share, packed into rows."""
        context = opened.context_within(self.context)
        opened.tokenizer = in_common(opened, self.start, self.teacher, self.data)
        sources = open_examples(opened.work, opened.tokenizer, self.data, context, self.learned)
        ingredients = sources.door.ingredients(self.data)
        batch = batch_of_examples(self.batch, ingredients, context)
        self.pack(opened, ingredients, [context], batch=batch, lasting={"epochs": 1.0})
        opened.data = sources

    def change(self, opened: Opened[ExampleSources]) -> None:
        """Report on the data, and add the tokens that only the teacher knew."""
        opened.data.tell(opened.work, opened.batches, opened.tokenizer)
        if opened.tokenizer is not opened.parent_tokenizer:
            opened.work.change("tokenizer", "its own", "the teacher's")
            grow_vocabulary(opened.model, opened.parent_tokenizer, opened.tokenizer, seed=opened.work.seed)

    def objective(self, opened: Opened[ExampleSources]) -> Distillation:
        """The divergence from the teacher, which computes along or has said its part before."""
        work, objective = opened.work, self._asking(opened)
        if self.on_policy is not None:
            answers = StudentAnswers(work, opened.model, opened.tokenizer, self.on_policy)
            opened.batches = TaughtBatches(
                opened.batches, answers, measures=answers.measures, identity=repr(self.on_policy)
            )
        if self.top_k is None:
            return objective
        opened.batches = stored_teacher(
            work, objective, opened.batches, top_k=self.top_k, precision=self.precision,
            identity=f"{work.path(self.teacher)} {self.shuffle_teacher}",
        )  # fmt: skip
        # Its weights are given up: what it says is on the disk.
        return Distillation(None, objective.numbers, vocabulary=objective.vocabulary)

    def _asking(self, opened: Opened[ExampleSources]) -> Distillation:
        """The objective with a teacher that computes along."""
        model, seed = opened.model, opened.work.seed
        hidden = self.loss == "mse_hidden"
        numbers = DistillationNumbers(
            "forward_kl" if self.loss == "mse_hidden" else self.loss,
            self.js_weight, self.temperature, self.label_weight, self.z_loss,
        )  # fmt: skip
        if self.label_weight == 1:
            return Distillation(None, numbers)
        teacher = open_teacher(opened, self.teacher)
        vocabulary = min(model.config.vocabulary, teacher.config.vocabulary)
        return Distillation(
            teacher, numbers, vocabulary=vocabulary, hidden_states=hidden,
            projection=projection(model, teacher, seed) if hidden else None,
            permutation=shuffled_tokens(vocabulary, seed) if self.shuffle_teacher else None,
        )  # fmt: skip

    def validation_rows(self, opened: Opened[ExampleSources]) -> ValidationRows:
        return opened.data.door.validation_rows(opened.data.mixture, opened.context, self.validation.tokens)

    def findings(self, opened: Opened[ExampleSources]) -> dict[str, Any]:
        """What became of the data, and how far from the teacher the student still is on what is held out."""
        found: dict[str, Any] = {"data": opened.data.report}
        rows = self.validation_rows(opened)
        if world().leads and rows and self.label_weight < 1 and self.loss != "mse_hidden":
            found["unseen"] = agreement(opened.model, self._asking(opened), rows, self.precision)
        clear_stored(opened.work.folder)
        return found
