"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from trivium.learn.settings import LearningRate


def warmup_steps(settings: LearningRate, steps: int) -> int:
    """The warm-up in steps; a number below one is a share of the stage."""
    return round(settings.warmup * steps) if settings.warmup < 1 else int(settings.warmup)


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
