"""The policy gradient as an objective: sampled completions with their advantages in, a loss sum out.

For the tokens t of the completions i, with the ratio rho = pi(o_t) / pi_old(o_t) and the advantages A,

    loss = sum_i w_i sum_t [ l(rho, A) + beta KL(pi || pi_ref) + c (V - R)^2 / 2 - h H(pi) ] / sum_i d_i

where l is the algorithm's, such as PPO's -min(rho A, clip(rho, 1 - e, 1 + e) A). The critic V is optional.
The rollouts bring A, R, w and d along: see `loss_weights` and `advantages.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.data.rows import Batch, PackedSequence
from trivium.learn.head_loss import token_log_probabilities
from trivium.learn.objective import Loss, Maximum, Measure, Minimum
from trivium.learn.objectives.policy_losses import (
    Algorithm,
    KlEstimator,
    PolicyNumbers,
    Sampled,
    cispo,
    clipped,
    gamma_weight,
    kl_estimate,
    product_ratio,
    sequence_ratio,
    value_losses,
    vespo,
)
from trivium.learn.vocabulary import all_logits
from trivium.model.branches import Branches
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer, hidden_at

Filtered = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits [N, V] and what was drawn [N] -> log-probabilities and entropies under the sampler's filters."""
PPO_NAMES = {
    "policy_loss": "loss/policy_avg",
    "entropy": "policy/entropy_avg",
    "clip_ratio/region_mean": "policy/clipfrac_avg",
}
"""What TRL's PPO calls the measures that its GRPO has other names for."""


