"""What a stage takes over from the model it starts from, and how an adapter is laid on it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_object
from trivium.kit.processes import world
from trivium.kit.seals import compared
from trivium.learn.optimisers import LearningRates
from trivium.learn.pieces import SavedTensors
from trivium.learn.settings import Training
from trivium.model.config import ModelConfig
from trivium.model.lora import AdapterSettings, add_adapter
from trivium.model.preset import preset
from trivium.model.quantize import prepare_for, quantise, quantised_as
from trivium.model.transformer import Transformer
from trivium.stages.parts.inheritance import layers_grown
from trivium.stages.parts.stage import HANDOVER, MOMENTS, Work

GROUPS = ("matrices", "embeddings", "head", "scalars")
ADAPTER_RATE = 10
"""How much faster an adapter learns than all weights would (Schulman et al. 2025)."""


def rates_after(
    work: Work, settings: Training, start: str, folder: Path, config: ModelConfig
) -> LearningRates:
    """The rate the parent ended with, its peak (`preset`), or a number for the matrices to scale all by."""
    parent, wish = handed_over(folder), settings.learning_rate.start
    optimiser = parent.get("optimiser") if parent else None
    if optimiser not in (None, settings.optimiser):
        work.change("optimiser", optimiser, settings.optimiser)
    if wish == "parent":
        rates = _parents_rates(work, settings, start, folder)
    elif settings.optimiser == "adamw":
        rates = dict.fromkeys(
            GROUPS, 1e-3 * (config.width / 768) ** -0.5 if wish == "preset" else float(wish)
        )
    else:
        peak = parent["peak_learning_rates"] if parent and optimiser in (None, "muon") else None
        rates = peak or preset(config.layers, config.vocabulary, width=config.width).learning_rates
        if wish != "preset":
            rates = {group: rate * float(wish) / rates["matrices"] for group, rate in rates.items()}
    before = parent["learning_rates"]["matrices"] if parent else "unknown"
    work.change("learning rate", before, rates["matrices"])
    decay = settings.weight_decay
    if decay is None:
        decay = parent["weight_decay"] if parent else 0.0
    return LearningRates(**rates, weight_decay=decay)


def _parents_rates(work: Work, settings: Training, start: str, folder: Path) -> dict[str, Any]:
    """The rates the parent would have gone on with, where they mean the same here."""
    parent = handed_over(folder)
    if parent is None:
        raise TriviumError(f"{work.stage}: {start} left no learning rate behind; give a number.")
    optimiser = parent.get("optimiser", settings.optimiser)
    if optimiser != settings.optimiser:
        raise TriviumError(
            f"{work.stage}: {start} was trained by {optimiser}, whose learning rate means something else to "
            f"{settings.optimiser}; give a number."
        )
    if not any(parent["learning_rates"].values()):
        raise TriviumError(
            f"{work.stage}: the learning rate of {start} ended at 0, so there is none to go on with; "
            "give a number, or start from a checkpoint it kept before its rate fell."
        )
    return dict(parent["learning_rates"])


def gentle_rates_after(
    work: Work, settings: Training, start: str, folder: Path, config: ModelConfig,
    *, adamw_at_4096: float, muon: float,
) -> LearningRates:  # fmt: skip
    """The rates a person gave, the parent's, or gentle ones that suit a model of this width."""
    settings = settings.model_copy(update={"weight_decay": settings.weight_decay or 0.0})
    if settings.learning_rate.start == "preset":
        # Narrower models than those 4096 wide bear proportionally more.
        gentle = adamw_at_4096 * 4096 / config.width if settings.optimiser == "adamw" else muon
        learning_rate = settings.learning_rate.model_copy(update={"start": gentle})
        settings = settings.model_copy(update={"learning_rate": learning_rate})
    return rates_after(work, settings, start, folder, config)


def moments_after(work: Work, settings: Training, start: str, folder: Path) -> Mapping[str, Any] | None:
    """The parent's moments where the stage keeps them; what became of those is said once they are laid on."""
    path = folder.parent / MOMENTS
    if settings.optimiser_state == "reset":
        work.change("optimiser state", "the parent's" if path.is_file() else "none", "reset")
        return None
    if not path.is_file():
        raise TriviumError(f"{start} left no optimiser state behind; say `optimiser_state: reset`.")
    # Of several processes each may need a part alone.
    return load_tensors(compared(path)) if world().size == 1 else SavedTensors([compared(path)])


def handed_over(model_folder: Path) -> dict[str, Any] | None:
    """What the stage that made a model left beside it: rates at its end, steps, tokens; None from outside."""
    path = model_folder.parent / HANDOVER
    return read_object(compared(path)) if path.is_file() else None


def adapt(work: Work, settings: Training, model: Transformer) -> None:
    """Lay the adapter on the model, or prepare it for rounding, if the settings say so."""
    held = quantised_as(model)
    if held is not None and settings.adapter is None:
        raise TriviumError(
            f"{work.stage}: the model it starts from is rounded to {held}, and no rounded matrix can be "
            "trained: give an `adapter`, or start from the model that was rounded."
        )
    if settings.qat is not None:
        prepare_for(model, settings.qat)
    if settings.adapter is None:
        return
    if settings.adapter.base != "float":
        quantise(model, settings.adapter.base)
    add_adapter(model, settings.adapter, seed=work.seed)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    work.say(f"adapter: {trained:,} of {sum(p.numel() for p in model.parameters()):,} weights are trained")


def freeze(work: Work, parts: Sequence[str], model: Transformer, parent: Path | None) -> None:
    """Train the named parts alone; `new_layers` are those that a grow stage added to the parent."""
    wanted: list[str] = []
    for part in parts:
        if part != "new_layers":
            wanted.append(part)
            continue
        layers = () if parent is None else layers_grown(parent)
        if not layers:
            raise TriviumError(
                f"{work.stage}: no `grow` stage added layers to the parent; name parts such as `layers.3`."
            )
        wanted += [f"layers.{layer}" for layer in layers]
    names = [name for name, _ in model.named_parameters()]
    for part in wanted:
        if not any(_belongs(name, part) for name in names):
            known = dict.fromkeys(re.match(r"(layers\.)?[^.]+", name)[0] for name in names)  # type: ignore[index]
            raise TriviumError(
                f"{work.stage}: the model has no part `{part}`; `train_only` takes {', '.join(known)} and "
                "parts of these."
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(_belongs(name, part) for part in wanted))
    sizes = [(one.numel(), one.numel() * one.requires_grad) for one in model.parameters()]
    work.change("trained weights", *map(sum, zip(*sizes)))


def _belongs(name: str, part: str) -> bool:
    return name == part or name.startswith(f"{part}.")


def with_new_rows(adapter: AdapterSettings) -> AdapterSettings:
    """The adapter's settings where tables have grown: new rows mean nothing until they are learned."""
    grown = {"embedding", "head"} - set(adapter.train)
    return adapter.model_copy(update={"train": sorted([*adapter.train, *grown])})


def faster_adapter(work: Work, settings: Training, rates: LearningRates) -> LearningRates:
    """The rates of an adapter, unless a person gave a number."""
    if settings.learning_rate.start != "preset":
        return rates
    matrices, scalars = ADAPTER_RATE * rates.matrices, ADAPTER_RATE * rates.scalars
    work.change("learning rate of the adapter", "as for all weights", matrices)
    return replace(rates, matrices=matrices, scalars=scalars)
