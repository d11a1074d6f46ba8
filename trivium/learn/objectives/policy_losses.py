"""Every policy-gradient loss as a function of token log-probabilities: one value per sampled token."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["completion", "token", "constant", "sum"]
GroupEstimator = Literal["group", "centred", "leave_one_out", "baseline", "accept"]
TokenEstimator = Literal["gae", "reinforce++"]
KlEstimator = Literal["k1", "k2", "k3"]
FARTHEST = 20.0
"""The largest log-ratio that VESPO tells from larger ones."""


@dataclass(frozen=True)
class Sampled:
    """The tokens of several completions laid end to end; every tensor but `completion` is [tokens]."""

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    """1 where the model chose the token itself; 0 for a tool's words and what is left out."""
    completion: Tensor
    """Which completion a token belongs to, counted from 0."""
    completions: int

    def per_completion(self, values: Tensor) -> Tensor:
        """The sum of a value over the learned tokens of each completion: [completions]."""
        return values.new_zeros(self.completions).index_add(0, self.completion, values * self.mask)

    def mean_per_completion(self, values: Tensor) -> Tensor:
        """The mean of a value over the learned tokens of each completion: [completions]."""
        return self.per_completion(values) / self.lengths.clamp(min=1)

    @property
    def lengths(self) -> Tensor:
        """How many learned tokens each completion has."""
        return self.per_completion(torch.ones_like(self.mask))


@dataclass(frozen=True)
class PolicyNumbers:
    """The numbers the losses share; each loss reads those its paper has."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    """The largest ratio that may multiply a negative advantage (two-sided clipping)."""
    temperature_positive: float = 1.0
    temperature_negative: float = 1.05
    """SAPO's temperatures."""
    power_positive: float = 2.0
    decay_positive: float = 3.0
    power_negative: float = 3.0
    decay_negative: float = 2.0
    """VESPO's powers and decays."""


def token_ratio(sampled: Sampled) -> Tensor:
    """How much likelier each token has become since it was sampled."""
    return torch.exp(sampled.logprobs - sampled.old_logprobs)


def sequence_ratio(sampled: Sampled) -> Tensor:
    """GSPO's ratio (Zheng et al., 2507.18071): the geometric mean over a completion, for its tokens."""
    mean = sampled.mean_per_completion(sampled.logprobs - sampled.old_logprobs)
    return torch.exp(mean)[sampled.completion]


def product_ratio(sampled: Sampled) -> Tensor:
    """How much likelier each whole completion has become (RLOO, 2402.14740), for each of its tokens."""
    return torch.exp(sampled.per_completion(sampled.logprobs - sampled.old_logprobs))[sampled.completion]


def clipped(sampled: Sampled, ratio: Tensor, numbers: PolicyNumbers) -> Tensor:
    """PPO's clipped surrogate, whose two sides may differ (DAPO's clip-higher)."""
    held = ratio.clamp(1 - numbers.clip_low, 1 + numbers.clip_high)
    if numbers.dual_clip is not None:
        ratio = ratio.clamp(max=numbers.dual_clip)
    return -torch.minimum(ratio * sampled.advantages, held * sampled.advantages)


def cispo(sampled: Sampled, ratio: Tensor, numbers: PolicyNumbers) -> Tensor:
    """CISPO (MiniMax-M1, 2506.13585): the ratio is capped and detached, so no token loses its gradient."""
    weight = ratio.clamp(max=numbers.clip_high).detach()
    return -weight * sampled.advantages * sampled.logprobs


def sapo(sampled: Sampled, ratio: Tensor, numbers: PolicyNumbers) -> Tensor:
    """SAPO (2511.20347): a soft gate around ratio one in place of the clip."""
    rises = (sampled.advantages > 0).to(ratio.dtype)
    temperature = rises * numbers.temperature_positive + (1 - rises) * numbers.temperature_negative
    return -torch.sigmoid(temperature * (ratio - 1)) * (4 / temperature) * sampled.advantages


