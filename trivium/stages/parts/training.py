"""What all training stages do around the one loop: validate, sample, keep, hand over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import model_validator

from trivium.data.rows import PackedSequence
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object, save_tensors, whole_folder, write_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.processes import barrier, world
from trivium.kit.seals import compared
from trivium.learn import schedules
from trivium.learn.checkpoints import kept_place
from trivium.learn.objective import BatchSource, Objective
from trivium.learn.optimisers import Inherited, LearningRates
from trivium.learn.precision import Precision, resolve_precision
from trivium.learn.settings import UNAFFECTING, Training
from trivium.learn.trainer import Hooks, Trainer
from trivium.learn.validation import ValidationLoss, measure
from trivium.model.adapters import save_adapter
from trivium.model.folder import save_model
from trivium.model.hub import resolve
from trivium.model.lora import AdapterSettings, adapter_names, add_adapter, merged
from trivium.model.quantize import is_prepared, prepare_for, quantise, quantised_as
from trivium.model.transformer import Transformer
from trivium.stages.parts.inheritance import HANDOVER, consumed_by
from trivium.stages.parts.stage import Product, Stage, Work
from trivium.tokens.tokenizer import Tokenizer

GROUPS = ("matrices", "embeddings", "head", "scalars")
ADAPTER_RATE = 10
"""How much faster an adapter learns than all weights would (Schulman et al. 2025)."""
MOMENTS = "moments.safetensors"


class TrainingStage(Training, Stage):
    """The settings of a stage that trains, and which of them decide its result."""

    produces: ClassVar[Product] = "model"
    parallel: ClassVar[bool] = True
    unaffecting: ClassVar[frozenset[str]] = UNAFFECTING
    # Settings of every training that this kind has no use for, each with what to do instead.
    unused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="after")
    def every_setting_is_used(self) -> Self:
        """Refuse settings that would change nothing in this kind of training."""
        for name, instead in self.unused.items():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(instead.replace("{value}", str(getattr(self, name))))
        if "batch" in self.unused and isinstance(self.learning_rate.warmup, str):
            raise ValueError("steps differ in their tokens here: say the warm-up in steps")
        return self

    def counted(self) -> dict[str, Any]:
        """Kept checkpoints count, as others start from them, and `precision` as what it resolves to."""
        return {
            **super().counted(),
            "kept": self.checkpoint.model_dump(mode="json")["at"],
            "precision": resolve_precision(self.precision, machine.device()),
        }


class FedStage(TrainingStage):
    """A training stage whose batches follow from the number of the step, so that any can be shown."""

    def fed(self, work: Work) -> tuple[BatchSource, Tokenizer]:
        """The batch source of the training, and the tokenizer that reads its rows."""
        raise NotImplementedError

    def batch_of(self, work: Work, step: int) -> tuple[list[PackedSequence], Tokenizer]:
        """The packed rows of an optimiser step, counted from 1 as in the log, and what reads them."""
        batches, tokenizer = self.fed(work)
        return rows_of(work, batches, step), tokenizer

    def documents_of(self, work: Work, step: int) -> list[str]:
        """The documents an optimiser step learns from, counted from 1 as in the log."""
        rows, _ = self.batch_of(work, step)
        return documents_in(rows)


def rows_of(work: Work, batches: BatchSource, step: int) -> list[PackedSequence]:
    """The rows of an optimiser step, counted from 1 as in the log."""
    if not 1 <= step <= batches.steps:
        raise TriviumError(f"{work.stage} has the steps 1 to {batches.steps}; {step} is none of them.")
    return batches.rows(step - 1)


def documents_in(rows: Sequence[PackedSequence]) -> list[str]:
    """The ids of the documents in these rows, each once."""
    return list(dict.fromkeys(identity for row in rows for identity in row.ids))


def train(
    work: Work,
    settings: Training,
    model: Transformer,
    tokenizer: Tokenizer,
    objective: Objective,
    batches: BatchSource,
    rates: LearningRates,
    *,
    validation: Mapping[str, Sequence[PackedSequence]] | None = None,
    parent_moments: Mapping[str, Any] | None = None,
    consumed: Callable[[int], Mapping[str, float]] | None = None,
    shares: Callable[[int], Mapping[str, float]] | None = None,
    write: Callable[[Path], None] | None = None,
) -> dict[str, Any]:
    """Train to the end, write the model folder and what a later stage takes over; returns the summary.

    `write` fills the folder where the product is something else than a language model; `consumed` tells how
    many passes over each source are behind a step, and `shares` what part of all that was learnt each had.
    """
    start = getattr(settings, "start", None)
    older = {} if start is None else consumed_by(work.path(start))

    def left() -> dict[str, Any]:
        passes = older if consumed is None else {**older, **consumed(trainer.step)}
        own = {} if shares is None else {"shares": shares(trainer.step)}
        return {**_handover(trainer), "consumed": passes, **own}

    def save(folder: Path) -> None:
        if write is None:
            _save(folder, model, tokenizer, settings, work)
        else:
            write(folder)

    def keep(step: int, tokens: int) -> None:
        if world().leads:
            places = [kept_place(place) for place in settings.checkpoint.at]
            at = [[unit, goal] for unit, goal in places if goal <= (step if unit == "step" else tokens)]
            with whole_folder(work.folder / "kept" / f"step-{step:09d}") as folder:
                save(folder / "model")
                save_tensors(folder / MOMENTS, trainer.optimiser.state())
                write_json(folder / HANDOVER, left())
                write_json(folder / "kept.json", {"step": step, "tokens": tokens, "at": at})
            work.say(f"kept the model after step {step}")

    def sample(step: int) -> None:
        if world().leads:
            _sample(work, settings, model, tokenizer, step)

    adapt(work, settings, model)
    if settings.adapter is not None and settings.learning_rate.start == "preset":
        matrices, scalars = ADAPTER_RATE * rates.matrices, ADAPTER_RATE * rates.scalars
        rates = replace(rates, matrices=matrices, scalars=scalars)
        work.change("learning rate of the adapter", "as for all weights", rates.matrices)
    validation = validation or {}
    hooks = Hooks(
        validate=(lambda: _validated(model, validation, settings.precision)) if validation else None,
        sample=sample if settings.samples.prompts else None,
        keep=keep,
    )
    trainer = Trainer(
        model=model,
        objective=objective,
        batches=batches,
        settings=settings,
        rates=rates,
        folder=work.folder,
        log=work.log,
        progress=work.progress,
        seed=work.seed,
        hooks=hooks,
        parent_moments=parent_moments,
    )
    if trainer.inherited is not None:
        _say_moments(work, trainer.inherited)
    summary = trainer.run()
    if world().leads:
        with whole_folder(work.output("model")) as folder:
            save(folder)
        save_tensors(work.folder / MOMENTS, trainer.optimiser.state())
        write_json(work.folder / HANDOVER, left())
    barrier()
    return summary


def _say_moments(work: Work, inherited: Inherited) -> None:
    """Say which of the parent's moments were taken over; to keep none of them is a mistake."""
    kept, grown, fresh = inherited.kept, inherited.grown, inherited.fresh
    if not kept and not grown:
        raise TriviumError(
            f"{work.stage}: none of the parent's moments fit the {len(fresh)} parameters that are trained "
            "here; say `optimiser_state: reset`."
        )
    after = "the parent's"
    if grown or fresh:
        after += f" for {len(kept) + len(grown)} of {len(kept) + len(grown) + len(fresh)} parameters"
    if grown:
        after += f", zero for the new rows of {', '.join(grown)}"
    if fresh:
        named = ", ".join(fresh[:2]) + (f" and {len(fresh) - 2} more" if len(fresh) > 2 else "")
        after += f", zero for {named}"
    work.change("optimiser moments", "the parent's", after)


