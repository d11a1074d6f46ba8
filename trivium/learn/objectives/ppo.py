"""Proximal policy optimisation: what each token of an answer is worth, and the clipped losses it gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from trivium.data.rows import NOTHING, Batch, PackedSequence
from trivium.learn.head_loss import token_log_probabilities
from trivium.learn.objective import Loss, Measure
from trivium.model.branches import Branches
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer

Estimator = Literal["gae", "rloo", "reinforce++"]
STABILITY = 1e-8


def kl_estimate(policy: np.ndarray, reference: np.ndarray, kind: Literal["k1", "k2", "k3"]) -> np.ndarray:
    """Schulman's estimators of KL(policy || reference) for each sampled token, as a penalty in the reward."""
    apart = policy - reference
    if kind == "k1":
        return apart
    if kind == "k2":
        return apart**2 / 2
    return np.exp(-apart) - 1 + apart


def token_rewards(penalties: np.ndarray, score: float) -> np.ndarray:
    """Every token pays its penalty; the score of the whole answer arrives with its last token."""
    rewards = -penalties.astype(np.float64)
    rewards[-1] += score
    return rewards


def discounted(rewards: np.ndarray, discount: float) -> np.ndarray:
    """What is still to come from each token on."""
    found, later = np.empty_like(rewards), 0.0
    for place in range(len(rewards) - 1, -1, -1):
        later = rewards[place] + discount * later
        found[place] = later
    return found


def gae(rewards: np.ndarray, values: np.ndarray, discount: float, decay: float) -> np.ndarray:
    """Generalised advantages (Schulman et al., 1506.02438) of one answer; after its end nothing is worth."""
    td_errors = rewards + discount * np.append(values[1:], 0.0) - values
    return discounted(td_errors, discount * decay)


def leave_one_out(totals: np.ndarray) -> np.ndarray:
    """RLOO (Ahmadian et al., 2402.14740): each answer against the mean of the others to its prompt."""
    assert len(totals) > 1
    return (totals - totals.mean()) * len(totals) / (len(totals) - 1)


def whitened(values: np.ndarray, *, centre: bool = True) -> np.ndarray:
    """Values with a deviation of one over the whole rollout, and a mean of zero unless it is to stay."""
    if len(values) < 2:
        return values
    scaled = (values - values.mean()) / np.sqrt(values.var(ddof=1) + STABILITY)
    return scaled if centre else scaled + values.mean()


@dataclass
class Controller:
    """The coefficient of the penalty: fixed, or steered towards a divergence (Ziegler et al., 1909.08593)."""

    coefficient: float
    target: float | None = None
    horizon: float = 10_000.0

    def update(self, divergence: float, answers: int) -> None:
        """After a rollout of so many answers with this mean divergence."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * answers / self.horizon


@dataclass
class Scale:
    """The mean and spread of all scores so far (Chan et al., 1979), to bring them to a common scale."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def take_in(self, scores: np.ndarray) -> None:
        """Count these scores as well."""
        if not len(scores):
            return
        total, apart = self.count + len(scores), float(scores.mean()) - self.mean
        self.squares += float(((scores - scores.mean()) ** 2).sum())
        self.squares += apart**2 * self.count * len(scores) / total
        self.mean += apart * len(scores) / total
        self.count = total

    def apply(self, scores: np.ndarray) -> np.ndarray:
        """Scores less the mean, over the spread."""
        spread = np.sqrt(self.squares / max(self.count - 1, 1.0))
        return (scores - self.mean) / (spread + STABILITY)


def policy_losses(logprobs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate (Schulman et al., 1707.06347) per token, and where the clip took the gradient."""
    ratio = torch.exp(logprobs - old)
    plain, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return torch.maximum(plain, held), held > plain


def value_losses(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """Half the squared error per token, at its worst within `clip` of the old value; and where that held."""
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, torch.zeros_like(plain, dtype=torch.bool)
    held = (torch.clamp(values, old - clip, old + clip) - returns) ** 2
    return torch.maximum(plain, held) / 2, held > plain


def log_probabilities_and_values(
    model: Transformer, critic: ScalarHead | None, batch: Batch, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """For every learned token its log-probability, the entropy where it was drawn, and the value there."""
    learned = (batch.weights > 0).nonzero().squeeze(1)
    context = Branches(batch.lengths, batch.facts["back"], batch.tokens.device)
    if model.config.experts is None:
        hidden = model(batch.tokens, context, wanted=learned)
    else:
        hidden = model(batch.tokens, context)[learned]
    targets = batch.targets[learned]
    assert bool((targets != NOTHING).all())
    logprobs, entropy = token_log_probabilities(
        hidden, model.head_weight, targets,
        soft_cap=model.final_soft_cap, temperature=temperature, entropy=True,
    )  # fmt: skip
    assert entropy is not None
    return logprobs, entropy, torch.zeros_like(logprobs) if critic is None else critic(hidden)


@dataclass
class ProximalPolicy:
    """PPO over answers that carry for each token an advantage, a return, and what the models once said."""

    extra: ScalarHead | None = None
    """The critic: a value for every state of the policy; None where advantages need none."""
    temperature: float = 1.0
    clip: float = 0.2
    value_clip: float | None = 0.2
    value_coefficient: float = 0.1
    entropy_bonus: float = 0.0

    name = "ppo"

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """The tokens of the answers, counted by the feed."""
        return float(sum(sum(row.facts["divisor"]) for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        """The loss sum, and the measures of the update under TRL's names."""
        learned = batch.weights > 0
        old, advantages = batch.columns["old_logprob"][learned], batch.columns["advantage"][learned]
        logprobs, entropy, values = log_probabilities_and_values(model, self.extra, batch, self.temperature)
        losses, cut = policy_losses(logprobs, old, advantages, self.clip)
        apart = (logprobs - old).detach()
        total = float(len(logprobs))
        metrics: dict[str, Measure] = {
            "loss/policy_avg": (losses.detach().sum(), total),
            "policy/entropy_avg": (entropy.detach().sum(), total),
            "policy/approxkl_avg": ((apart**2).sum() / 2, total),
            "policy/clipfrac_avg": (cut.float().sum(), total),
            "val/ratio": (apart.exp().sum(), total),
        }
        if self.extra is not None:
            returns = batch.columns["return"][learned]
            errors, held = value_losses(values, batch.columns["value"][learned], returns, self.value_clip)
            metrics["loss/value_avg"] = (errors.detach().sum(), total)
            metrics["val/clipfrac_avg"] = (held.float().sum(), total)
            losses = losses + self.value_coefficient * errors
        if self.entropy_bonus:
            losses = losses - self.entropy_bonus * entropy
        for measures in batch.facts["measures"]:
            metrics |= {
                key: (torch.tensor(value, dtype=torch.double), 1.0) for key, value in measures.items()
            }
        if all(batch.facts["fresh"]):
            difference = (logprobs.detach() - batch.columns["sampled_logprob"][learned]).abs()
            metrics["sampling/sampling_logp_difference/mean"] = (difference.sum(), total)
        return Loss(losses.sum(), metrics)
