"""The learning rate as a pure function of the step."""

import math

from trivium.kit.errors import TriviumError
from trivium.kit.numbers import number
from trivium.learn.settings import LearningRate


def warmup_steps(settings: LearningRate, steps: int) -> int:
    """The warm-up in steps; a number below one is a share of the stage."""
    assert not isinstance(settings.warmup, str), "the trainer turns tokens into steps"
    return round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)


def in_steps(settings: LearningRate, batch: int | None) -> LearningRate:
    """The same settings with a warm-up in tokens counted in steps of `batch` tokens."""
    if not isinstance(settings.warmup, str):
        return settings
    tokens = number(settings.warmup.removeprefix("tokens="))
    if isinstance(tokens, str) or batch is None:
        wanted = "a number such as tokens=1M" if isinstance(tokens, str) else "`batch`, the tokens of a step"
        raise TriviumError(f"learning_rate.warmup: '{settings.warmup}' needs {wanted}.")
    return settings.model_copy(update={"warmup": float(max(1, round(tokens / batch)))})


def factor(settings: LearningRate, step: int, steps: int) -> float:
    """What the full learning rate is multiplied by at step `step` (from 0) of `steps`."""
    warm = warmup_steps(settings, steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.decay == "inverse-sqrt":
        return max(settings.to, math.sqrt(max(warm, 1) / max(step, 1))) if step > warm else 1.0
    begin = max(warm, steps - round(settings.decay_share * steps))
    if settings.decay == "constant" or step < begin:
        return 1.0
    # Counted so that the step after the last would have the final rate: no step is wasted at a rate of zero.
    done = (step - begin) / max(1, steps - begin)
    left = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "sqrt": math.sqrt(1 - done),
        "1-sqrt": 1 - math.sqrt(done),
    }[settings.decay]
    return settings.to + (1 - settings.to) * left
