"""Around the one loop: measure, sample, keep, save, and leave what the next stage takes over."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.data.batches import PlannedBatches
from trivium.data.rows import PackedSequence
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_object, save_tensors, whole_folder, write_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.processes import barrier, world
from trivium.learn import schedules
from trivium.learn.checkpoints import kept_place
from trivium.learn.objective import BatchSource, Objective
from trivium.learn.optimisers import Inherited, LearningRates
from trivium.learn.precision import Precision
from trivium.learn.settings import Training
from trivium.learn.sharding import Fill
from trivium.learn.trainer import Hooks, Reshape, Trainer
from trivium.learn.validation import ValidationLoss, measure
from trivium.model.adapters import save_adapter
from trivium.model.folder import save_model
from trivium.model.hub import resolve
from trivium.model.lora import merged
from trivium.model.transformer import Transformer
from trivium.stages.parts.inheritance import consumed_by
from trivium.stages.parts.parents import GROUPS
from trivium.stages.parts.stage import HANDOVER, MOMENTS, Work
from trivium.tokens.tokenizer import Tokenizer

SAMPLED = ("do_sample", "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
"""What a child takes over of its parent's generation_config.json."""


def train(
    work: Work,
    settings: Training,
    model: Transformer,
    tokenizer: Tokenizer,
    objective: Objective,
    batches: BatchSource,
    rates: LearningRates,
    *,
    parent: str | None,
    save: Callable[[Path], None],
    validation: Mapping[str, Sequence[PackedSequence]] | None = None,
    optimiser_state: Mapping[str, Any] | None = None,
    reshapes: Sequence[Reshape] = (),
    watched: bool = True,
    fill: Fill | None = None,
) -> dict[str, Any]:
    """Train to the end, write the model folder and what a later stage takes over; returns the summary.

    `save` fills a folder with the product; `watched` and `fill` are the trainer's.
    """
    older = {} if parent is None else consumed_by(work.path(parent))

    def left() -> dict[str, Any]:
        planned = batches if isinstance(batches, PlannedBatches) else None
        passes = {**older, **(planned.consumed(trainer.step) if planned else {})}
        shares = planned.shares(trainer.step) if planned else {}
        return {**_handover(trainer), "consumed": passes, **({"shares": shares} if shares else {})}

    def keep(step: int, tokens: int) -> None:
        moments = trainer.moments()
        if world().leads:
            places = [kept_place(place) for place in settings.checkpoint.at]
            at = [[unit, goal] for unit, goal in places if goal <= (step if unit == "step" else tokens)]
            with whole_folder(work.folder / "kept" / f"step-{step:09d}") as folder:
                save(folder / "model")
                save_tensors(folder / MOMENTS, moments)
                write_json(folder / HANDOVER, left())
                write_json(folder / "kept.json", {"step": step, "tokens": tokens, "at": at})
            work.say(f"kept the model after step {step}")

    def sample(step: int) -> None:
        if world().leads:
            _sample(work, settings, model, tokenizer, step)

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
        parent_moments=optimiser_state,
        reshapes=reshapes,
        watched=watched,
        fill=fill,
    )
    if trainer.inherited is not None:
        _say_optimiser_state(work, trainer.inherited)
    summary = trainer.run()
    moments = trainer.moments()
    if world().leads:
        with whole_folder(work.output("model")) as folder:
            save(folder)
        save_tensors(work.folder / MOMENTS, moments)
        write_json(work.folder / HANDOVER, left())
    barrier()
    return summary


def _say_optimiser_state(work: Work, inherited: Inherited) -> None:
    """Say how much of the parent's optimiser state is kept; to keep none of it is a mistake."""
    kept, grown, fresh = inherited.kept, inherited.grown, inherited.fresh
    if not kept and not grown:
        raise TriviumError(
            f"{work.stage}: nothing of the parent's optimiser state fits the {len(fresh)} parameters trained "
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
    work.change("optimiser state", "the parent's", after)


def save_model_of(
    work: Work, settings: Training, model: Transformer, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a model's folder, with its adapter merged into it or beside it."""
    stops = sorted(tokenizer.stop_ids)
    generation = {"eos_token_id": stops, "pad_token_id": tokenizer.pad_id}
    start = getattr(settings, "start", None)
    if start is not None and tokenizer.templates:
        generation |= _sampled_as(work.path(start))
    if settings.adapter is None:
        save_model(model, folder, generation=generation)
    else:
        with merged(model):
            save_model(model, folder, generation=generation, weights=settings.adapter.save != "adapter")
        if settings.adapter.save != "merged":
            save_adapter(model, folder / "adapter", base=_base(work.path(_start(settings))))
    tokenizer.save(folder)


def _sampled_as(parent: Path) -> dict[str, Any]:
    """How the parent asks to be sampled; a chat model that says nothing is asked for its likeliest answer."""
    path = parent / "generation_config.json"
    content = read_object(path) if path.is_file() else {}
    kept = {name: content[name] for name in SAMPLED if name in content}
    return kept or {"do_sample": False}


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
