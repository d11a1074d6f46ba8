"""Mid-training: a trained model goes on learning, for a purpose."""

from dataclasses import replace
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from trivium.curate.examination import Examined, held_out_of
from trivium.data.door import Door
from trivium.data.ingredients import Ingredient, eased, with_replay
from trivium.data.settings import Mixture, MixtureSource
from trivium.model.config import ModelConfig
from trivium.model.flops import flops_per_token
from trivium.stages.parts.context_extension import ContextSetting, check_reach, extended
from trivium.stages.parts.documents import MEASURED, Replayed, mixture_references, replayed, source_references
from trivium.stages.parts.growing import Growing
from trivium.stages.parts.inheritance import consumed_by, trained_on
from trivium.stages.parts.new_tokens import NewTokens
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.training import Opened, TrainingStage, ValidationRows

Replayable = dict[str, MixtureSource]


class Midtrain(Growing, TrainingStage):
    """Go on training a model: on better data, a new language or domain, or longer texts."""

    kind: Literal["midtrain"]
    """Continue training on curated data."""
    version: ClassVar[int] = 4
    trains_on: ClassVar[Literal["documents", "examples"] | None] = "documents"
    watches_model: ClassVar[bool] = False

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
    vocabulary: NewTokens | None = None
    """New tokens for the tokenizer."""
    context: ContextSetting | None = None
    """The length of the sequences, and how positions are extended to it."""

    @model_validator(mode="after")
    def what_is_watched_is_not_learnt(self) -> Self:
        learnt = self.data | ((self.replay and self.replay.data) or {})
        for name in learnt.keys() & (self.watch or {}).keys():
            raise ValueError(
                f"`watch` names `{name}`, which is learnt from and measured anyway; leave it out"
            )
        return self

    def references(self) -> list[Reference]:
        """`from` names the parent; the others outside data or corpora."""
        found = super().references()
        if self.watch is not None:
            found += mixture_references(self.watch, "watch", by_length=True, without=MEASURED)
        if self.vocabulary is not None:
            found += source_references("vocabulary.data", self.vocabulary.data)
        return found

    def examines(self) -> Examined:
        """What is held out of the sources that are learned from, and of those that are only measured."""
        learned = super().examines()
        assert learned is not None
        return Examined([*learned.sets, *held_out_of((self.watch or {}).values()).sets])

    def flops_per_token(self, config: ModelConfig) -> float:
        """What a token costs in rows of the longest length."""
        return flops_per_token(config, self.context.longest if self.context else config.reach)

    def read(self, opened: Opened[Replayable]) -> None:
        """The mixture, what is replayed beside it, and how much of each is behind the parent."""
        if self.vocabulary is not None:
            opened.tokenizer = self.vocabulary.extended(opened.work, opened.tokenizer, self.data)
        contexts = self.context.length if self.context is not None else [opened.config.reach]
        check_reach(opened.work.stage, opened.config, self.context)
        taken = {"data": self.data, "watch": self.watch or {}}
        parent = (self.start, opened.folder)
        opened.work, opened.data = replayed(opened.work, self.replay, *parent, taken)
        door = Door(opened.work, opened.tokenizer)
        mixed = self._ramped(door.ingredients(self.data, {**opened.data, **(self.watch or {})}))
        if self.replay is not None:
            mixed = with_replay(mixed, self._ramped(door.ingredients(opened.data)), self.replay.share)
        before = consumed_by(opened.folder)
        mixed = [replace(one, seen=before.get(one.origin, 0.0)) for one in mixed]
        self.pack(opened, mixed, contexts)

    def _ramped(self, given: list[Ingredient]) -> list[Ingredient]:
        """The sources with their weights moving as `ramp` says."""
        if self.ramp == "linear":
            return given
        return [one if one.weights is None else replace(one, weights=eased(one.weights)) for one in given]

    def change(self, opened: Opened[Replayable]) -> None:
        """New tokens and longer positions, and what is taken over of the parent's passes over the data."""
        work = opened.work
        if self.vocabulary is not None:
            mixture = self.data | opened.data | (self.watch or {})
            parent, before = (self.start, opened.folder), opened.parent_tokenizer
            self.vocabulary.add(work, opened.model, parent, before, opened.tokenizer, mixture)
        work.change("positions", *extended(opened.model, self.context, work.seed))
        report = opened.batches.report()
        for one in opened.batches.ingredients:
            work.change(f"passes over {one.name}", round(one.seen, 3), round(report[one.name]["passes"], 3))

    def validation_rows(self, opened: Opened[Replayable]) -> ValidationRows:
        """Of everything learnt, replayed and watched, what neither the parents nor this stage train on."""
        return Door(opened.work, opened.tokenizer).validation_rows(
            self.data | opened.data | (self.watch or {}), opened.context, self.validation.tokens,
            learnt=trained_on([opened.folder], opened.batches.ingredients), required=list(self.watch or ()),
        )  # fmt: skip
