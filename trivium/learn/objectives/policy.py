"""The policy gradient as an objective: sampled answers with their advantages in, a loss sum out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trivium.data.rows import NOTHING, Batch, PackedSequence
from trivium.learn.head_loss import token_log_probabilities
from trivium.learn.objective import Loss, Maximum, Measure, Minimum
from trivium.learn.objectives.policy_losses import (
    Algorithm,
    PolicyNumbers,
    Sampled,
    answer_ratio,
    cispo,
    clipped,
    divergence,
    gamma_weight,
    product_ratio,
    token_weights,
    vespo,
)
from trivium.model.branches import Branches
from trivium.model.transformer import Transformer

Estimator = Literal["k1", "k2", "k3"]
Filtered = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Logits [N, V] and what was drawn [N] -> log-probabilities and entropies under the sampler's filters."""


def answer_log_probabilities(
    model: Transformer, batch: Batch, *, temperature: float = 1.0, filtered: Filtered | None = None
) -> tuple[Tensor, Tensor]:
    """The log-probability and the entropy of every learned token, in order: what the sampler drew from."""
    learned = batch.weights > 0
    context = Branches(batch.lengths, batch.facts["back"], batch.tokens.device)
    hidden = model(batch.tokens, context)
    if filtered is not None:
        return filtered(model.logits(hidden[learned]), batch.targets[learned])
    targets = torch.where(learned, batch.targets, NOTHING)
    logprobs, entropy = token_log_probabilities(
        hidden, model.head_weight, targets,
        soft_cap=model.final_soft_cap, temperature=temperature, entropy=True,
    )  # fmt: skip
    assert entropy is not None
    return logprobs[learned], entropy[learned]


@dataclass
class PolicyGradient:
    """One of the algorithms over answers that carry advantages and the log-probabilities they had."""

    algorithm: Algorithm
    numbers: PolicyNumbers
    temperature: float = 1.0
    filtered: Filtered | None = None
    kl: float = 0.0
    estimator: Estimator = "k3"
    unbiased: bool = False
    """Whether the divergence is multiplied by the ratio, so that its gradient is the reverse KL's."""
    entropy_bonus: float = 0.0

    name = "policy"
    extra = None

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """What the rollouts counted for these answers, and for those it left out as they teach nothing."""
        return float(sum(sum(row.facts["divisor"]) for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """The loss sum, and the measures of the update under TRL's names."""
        logprobs, entropy = answer_log_probabilities(
            model, batch, temperature=self.temperature, filtered=self.filtered
        )
        learned = batch.weights > 0
        documents = len(batch.lengths)
        owner = torch.arange(documents, device=learned.device).repeat_interleave(
            torch.tensor(batch.lengths, device=learned.device)
        )
        sampled = Sampled(
            logprobs=logprobs,
            old_logprobs=batch.columns["old_logprob"][learned],
            advantages=batch.columns["advantage"][learned],
            mask=torch.ones_like(logprobs),
            answer=owner[learned],
            answers=documents,
        )
        ratio = self.algorithm.ratio(sampled)
        losses = self.algorithm.loss(sampled, ratio, self.numbers) * batch.columns["correction"][learned]
        policy = losses.detach()
        total = torch.tensor(float(len(logprobs)))
        metrics: dict[str, Measure] = {
            "entropy": (entropy.detach().sum(), total),
            "policy/approxkl_avg": (
                ((sampled.logprobs - sampled.old_logprobs) ** 2).detach().sum() / 2,
                total,
            ),
        }
        if self.kl:
            apart = divergence(logprobs, batch.columns["reference"][learned], self.estimator)
            apart = apart * ratio if self.unbiased else apart
            losses = losses + self.kl * apart
            metrics["kl"] = (apart.detach().sum(), total)
        if self.entropy_bonus:
            losses = losses - self.entropy_bonus * entropy
        weights = token_weights(sampled, self.algorithm.aggregation)
        metrics["policy_loss"] = ((policy * weights).sum(), float(sum(batch.facts["divisor"])))
        metrics |= self._clipped_shares(sampled, ratio.detach(), total)
        metrics |= _beside_the_sampler(batch, logprobs.detach(), learned, total)
        for measures in batch.facts["measures"]:
            metrics |= {
                name: (torch.tensor(value, dtype=torch.double), 1.0) for name, value in measures.items()
            }
        return Loss((losses * weights).sum(), metrics)

    def _clipped_shares(self, sampled: Sampled, ratio: Tensor, total: Tensor) -> dict[str, Measure]:
        """The share of tokens whose gradient the clip has taken away, or bounded."""
        if self.algorithm.loss is cispo:
            capped = (ratio > self.numbers.clip_high) & (sampled.advantages > 0)
            return {"cispo_clip_ratio": (capped.sum(), total)}
        # One value per answer counts once per answer, as in TRL.
        share = sampled.lengths.clamp(min=1)[sampled.answer]
        if self.algorithm.loss is vespo:
            weights = gamma_weight(sampled, self.numbers) / share
            return {"vespo/phi_seq_mean": (weights.sum(), (1 / share).sum().round())}
        if self.algorithm.loss is not clipped:
            return {}
        low = (ratio < 1 - self.numbers.clip_low) & (sampled.advantages < 0)
        high = (ratio > 1 + self.numbers.clip_high) & (sampled.advantages > 0)
        extremes = _extremes(sampled, low, high)
        if self.algorithm.ratio in (answer_ratio, product_ratio):
            total = (1 / share).sum().round()
            low, high = low / share, high / share
        return {
            "clip_ratio/low_mean": (low.sum(), total),
            "clip_ratio/high_mean": (high.sum(), total),
            "clip_ratio/region_mean": (low.sum() + high.sum(), total),
            **extremes,
        }


def _extremes(sampled: Sampled, low: Tensor, high: Tensor) -> dict[str, Measure]:
    """The share cut below of the answer with the smallest, and above of the one with the largest."""
    if not len(sampled.mask):
        return {}
    answered = sampled.lengths > 0
    low, high = (sampled.mean_per_answer(cut.to(sampled.mask))[answered] for cut in (low, high))
    return {"clip_ratio/low_min": Minimum(low.min()), "clip_ratio/high_max": Maximum(high.max())}


def _beside_the_sampler(batch: Batch, logprobs: Tensor, learned: Tensor, total: Tensor) -> dict[str, Measure]:
    """How far the trainer's numbers are from the engine's while both still have the same weights."""
    if not all(batch.facts["fresh"]) or not len(logprobs):
        return {}
    difference = (logprobs - batch.columns["sampled_logprob"][learned]).abs()
    correction = batch.columns["correction"][learned]
    return {
        "sampling/sampling_logp_difference/mean": (difference.sum(), total),
        "sampling/sampling_logp_difference/max": Maximum(difference.max()),
        "sampling/importance_sampling_ratio/min": Minimum(correction.min()),
        "sampling/importance_sampling_ratio/mean": (correction.sum(), total),
        "sampling/importance_sampling_ratio/max": Maximum(correction.max()),
    }
