"""What a stage takes over from the model it starts from: learning rates and the optimiser's moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors
from trivium.kit.seals import compared
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import Training
from trivium.model.config import ModelConfig
from trivium.model.preset import preset
from trivium.stages.parts.stage import Work
from trivium.stages.parts.training import GROUPS, MOMENTS, handed_over

LONGEST = 1024
"""The default context of what is said and answered, as in TRL, where the model has as much."""


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


def context_within(work: Work, wish: int | None, config: ModelConfig) -> int:
    """How long rows are: what a person asks for, if the model reads as much."""
    context = wish or min(LONGEST, config.context)
    if context > config.context:
        raise TriviumError(
            f"{work.stage}: the model reads {config.context} tokens at most, so `context` is not {context}; "
            "lower it, or stretch the model's positions in a midtrain stage first."
        )
    return context


def moments_after(work: Work, settings: Training, start: str, folder: Path) -> dict[str, Any] | None:
    """The parent's moments where the stage keeps them; what became of those is said once they are laid on."""
    path = folder.parent / MOMENTS
    if settings.optimiser_state == "reset":
        work.change("optimiser moments", "the parent's" if path.is_file() else "none left", "zero")
        return None
    if not path.is_file():
        raise TriviumError(f"{start} left no optimiser state behind; say `optimiser_state: reset`.")
    return load_tensors(compared(path))