@dataclass(frozen=True)
class TokenOutputs:
    """What a model says of the learned tokens of a batch, in order: all [learned]."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None


def token_outputs(
    model: Transformer,
    batch: Batch,
    *,
    temperature: float = 1.0,
    filtered: Filtered | None = None,
    critic: ScalarHead | None = None,
    prune: bool = False,
) -> TokenOutputs:
    """Log-probabilities and entropies of what the sampler drew from, and the critic's values there.

    With `prune` the last layer computes learned places only, which pays where prompts are not shared.
    """
    learned = (batch.weights > 0).nonzero().squeeze(1)
    context = Branches(batch.lengths, batch.facts["back"], batch.tokens.device)
    if prune:
        hidden = hidden_at(model, batch.tokens, context, learned)
    else:
        hidden = model(batch.tokens, context)[learned]
    targets = batch.targets[learned]
    if filtered is not None:
        logprobs, entropy = filtered(all_logits(model, hidden), targets)
    else:
        logprobs, entropies = token_log_probabilities(
            hidden, model.head_weight, targets,
            soft_cap=model.final_soft_cap, temperature=temperature, entropy=True,
        )  # fmt: skip
        assert entropies is not None
        entropy = entropies
    return TokenOutputs(logprobs, entropy, None if critic is None else critic(hidden))


@dataclass
class PolicyGradient:
    """One of the algorithms, over completions that carry advantages and their old log-probabilities."""

    algorithm: Algorithm
    numbers: PolicyNumbers
    temperature: float = 1.0
    filtered: Filtered | None = None
    kl: float = 0.0
    """beta, where the KL is part of the loss."""
    estimator: KlEstimator = "k3"
    unbiased: bool = False
    """Whether the KL is multiplied by the ratio, so that its gradient is the reverse KL's."""
    entropy_bonus: float = 0.0
    extra: ScalarHead | None = None
    """The critic."""
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    prune: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    """Other names for some of the measures."""

    name = "policy"

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """What these completions, and those left out as they teach nothing, add to the divisor."""
        return float(sum(sum(row.facts["divisor"]) for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        outputs = token_outputs(
            model, batch, temperature=self.temperature, filtered=self.filtered, critic=self.extra,
            prune=self.prune,
        )  # fmt: skip
        logprobs, entropy = outputs.logprobs, outputs.entropy
        learned = batch.weights > 0
        columns = {name: column[learned] for name, column in batch.columns.items()}
        weights, total = batch.weights[learned], torch.tensor(float(len(logprobs)))
        documents = len(batch.lengths)
        sampled = Sampled(
            logprobs=logprobs,
            old_logprobs=columns["old_logprob"],
            advantages=columns["advantage"],
            mask=torch.ones_like(logprobs),
            completion=batch.owners()[learned],
            completions=documents,
        )
        ratio = self.algorithm.ratio(sampled)
        losses = self.algorithm.loss(sampled, ratio, self.numbers) * columns["correction"]
        metrics: dict[str, Measure] = {
            "entropy": (entropy.detach().sum(), total),
            "policy/approxkl_avg": (
                ((sampled.logprobs - sampled.old_logprobs) ** 2).detach().sum() / 2,
                total,
            ),
            "policy_loss": ((losses.detach() * weights).sum(), float(sum(batch.facts["divisor"]))),
            "val/ratio": (ratio.detach().sum(), total),
            **self._clipped_shares(sampled, ratio.detach(), total),
        }
        if self.kl:
            kl = kl_estimate(logprobs, columns["reference"], self.estimator)
            kl = kl * ratio if self.unbiased else kl
            losses = losses + self.kl * kl
            metrics["kl"] = (kl.detach().sum(), total)
        if outputs.values is not None:
            errors, held = value_losses(outputs.values, columns["value"], columns["return"], self.value_clip)
            losses = losses + self.value_coefficient * errors
            metrics["loss/value_avg"] = (errors.detach().sum(), total)
            metrics["val/clipfrac_avg"] = (held.float().sum(), total)
        if self.entropy_bonus:
            losses = losses - self.entropy_bonus * entropy
        if all(batch.facts["fresh"]) and len(logprobs):
            metrics |= _sampler_differences(columns, logprobs.detach(), total)
        if all(batch.facts.get("stale", [False])) and len(logprobs):
            metrics |= _staleness(columns["sampled_logprob"], logprobs.detach(), total)
        return Loss(
            (losses * weights).sum(), {self.names.get(name, name): value for name, value in metrics.items()}
        )

    def _clipped_shares(self, sampled: Sampled, ratio: Tensor, total: Tensor) -> dict[str, Measure]:
        """The share of tokens whose gradient the clip has taken away, or bounded."""
        if self.algorithm.loss is cispo:
            capped = (ratio > self.numbers.clip_high) & (sampled.advantages > 0)
            return {"cispo_clip_ratio": (capped.sum(), total)}
        # One value per completion counts once per completion, as in TRL.
        share = sampled.lengths.clamp(min=1)[sampled.completion]
        if self.algorithm.loss is vespo:
            weights = gamma_weight(sampled, self.numbers) / share
            return {"vespo/phi_seq_mean": (weights.sum(), (1 / share).sum().round())}
        if self.algorithm.loss is not clipped:
            return {}
        low = (ratio < 1 - self.numbers.clip_low) & (sampled.advantages < 0)
        high = (ratio > 1 + self.numbers.clip_high) & (sampled.advantages > 0)
        extremes = _extremes(sampled, low, high)
        if self.algorithm.ratio in (sequence_ratio, product_ratio):
            total = (1 / share).sum().round()
            low, high = low / share, high / share
        return {
            "clip_ratio/low_mean": (low.sum(), total),
            "clip_ratio/high_mean": (high.sum(), total),
            "clip_ratio/region_mean": (low.sum() + high.sum(), total),
            **extremes,
        }


def _extremes(sampled: Sampled, low: Tensor, high: Tensor) -> dict[str, Measure]:
    """The share cut below of the completion with the smallest, and above of the one with the largest."""
    if not len(sampled.mask):
        return {}
    present = sampled.lengths > 0
    low, high = (sampled.mean_per_completion(cut.to(sampled.mask))[present] for cut in (low, high))
    return {"clip_ratio/low_min": Minimum(low.min()), "clip_ratio/high_max": Maximum(high.max())}


def _staleness(sampled: Tensor, logprobs: Tensor, total: Tensor) -> dict[str, Measure]:
    """The mean ratio pi / pi_gen to the policy that generated, and KL(pi_gen || pi) by k3."""
    kl = kl_estimate(sampled, logprobs, "k3")
    ratio = torch.exp(logprobs - sampled)
    return {"staleness/ratio": (ratio.sum(), total), "staleness/kl": (kl.sum(), total)}


def _sampler_differences(
    columns: Mapping[str, Tensor], logprobs: Tensor, total: Tensor
) -> dict[str, Measure]:
    """How far the trainer's numbers are from the engine's while both still have the same weights."""
    difference = (logprobs - columns["sampled_logprob"]).abs()
    correction = columns["correction"]
    return {
        "sampling/sampling_logp_difference/mean": (difference.sum(), total),
        "sampling/sampling_logp_difference/max": Maximum(difference.max()),
        "sampling/importance_sampling_ratio/min": Minimum(correction.min()),
        "sampling/importance_sampling_ratio/mean": (correction.sum(), total),
        "sampling/importance_sampling_ratio/max": Maximum(correction.max()),
    }
