"""The base of all training stages: parent, data, model, adapter, rates and state, opened in one order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar

import torch
from pydantic import model_validator

from trivium.curate.examination import Examined, held_out_of
from trivium.data.door import Door
from trivium.data.ingredients import Ingredient
from trivium.data.packed import PackedBatches
from trivium.data.ramped import RampedBatches
from trivium.data.rows import PackedSequence
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.processes import world
from trivium.learn.objective import Objective
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates
from trivium.learn.precision import resolve_precision
from trivium.learn.settings import UNAFFECTING, Training
from trivium.learn.sharding import Fill
from trivium.learn.trainer import Reshape
from trivium.model.branches import prompts_can_be_shared
from trivium.model.config import ModelConfig
from trivium.model.float8 import refusal
from trivium.model.flops import parameter_count
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.model.preset import preset
from trivium.model.rank import ranks
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import ROWS, TOKENISED, mixture_references, replay_references
from trivium.stages.parts.inheritance import layers_grown
from trivium.stages.parts.loop import save_model_of, train
from trivium.stages.parts.parents import (
    adapt,
    faster_adapter,
    freeze,
    gentle_rates_after,
    moments_after,
    rates_after,
    with_new_rows,
)
from trivium.stages.parts.shapes import planned_shape, planned_size, shape_of, size_of
from trivium.stages.parts.stage import Product, Reference, Stage, Work
from trivium.tokens.tokenizer import Tokenizer

UNUSED_WITH_PAIRS = {
    "batch": "a batch is counted in `pairs` here, not in tokens: write `pairs: {value}` in place of it",
    "tokens": "say how long to train in `steps` or `epochs`, not in tokens",
    "z_loss": "`z_loss` belongs to next-token prediction; leave it out",
    "validation": "what a source holds out is measured once, at the end: leave `validation` out, and say the "
    "share in `data`",
}
"""Settings of other trainings that preference stages have no use for."""
Data = TypeVar("Data")
ValidationRows = Mapping[str, Sequence[PackedSequence]]
"""Rows to measure the loss on, by source."""
LONGEST = 1024
"""The default context of what is said and answered, as in TRL, where the model has as much."""


@dataclass
class Opened(Generic[Data]):
    """What a training stage has opened, in this order: a field that comes later is not there yet."""

    work: Work
    settings: Training
    """The stage's settings, with what follows from its data and its model filled in."""
    folder: Path = field(init=False)
    """The parent's model; a new model has none."""
    parent_tokenizer: Tokenizer = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    """What the model is trained with: the parent's, unless the stage changes it."""
    data: Data = field(init=False)
    """Whatever else a kind reads before there is a model."""
    context: int = field(init=False)
    """The longest packed sequence, in tokens."""
    batches: Any = field(init=False)
    """A batch source; each kind knows which."""
    model: Transformer = field(init=False)
    rates: LearningRates = field(init=False)
    optimiser_state: Mapping[str, Any] | None = None
    """The parent's, where the stage keeps it."""
    objective: Objective = field(init=False)
    fill: Fill | None = None
    """Has the numbers of a model that was made without, since several processes may each hold a part."""
    new_layers: tuple[int, ...] | None = None
    """Of a model that has grown or will: the layers that are new, none where all became larger."""

    @property
    def device(self) -> str:
        return machine.device()

    @property
    def config(self) -> ModelConfig:
        """The architecture of the parent's model."""
        return load_config(self.folder)

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all."""
        return world().leads

    @property
    def prompts_can_be_shared(self) -> bool:
        """Whether answers to one prompt can be computed over it once."""
        return prompts_can_be_shared(self.config)

    def context_within(self, wish: int | None) -> int:
        """How long rows are: what a person asks for, if the model reads as much."""
        context = wish or min(LONGEST, self.config.context)
        if context > self.config.context:
            raise TriviumError(
                f"{self.work.stage}: the model reads {self.config.context} tokens at most, so `context` is "
                f"not {context}; lower it, or extend the model's context in a midtrain stage first."
            )
        return context


class TrainingStage(Training, Stage):
    """A stage that trains a model; a kind says what it reads, what it changes and what its loss is.

    Left as it is, it goes on from `from` and learns to predict the next token of the documents in `data`.
    """

    produces: ClassVar[Product] = "model"
    together: ClassVar[bool] = True
    unaffecting: ClassVar[frozenset[str]] = UNAFFECTING
    # What it may start from.
    starts_from: ClassVar[tuple[Product, ...]] = ("model",)
    # What `data` of this kind holds, where a child may see it again: plain documents, or examples as well.
    trains_on: ClassVar[Literal["documents", "examples"] | None] = None
    # What a source in `data` cannot say, as it would change nothing.
    unused_in_data: ClassVar[tuple[str, ...]] = ()
    # Settings of every training that this kind has no use for, each with what to do instead.
    unused: ClassVar[Mapping[str, str]] = {}
    # Whether something besides validation, samples and checkpoints looks at the whole model, such as rollouts
    # or what is measured after the training; where not, a divided training keeps no whole copy.
    watches_model: ClassVar[bool] = True
    # AdamW's rate for a model of width 4096, and Muon's, of a kind that learns more gently than its parent.
    gentle_rates: ClassVar[tuple[float, float] | None] = None

    @model_validator(mode="after")
    def every_setting_is_used(self) -> Self:
        for name, instead in self.unused.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(instead.replace("{value}", str(getattr(self, name))))
        if "batch" in self.unused and isinstance(self.learning_rate.warmup, str):
            raise ValueError("steps differ in their tokens here: say the warm-up in steps")
        lasting = [name for name in ("tokens", "steps", "epochs") if getattr(self, name) is not None]
        if len(lasting) > 1:
            raise ValueError(
                f"say how long to train with one of {' and '.join(f'`{one}`' for one in lasting)}"
            )
        return self

    def counted(self) -> dict[str, Any]:
        """Kept checkpoints count, as others start from them, and `precision` as what it resolves to."""
        return {
            **super().counted(),
            "kept": self.checkpoint.model_dump(mode="json")["at"],
            "precision": resolve_precision(self.precision, machine.device()),
        }

    def check_machine(self) -> None:
        """Whether the device has the products that are asked for."""
        reason = refusal(machine.device()) if self.precision == "float8" else None
        if reason is not None:
            raise TriviumError(f"`precision: float8` cannot be used here: {reason}; say bfloat16.")

    @property
    def parent(self) -> str | None:
        """The setting `from`, where the kind has it."""
        return getattr(self, "start", None)

    def references(self) -> list[Reference]:
        """`from` names the model to go on from; `data`, and that of `replay`, what to learn from."""
        found = [] if self.parent is None else [Reference("from", self.parent, self.starts_from)]
        by_length = self.trains_on == "documents"
        data = getattr(self, "data", {})
        needs = TOKENISED if self.trains_on is not None else ROWS
        found += mixture_references(data, needs=needs, by_length=by_length, without=self.unused_in_data)
        return found + replay_references(getattr(self, "replay", None), by_length=by_length)

    def examines(self) -> Examined | None:
        """What every source holds out; of preference pairs a tokenizer says what that is."""
        if self.trains_on is None:
            return None
        replay = getattr(self, "replay", None)
        again = replay.data if replay is not None and replay.data is not None else {}
        return held_out_of([*getattr(self, "data", {}).values(), *again.values()])

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the data is read: the model's size, and what a given length costs."""
        parent = inputs.get(self.parent or "")
        config = planned_shape(parent)
        cost: float | None
        if config is not None:
            numbers = {**size_of(config), "model": shape_of(config)}
            cost = self.flops_per_token(config)
        else:
            numbers = planned_size(parent)
            cost = 6.0 * numbers["parameters"] if "parameters" in numbers else None
        tokens = self.tokens
        if not tokens and self.steps:
            batch = self.batch
            if batch is None and config is not None and "batch" not in self.unused:
                reads = getattr(self, "context", None)
                # Of an extended context the longest counts.
                batch = self._batch_of(config, getattr(reads, "longest", reads) or config.reach)
            tokens = self.steps * batch if batch else None
        if tokens is not None:
            numbers["tokens"] = tokens
            if cost is not None:
                numbers["flops"] = cost * tokens
        return numbers

    def flops_per_token(self, config: ModelConfig) -> float:
        """What a token costs to learn; of short documents, attention costs next to nothing."""
        return 6.0 * parameter_count(config)

    @property
    def draws_batches(self) -> bool:
        """Whether batches are made while the model trains, so that no step can be shown without it."""
        return type(self).prepare_batches is not TrainingStage.prepare_batches

    # What a kind says, in the order in which it is asked.

    def read(self, opened: Opened[Any]) -> None:
        """Read the data: set `tokenizer`, `data` and `context`, and `batches` where they need no model."""
        wish = getattr(self, "context", None)
        context = opened.config.reach if wish is None else opened.context_within(wish)
        door = Door(opened.work, opened.tokenizer)
        self.pack(opened, door.ingredients(self.data), [context])  # type: ignore[attr-defined]

    def load(self, opened: Opened[Any]) -> Transformer:
        """The model as the parent left it, in float32."""
        return load_model(opened.folder, dtype=torch.float32, device=machine.device())

    def change(self, opened: Opened[Any]) -> None:
        """Change the model before it is trained: grow its vocabulary, extend its context."""

    def keep_parent(self, opened: Opened[Any]) -> None:
        """Keep what is needed of the model before an adapter or rounding is laid on it."""

    def prepare_batches(self, opened: Opened[Any]) -> None:
        """Set `batches` where they need the model, as rollouts do."""

    def learning_rates(self, opened: Opened[Any]) -> LearningRates:
        """The parent's rates, or gentle ones, or what a person gave."""
        assert self.parent is not None, "a kind without a parent has rates of its own"
        named = (opened.work, opened.settings, self.parent, opened.folder, opened.model.config)
        if self.gentle_rates is None:
            return rates_after(*named)
        return gentle_rates_after(*named, adamw_at_4096=self.gentle_rates[0], muon=self.gentle_rates[1])

    def validation_rows(self, opened: Opened[Any]) -> ValidationRows:
        """The rows whose loss is measured during the training, by source."""
        if self.trains_on != "documents":
            return {}
        data = getattr(self, "data", {})
        return Door(opened.work, opened.tokenizer).validation_rows(
            data, opened.context, self.validation.tokens
        )

    def objective(self, opened: Opened[Any]) -> Objective:
        """What is learned."""
        return NextToken(sources=tuple(opened.batches.names), z_loss=self.z_loss)

    def reshapes(self, opened: Opened[Any]) -> Sequence[Reshape]:
        """The changes of the model's shape while it trains, in order."""
        return ()

    def save(self, opened: Opened[Any], folder: Path) -> None:
        save_model_of(opened.work, opened.settings, opened.model, opened.tokenizer, folder)

    def findings(self, opened: Opened[Any]) -> dict[str, Any]:
        """What stands in the summary besides the training's own numbers."""
        return {"data": opened.batches.report()} if hasattr(opened.batches, "report") else {}

    # What is the same for all kinds.

    def run(self, work: Work) -> dict[str, Any]:
        """Open everything in its order, train to the end, and leave a model's folder."""
        opened = self._read(work)
        opened.model = self.load(opened)
        tables = _tables(opened.model)
        self.change(opened)
        if self.adapter is not None and _tables(opened.model) != tables:
            update = {"adapter": with_new_rows(self.adapter)}
            opened.settings = opened.settings.model_copy(update=update)
        self.keep_parent(opened)
        adapt(work, opened.settings, opened.model)
        if self.train_only:
            freeze(work, self.train_only, opened.model, None if self.parent is None else opened.folder)
        self.prepare_batches(opened)
        rates = self.learning_rates(opened)
        opened.rates = rates if self.adapter is None else faster_adapter(work, opened.settings, rates)
        if self.parent is not None:
            opened.optimiser_state = moments_after(work, self, self.parent, opened.folder)
        opened.objective = self.objective(opened)
        opened.new_layers = None if self.parent is None else layers_grown(opened.folder)
        first = None if opened.new_layers is None else ranks(opened.model.state_dict(), opened.new_layers)
        summary = train(
            opened.work, opened.settings, opened.model, opened.tokenizer, opened.objective, opened.batches,
            opened.rates, parent=self.parent, validation=self.validation_rows(opened),
            optimiser_state=opened.optimiser_state, save=lambda folder: self.save(opened, folder),
            reshapes=self.reshapes(opened), fill=opened.fill,
            watched=self.watches_model or opened.new_layers is not None,
        )  # fmt: skip
        found = {**summary, **self.findings(opened)}
        if opened.new_layers is not None and self.adapter is None:
            # Whether what growth added has come to be used, or its copies have stayed copies.
            last = ranks(opened.model.state_dict(), opened.new_layers)
            found["new_weights"] = {"before": first, "after": last}
        return found

    def _read(self, work: Work) -> Opened[Any]:
        """The parent's tokenizer and the data, the same whenever they are opened."""
        opened: Opened[Any] = Opened(work, self)
        if self.parent is not None:
            opened.folder = resolve(str(work.path(self.parent)))
            opened.parent_tokenizer = opened.tokenizer = Tokenizer.load(opened.folder)
        self.read(opened)
        return opened

    def pack(
        self,
        opened: Opened[Any],
        ingredients: Sequence[Ingredient],
        contexts: Sequence[int],
        *,
        batch: int | None = None,
        lasting: Mapping[str, float] | None = None,
    ) -> None:
        """Set `context` and `batches`: the ingredients, packed into rows of one length after the other.

        `batch` is the size in tokens, else what was said or suits; `lasting` how long, unless settings say.
        """
        opened.context = max(contexts)
        if batch is None:
            batch = self._batch_of(opened.config, opened.context)
        opened.settings = opened.settings.model_copy(update={"batch": batch})
        said = {"tokens": self.tokens, "steps": self.steps, "epochs": self.epochs}
        if lasting is not None and not any(said.values()):
            said |= lasting
        shared: dict[str, Any] = {"batch_tokens": batch, "seed": opened.work.seed, **said}
        opened.batches = (
            PackedBatches(ingredients, context=contexts[0], **shared)
            if len(contexts) == 1
            else RampedBatches(ingredients, contexts=contexts, **shared)
        )

    def _batch_of(self, config: ModelConfig, context: int) -> int:
        """The tokens of a batch: those that were said, or that suit the model; at least one row."""
        if self.batch:
            return max(self.batch, context)
        suited = preset(config.layers, config.vocabulary, context, width=config.width)
        return max(int(suited.values["batch_tokens"]), context)

    def batch_of(self, work: Work, step: int) -> tuple[list[PackedSequence], Tokenizer]:
        """The packed rows of an optimiser step, counted from 1 as in the log, and what reads them."""
        if self.draws_batches:
            return super().batch_of(work, step)
        opened = self._read(work)
        if not 1 <= step <= opened.batches.steps:
            raise TriviumError(
                f"{work.stage} has the steps 1 to {opened.batches.steps}; {step} is none of them."
            )
        return opened.batches.rows(step - 1), opened.tokenizer

    def documents_of(self, work: Work, step: int) -> list[str]:
        """The documents an optimiser step learns from, counted from 1 as in the log."""
        if self.draws_batches:
            return super().documents_of(work, step)
        rows, _ = self.batch_of(work, step)
        return list(dict.fromkeys(identity for row in rows for identity in row.ids))


def _tables(model: Transformer) -> tuple[int, int]:
    """How many rows the tables of tokens and of positions have."""
    places = model.position_embedding
    return model.config.vocabulary, 0 if places is None else places.num_embeddings
