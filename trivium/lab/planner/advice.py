"""What a person should know about a training before it starts: its length, its batch, its rate, its pass.

**Length.** Hoffmann et al. (2203.15556) fit the loss of a model of N parameters after D tokens as
L(N, D) = E + A / N^a + B / D^b; the numbers here are the refit of Besiroglu et al. (2404.10102):
E = 1.8172, A = 482.01, B = 2085.43, a = 0.3478, b = 0.3658. For a compute C = 6ND the least loss lies at
N = G (C/6)^(b/(a+b)) with G = (aA / bB)^(1/(a+b)). A model that is trained for longer is smaller, and
cheaper to serve, at the price of compute: what is spent over what the best model of that loss needs.

**Batch and rate.** DeepSeek LLM (2401.02954) fit the best of both over compute C = N D x 6 (AdamW, web text):
batch 0.2920 C^0.3271 tokens, rate 0.3118 C^-0.1250. They are read as an order of magnitude.
"""

from dataclasses import dataclass, replace
from typing import Any

from trivium.kit.numbers import short
from trivium.lab.planner.work import Job

E, A, B, ALPHA, BETA = 1.8172, 482.01, 2085.43, 0.3478, 0.3658
LONGER = 3.0
"""From how many times the compute-optimal tokens per parameter on a training is called over-trained."""
BATCH_APART, RATE_APART = 6.0, 6.0
"""By what factor a batch or a rate may differ from the fit before it is worth a word."""
LEAST_FITTED = 1e17
"""FLOPs below which the fits were never tried, so that nothing is said."""
MUON_RATES = (0.002, 0.1)


def loss(parameters: float, tokens: float) -> float:
    """The fit's loss in nats per token of web text."""
    return E + A / parameters**ALPHA + B / tokens**BETA


def optimal(compute: float) -> tuple[float, float]:
    """The parameters and tokens of the least loss for so many FLOPs."""
    ratio = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    parameters = ratio * (compute / 6) ** (BETA / (ALPHA + BETA))
    return parameters, compute / 6 / parameters


def compute_for(target: float) -> float:
    """The FLOPs with which the compute-optimal model reaches a loss above E."""
    low, high = 1e6, 1e40
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if loss(*optimal(middle)) > target else (low, middle)
    return high


@dataclass(frozen=True)
class Length:
    """How long a training is against the compute-optimal one of the same loss."""

    per_parameter: float
    optimal_parameters: float
    optimal_tokens: float
    loss: float
    optimal_loss: float
    extra_compute: float
    """The FLOPs spent over those the compute-optimal model needs for the same loss."""
    smaller: float
    """The share of that model's parameters that this one has."""
    repaid: float
    """Tokens served after which the smaller model has saved what its training cost more."""


def length_of(parameters: float, tokens: float) -> Length:
    """What the fit says of so many parameters and tokens."""
    compute = 6 * parameters * tokens
    reached = loss(parameters, tokens)
    needed = compute_for(reached)
    same, _ = optimal(needed)
    best, best_tokens = optimal(compute)
    saved = 2 * (same - parameters)
    repaid = (compute - needed) / saved if saved > 0 else float("inf")
    return Length(
        tokens / parameters, best, best_tokens, reached, loss(best, best_tokens), compute / needed,
        parameters / same, repaid,
    )  # fmt: skip


def batch_and_rate(compute: float) -> tuple[float, float]:
    """The batch in tokens and AdamW's rate that the fit has for so many FLOPs."""
    return 0.2920 * compute**0.3271, 0.3118 * compute**-0.1250


def advised(job: Job, stage: Any) -> Job:
    """The job with sentences about it."""
    found: list[str] = []
    if job.config is None or not job.trained_parameters:
        return job
    parameters = float(job.layer_parameters + job.config.vocabulary * job.config.width)
    compute = 6 * parameters * job.tokens
    if stage.kind == "pretrain" and job.tokens:
        found.append(_length_said(parameters, job.tokens))
    rate = getattr(getattr(stage, "learning_rate", None), "start", None)
    if compute >= LEAST_FITTED and stage.kind in ("pretrain", "midtrain") and job.batch:
        batch, fitted = batch_and_rate(compute)
        found += _apart("batch", job.batch, batch, BATCH_APART)
        if isinstance(rate, float | int) and job.optimiser == "adamw":
            found += _apart("learning_rate", float(rate), fitted, RATE_APART)
    low, high = MUON_RATES
    with_muon = job.optimiser == "muon" and stage.kind == "pretrain"
    if with_muon and isinstance(rate, float | int) and not low <= rate <= high:
        found.append(
            f"learning_rate {rate:g} lies outside what Muon's matrices usually take ({low:g} to {high:g})"
        )
    if job.context and job.batch and job.batch < 4 * job.context and stage.kind == "pretrain":
        found.append(
            f"a batch of {short(job.batch)} holds {job.batch / job.context:.0f} sequences of "
            f"{job.context:,}: few documents decide each step"
        )
    return replace(job, advice=tuple(found))


def _length_said(parameters: float, tokens: float) -> str:
    per = tokens / parameters
    if 6 * parameters * tokens < LEAST_FITTED:
        return f"{per:.3g} tokens per parameter (Chinchilla's rule says 20)"
    one = length_of(parameters, tokens)
    text = f"{per:.3g} tokens per parameter; compute-optimal for the same FLOPs: "
    text += f"{short(one.optimal_parameters)} parameters and {short(one.optimal_tokens)} tokens"
    ratio = per / (one.optimal_tokens / one.optimal_parameters)
    if ratio < 1 / LONGER:
        return text + ", so this is under-trained: a smaller model on more tokens would be better"
    if ratio <= LONGER:
        return text
    return text + (
        f"; over-trained {ratio:.0f} times: it costs {one.extra_compute:.2g} times the FLOPs of the best "
        f"model of the same loss, has {one.smaller:.0%} of its parameters, and is repaid after serving "
        f"{short(one.repaid)} tokens"
    )


def _apart(name: str, given: float, fitted: float, most: float) -> list[str]:
    if 1 / most <= given / fitted <= most:
        return []
    side, factor = "above" if given > fitted else "below", max(given / fitted, fitted / given)
    return [f"{name} {short(given)} is {factor:.0f} times {side} the fit, {short(fitted)}"]
