"""Supervised fine-tuning: the model learns to answer as the assistant of its examples does."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from trivium.data.conversations import Learned
from trivium.data.examples import any_conversation
from trivium.data.ingredients import with_replay
from trivium.data.settings import Mixture
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.learn.objectives.draft_heads import DraftsAhead
from trivium.learn.objectives.near_parent import Guard, NearParent, NearPredictions, NearWeights
from trivium.learn.objectives.next_token import NextToken
from trivium.model.transformer import Transformer
from trivium.model.vocabulary import grow_vocabulary
from trivium.stages.parts.documents import Replayed, replayed
from trivium.stages.parts.examples import ExampleSources, batch_of_examples, open_examples
from trivium.stages.parts.training import Opened, TrainingStage, ValidationRows
from trivium.tokens.adopt import with_chat_template


class Sft(TrainingStage):
    """Fine-tune a model on prompts with completions, conversations or texts."""

    kind: Literal["sft"]
    """Supervised fine-tuning."""
    version: ClassVar[int] = 2
    trains_on: ClassVar[Literal["documents", "examples"] | None] = "examples"
    watches_model: ClassVar[bool] = False
    # AdamW's usual rate, and a tenth of the Muon rate that pre-training begins with.
    gentle_rates: ClassVar[tuple[float, float] | None] = (2e-5, 0.002)

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
    draft_heads: Count = 0
    """Train so many heads that guess the tokens after the next one, for `--draft`, and nothing else."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""

    @model_validator(mode="after")
    def heads_are_trained_alone(self) -> Sft:
        """What changes the model, or its loss, is not for heads on a model that stays as it is."""
        changes = ("adapter", "train_only", "near_parent", "neftune", "label_smoothing", "z_loss", "qat")
        said = [name for name in changes if getattr(self, name)] if self.draft_heads else []
        if said:
            raise ValueError(f"`draft_heads` leaves the model as it is; leave out {', '.join(said)}")
        return self

    def counted(self) -> dict[str, Any]:
        """A stage without draft heads is what it was before there were any."""
        found = super().counted()
        return found if self.draft_heads else {k: one for k, one in found.items() if k != "draft_heads"}

    def read(self, opened: Opened[_Opened]) -> None:
        """Conversations as the chat template writes them, packed into rows."""
        before = opened.parent_tokenizer
        work, again = replayed(
            opened.work, self.replay, self.start, opened.folder, {"data": self.data}, examples=True
        )
        opened.work, mixture = work, self.data | again
        opened.tokenizer = with_chat_template(before) if any_conversation(work, mixture) else before
        context = opened.context_within(self.context)
        sources = open_examples(work, opened.tokenizer, mixture, context, self.loss)
        new, old = sources.door.ingredients(self.data), sources.door.ingredients(again)
        batch = batch_of_examples(self.batch, (*new, *old), context)
        mixed = new if self.replay is None else with_replay(new, old, self.replay.share)
        self.pack(opened, mixed, [context], batch=batch, lasting={"epochs": 1.0})
        opened.data = _Opened(sources)

    def change(self, opened: Opened[_Opened]) -> None:
        """Report on the data, show an example, and add the tokens of a new chat template."""
        work, tokenizer = opened.work, opened.tokenizer
        opened.data.sources.tell(work, opened.batches, tokenizer)
        if self.draft_heads:
            if tokenizer is not opened.parent_tokenizer:
                raise TriviumError(
                    f"{work.stage}: {self.start} has no chat template, and `draft_heads` leaves the model as "
                    "it is; fine-tune it first, or train the heads on texts."
                )
            opened.data.heads = DraftsAhead.on(opened.model, self.draft_heads)
        elif tokenizer is not opened.parent_tokenizer:
            work.change("chat template", "none", "ChatML")
            grow_vocabulary(opened.model, opened.parent_tokenizer, tokenizer, seed=work.seed)

    def keep_parent(self, opened: Opened[_Opened]) -> None:
        """A frozen copy of the parent, where a guard compares with what it says."""
        near, adapter = self.near_parent, opened.settings.adapter
        # Switched off, an adapter leaves its parent only if nothing else of the model is trained.
        if near is not None and near.kl > 0 and (adapter is None or adapter.train):
            opened.data.parent = copy.deepcopy(opened.model).requires_grad_(False)

    def objective(self, opened: Opened[_Opened]) -> NextToken | DraftsAhead:
        """The next token of what is learned, near the parent where that is wished for; or those after it."""
        if opened.data.heads is not None:
            return opened.data.heads
        return NextToken(
            sources=tuple(opened.data.sources.mixture), z_loss=self.z_loss,
            label_smoothing=self.label_smoothing, noise=self.neftune, guards=self._guards(opened),
        )  # fmt: skip

    def _guards(self, opened: Opened[_Opened]) -> list[Guard]:
        near, sources = self.near_parent, list(opened.data.sources.mixture)
        if near is None:
            return []
        for name in near.on:
            if name not in sources:
                raise TriviumError(
                    f"{opened.work.stage}: `near_parent.on` names {name}, which is not trained on; "
                    f"there are {', '.join(sources)}."
                )
        guards: list[Guard] = [NearWeights(opened.model, near.weights)] if near.weights else []
        if near.kl > 0:
            guards.append(NearPredictions(near.kl, opened.data.parent, tuple(map(sources.index, near.on))))
        return guards

    def validation_rows(self, opened: Opened[_Opened]) -> ValidationRows:
        """What every source holds out, where only what would be learned is measured."""
        found = opened.data.sources
        if self.draft_heads:
            return {}
        return found.door.validation_rows(found.mixture, opened.context, self.validation.tokens)

    def save(self, opened: Opened[_Opened], folder: Path) -> None:
        super().save(opened, folder)
        if opened.data.heads is not None:
            opened.data.heads.save(folder)

    def findings(self, opened: Opened[_Opened]) -> dict[str, Any]:
        return {"data": opened.data.sources.report}


@dataclass
class _Opened:
    """The sources of fine-tuning, the parent where a guard compares with it, and heads that are trained."""

    sources: ExampleSources
    parent: Transformer | None = None
    heads: DraftsAhead | None = None