def handed_over(model_folder: Path) -> dict[str, Any] | None:
    """What the stage that made a model left beside it: rates at its end, steps, tokens; None from outside."""
    path = model_folder.parent / HANDOVER
    return read_object(compared(path)) if path.is_file() else None


def adapt(work: Work, settings: Training, model: Transformer) -> None:
    """Lay the adapter on the model, or make it feel rounding, if the settings say so and nobody has yet.

    `train` does it; a stage that makes an engine before it trains does it first.
    """
    held = quantised_as(model)
    if held is not None and settings.adapter is None:
        raise TriviumError(
            f"{work.stage}: the model it starts from is rounded to {held}, and no rounded matrix can be "
            "trained: give an `adapter`, or start from the model that was rounded."
        )
    if settings.qat is not None and not is_prepared(model):
        prepare_for(model, settings.qat)
    if settings.adapter is None or adapter_names(model):
        return
    if settings.adapter.base != "float":
        quantise(model, settings.adapter.base)
    add_adapter(model, settings.adapter, seed=work.seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    work.say(f"adapter: {trained:,} of {sum(p.numel() for p in model.parameters()):,} weights are trained")


def with_new_rows(adapter: AdapterSettings) -> AdapterSettings:
    """The adapter's settings where tables have grown: new rows mean nothing until they are learned."""
    grown = {"embedding", "head"} - set(adapter.train)
    return adapter.model_copy(update={"train": sorted([*adapter.train, *grown])})


def _save(folder: Path, model: Transformer, tokenizer: Tokenizer, settings: Training, work: Work) -> None:
    stops = sorted(tokenizer.stop_ids)
    generation = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    if settings.adapter is None:
        save_model(model, folder, generation=generation)
    else:
        with merged(model):
            save_model(model, folder, generation=generation, weights=settings.adapter.save != "adapter")
        if settings.adapter.save != "merged":
            save_adapter(model, folder / "adapter", base=_base(work.path(_start(settings))))
    tokenizer.save(folder)


def _base(place: Path) -> str:
    """How an adapter names its base, from whatever folder it is asked for: an id of the hub stays one."""
    return str(resolve(place).absolute()) if place.exists() else str(place)


def _start(settings: Training) -> str:
    """The model an adapter lies on."""
    start = getattr(settings, "start", None)
    assert isinstance(start, str), "a new model is refused an adapter before it is made"
    return start


def _handover(trainer: Trainer) -> dict[str, Any]:
    """What the next stage may take over: the rates it would go on with, and how far training came."""
    settings, steps = trainer.settings.learning_rate, trainer.batches.steps
    # Not the last step's: a schedule that falls to nothing takes its last step at a rate above it.
    last = schedules.factor(settings, trainer.step, steps)
    peak = {group: trainer.rates.of(group) for group in GROUPS}
    return {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "learning_rates": {group: rate * last for group, rate in peak.items()},
        "peak_learning_rates": peak,
        "weight_decay": trainer.rates.weight_decay,
        "optimiser": trainer.settings.optimiser,
    }


def _validated(
    model: Transformer, validation: Mapping[str, Sequence[PackedSequence]], precision: Precision
) -> dict[str, ValidationLoss]:
    """The loss on what is held out, of every source and of all together."""
    found = {name: measure(model, rows, precision=precision) for name, rows in validation.items()}
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    tokens = sum(one.tokens for one in found.values())
    bits = sum(one.loss * one.tokens for one in found.values()) / math.log(2)
    size = sum(one.loss * one.tokens / math.log(2) / one.bits_per_byte for one in found.values())
    return {"": ValidationLoss(bits * math.log(2) / tokens, bits / size, tokens), **found}


def _sample(work: Work, settings: Training, model: Transformer, tokenizer: Tokenizer, step: int) -> None:
    """Let the model go on from every prompt, for a person to read."""
    wishes = settings.samples
    sampling = Sampling(temperature=0.8, max_new_tokens=wishes.max_new_tokens, seed=work.seed)
    requests = [Request(tokenizer.encode(prompt), sampling) for prompt in wishes.prompts]
    log = MetricsLog(work.folder / "samples.jsonl")
    log.rewind(step - 1)
    for prompt, (one,) in zip(wishes.prompts, Engine(model, tokenizer).generate(requests), strict=True):
        log.write({"step": step, "prompt": prompt, "text": one.text})
        work.say(f"step {step}: {prompt}{one.text!r}")