def gamma_weight(sampled: Sampled, numbers: PolicyNumbers) -> Tensor:
    """VESPO's weight of a completion, e^d w^p e^(-d w) of its whole ratio w, for each token; detached."""
    moved = (sampled.logprobs - sampled.old_logprobs).detach().clamp(-FARTHEST, FARTHEST)
    log_ratio = sampled.per_completion(moved)[sampled.completion].clamp(math.log(1e-8), FARTHEST)
    rises = sampled.advantages >= 0
    power = torch.where(rises, numbers.power_positive, numbers.power_negative)
    decay = torch.where(rises, numbers.decay_positive, numbers.decay_negative)
    return torch.exp(decay + power * log_ratio - decay * torch.exp(log_ratio))


def vespo(sampled: Sampled, ratio: Tensor, numbers: PolicyNumbers) -> Tensor:
    """VESPO (2602.10693): completions fade out smoothly the further the model has moved from them."""
    return -gamma_weight(sampled, numbers) * sampled.advantages * sampled.logprobs


def reinforce(sampled: Sampled, ratio: Tensor, numbers: PolicyNumbers) -> Tensor:
    """REINFORCE: the log-probability times its advantage, with no ratio at all."""
    return -sampled.advantages * sampled.logprobs


def likelihood(sampled: Sampled, ratio: Tensor, numbers: PolicyNumbers) -> Tensor:
    """Expert iteration (STaR, 2203.14465): the plain loss of the completions that were accepted."""
    return -sampled.logprobs * (sampled.advantages > 0)


TokenLoss = Callable[[Sampled, Tensor, PolicyNumbers], Tensor]


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient method: token loss, ratio, what it divides by, how it estimates advantages."""

    loss: TokenLoss
    ratio: Callable[[Sampled], Tensor] = token_ratio
    aggregation: Aggregation = "token"
    advantage: GroupEstimator | TokenEstimator = "group"
    numbers: PolicyNumbers = PolicyNumbers()


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(clipped, aggregation="completion"),
    "bnpo": Algorithm(clipped),
    "dr_grpo": Algorithm(clipped, aggregation="constant", advantage="centred"),
    "dapo": Algorithm(clipped, numbers=PolicyNumbers(clip_high=0.28)),
    "gspo": Algorithm(
        clipped,
        sequence_ratio,
        aggregation="completion",
        numbers=PolicyNumbers(clip_low=3e-4, clip_high=4e-4),
    ),
    "luspo": Algorithm(clipped, sequence_ratio, aggregation="sum"),
    "cispo": Algorithm(cispo, numbers=PolicyNumbers(clip_high=5.0)),
    "sapo": Algorithm(sapo, aggregation="completion"),
    "vespo": Algorithm(vespo),
    "rloo": Algorithm(clipped, product_ratio, aggregation="completion", advantage="leave_one_out"),
    "reinforce": Algorithm(reinforce, advantage="baseline"),
    "expert_iteration": Algorithm(likelihood, advantage="accept"),
}


PPO_ALGORITHMS: dict[str, Algorithm] = {
    "gae": Algorithm(clipped, advantage="gae"),
    "rloo": Algorithm(clipped, advantage="leave_one_out"),
    "reinforce++": Algorithm(clipped, advantage="reinforce++"),
}
"""PPO's clipped surrogate over all tokens of a batch, by the estimator of the advantages."""


def loss_weights(tokens: int, aggregation: Aggregation, longest: int) -> tuple[float, float]:
    """The weight w of each token of a completion, and what the completion adds to the divisor d.

    The loss of a batch is sum_i w_i sum_t l_it / sum_i d_i, for completions of |o_i| learned tokens:

        completion  w = 1/|o|  d = 1    mean over completions of the mean over tokens (GRPO)
        token       w = 1      d = |o|  mean over all tokens (DAPO, PPO)
        constant    w = 1      d = L    over the tokens there could have been (Dr. GRPO, 2503.20783)
        sum         w = 1      d = 1    mean over completions of the sum over tokens (LUSPO)
    """
    if aggregation == "token":
        return 1.0, float(tokens)
    if aggregation == "constant":
        return 1.0, float(longest)
    return (1.0 / max(tokens, 1) if aggregation == "completion" else 1.0), 1.0


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, at its worst within `clip` of the old value; and where that held."""
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    held = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
    return torch.maximum(plain, held) / 2, held > plain


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: KlEstimator) -> Tensor:
    """Schulman's estimators of KL(policy || reference) from the sampled tokens: [tokens] -> [tokens]"""
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return torch.exp(log_ratio) - log_ratio - 1
