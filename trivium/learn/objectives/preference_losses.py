"""Every preference loss as a function of log-probabilities: one value per pair, or per answer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
LARGEST_EXPONENT = 80.0
"""Beyond it float32 has no number left for the exponential."""


@dataclass(frozen=True)
class Pairs:
    """Summed log-probabilities [pairs] of the chosen and the rejected answers, and their tokens."""

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    divergence: Divergence = "reverse_kl"
    bend: float = 0.5
    """The alpha of `alpha_divergence`."""

    @property
    def chosen_ratio(self) -> Tensor:
        """How much likelier the chosen answer is than under the reference, in nats."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """How much likelier the rejected answer is than under the reference, in nats."""
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        """What every DPO-like loss pushes up."""
        return self._scored(self.chosen_ratio) - self._scored(self.rejected_ratio)

    @property
    def mean_margin(self) -> Tensor:
        """The margin of the per-token means, which length cannot buy."""
        chosen, rejected = self._scored(self.chosen_ratio), self._scored(self.rejected_ratio)
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    def _scored(self, ratio: Tensor) -> Tensor:
        """f' of the ratio of probabilities: what the held-down divergence makes of it (f-DPO, 2309.16240)."""
        if self.divergence == "reverse_kl":
            return ratio
        if self.divergence == "forward_kl":
            return 1 - torch.exp(-ratio)
        if self.divergence == "js_divergence":
            return math.log(2) + F.logsigmoid(ratio)
        power = self.bend - 1
        return torch.expm1((power * ratio).clamp(max=LARGEST_EXPONENT)) / power


@dataclass(frozen=True)
class PreferenceNumbers:
    """The numbers the losses share; each loss reads those its paper has."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float = 0.5
    """SimPO's target margin."""
    temperature: float = 0.05
    """DiscoPOP's blending temperature."""
    delta: float = 0.0
    """BCO's running mean of rewards, given by the objective."""
    alpha: float = 0.25
    """How AlphaPO bends its reward; 0 would be SimPO."""


def log_sigmoid_mixture(margin: Tensor, smoothing: float) -> Tensor:
    """The cross-entropy of a preference that is wrong with probability `smoothing`."""
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def sigmoid(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """DPO (Rafailov et al., 2305.18290), with label smoothing as conservative DPO has it."""
    return log_sigmoid_mixture(numbers.beta * pairs.margin, numbers.label_smoothing)


def sigmoid_norm(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """DPO on the per-token means (Tulu 3's length-normalised DPO)."""
    return log_sigmoid_mixture(numbers.beta * pairs.mean_margin, numbers.label_smoothing)


def hinge(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """SLiC's hinge on DPO's margin (Zhao et al., 2305.10425; Liu et al., 2309.06657)."""
    return F.relu(1 - numbers.beta * pairs.margin)


def ipo(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """IPO (Azar et al., 2310.12036), on per-token means as its authors confirmed."""
    return (pairs.mean_margin - 1 / (2 * numbers.beta)) ** 2


def robust(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """Robust DPO (Chowdhury et al., 2403.00409): unbiased when labels are flipped at the stated rate."""
    margin, flipped = numbers.beta * pairs.margin, numbers.label_smoothing
    kept = (1 - flipped) * F.logsigmoid(margin) - flipped * F.logsigmoid(-margin)
    return -kept / (1 - 2 * flipped)


def exo_pair(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """EXO for two answers (Ji et al., 2402.00856): the reverse KL to the smoothed preference."""
    margin, smoothing = numbers.beta * pairs.margin, numbers.label_smoothing
    won = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-smoothing))
    lost = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(smoothing))
    return won + lost


def nca_pair(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """NCA for two answers (Chen et al., 2402.05369): it holds the chosen answer's own likelihood up."""
    chosen, rejected = numbers.beta * pairs.chosen_ratio, numbers.beta * pairs.rejected_ratio
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """BCO on pairs (Jung et al., 2404.04656): each answer called good or bad, less a running mean."""
    chosen = numbers.beta * pairs.chosen_ratio - numbers.delta
    rejected = numbers.beta * pairs.rejected_ratio - numbers.delta
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """SPPO with certain winners (Wu et al., 2405.00675): log-ratios drawn to plus or minus 1/(2 beta)."""
    half = 0.5 / numbers.beta
    return (pairs.chosen_ratio - half) ** 2 + (pairs.rejected_ratio + half) ** 2


def aot(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """AOT on pairs (Melnyk et al., 2406.05882): sorted policy margins against sorted reference margins."""
    policy = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.reference_chosen - pairs.reference_rejected).sort().values
    return log_sigmoid_mixture(numbers.beta * (policy - reference), numbers.label_smoothing)


def aot_unpaired(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """AOT on two sets of answers: the sorted chosen ratios against the sorted rejected ones."""
    difference = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return log_sigmoid_mixture(numbers.beta * difference, numbers.label_smoothing)


def apo_zero(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """APO-zero (D'Oosterlinck et al., 2408.06266): for chosen answers better than the model's own."""
    chosen, rejected = numbers.beta * pairs.chosen_ratio, numbers.beta * pairs.rejected_ratio
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """APO-down (D'Oosterlinck et al., 2408.06266): for chosen answers worse than the model's own."""
    return torch.sigmoid(numbers.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(numbers.beta * pairs.margin)


def discopop(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """DiscoPOP (Lu et al., 2406.08414): logistic for losers, exponential for winners."""
    margin = numbers.beta * pairs.margin
    share = torch.sigmoid(margin / numbers.temperature)
    return -F.logsigmoid(margin) * (1 - share) + torch.exp(-margin) * share


def simpo(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """SimPO (Meng et al., 2405.14734): per-token means, a target margin, no reference."""
    margin = pairs.chosen / pairs.chosen_tokens - pairs.rejected / pairs.rejected_tokens
    return log_sigmoid_mixture(numbers.beta * margin - numbers.gamma, numbers.label_smoothing)


def alphapo(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """AlphaPO (Gupta et al., 2501.03884): SimPO with the reward (1 - p^-alpha) / alpha of the mean p."""
    chosen, rejected = (
        -torch.expm1(-numbers.alpha * total / tokens) / numbers.alpha
        for total, tokens in ((pairs.chosen, pairs.chosen_tokens), (pairs.rejected, pairs.rejected_tokens))
    )
    return log_sigmoid_mixture(numbers.beta * (chosen - rejected) - numbers.gamma, numbers.label_smoothing)


def cpo(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """CPO (Xu et al., 2401.08417): DPO without a reference; its NLL term is the `sft` share of the mix."""
    margin = numbers.beta * (pairs.chosen - pairs.rejected)
    return log_sigmoid_mixture(margin, numbers.label_smoothing)


def slic(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """SLiC-HF (Zhao et al., 2305.10425): a hinge on the plain log-probabilities, without a reference."""
    return F.relu(1 - numbers.beta * (pairs.chosen - pairs.rejected))


def orpo(pairs: Pairs, numbers: PreferenceNumbers) -> Tensor:
    """ORPO's odds-ratio term (Hong et al., 2403.07691); its NLL term is the `sft` share of the mix."""
    chosen = pairs.chosen / pairs.chosen_tokens
    rejected = pairs.rejected / pairs.rejected_tokens
    # log(1 - p) from log p: log1p(-exp(x)) loses every digit where p is close to 1.
    odds = (chosen - rejected) - (torch.log(-torch.expm1(chosen)) - torch.log(-torch.expm1(rejected)))
    return -numbers.beta * F.logsigmoid(odds)


PairLoss = Callable[[Pairs, PreferenceNumbers], Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {
    loss.__name__: loss
    for loss in (
        sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, simpo, alphapo, cpo, slic, orpo,
    )
}  # fmt: skip
WITHOUT_REFERENCE = frozenset({"simpo", "alphapo", "cpo", "slic", "orpo", "sft"})
OF_ANY_DIVERGENCE = frozenset(
    {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}
)
"""Losses of differences alone, in which what a divergence leaves open cancels."""
WHOLE_BATCH = frozenset({"aot", "aot_unpaired"})
"""Losses that compare answers of different pairs, so that a batch cannot be cut into pieces."""


def kto(ratios: Tensor, desirable: Tensor, kl: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """KTO (Ethayarajh et al., 2402.01306): per answer, against the KL of mismatched pairs."""
    good = weights[0] * (1 - torch.sigmoid(beta * (ratios - kl)))
    bad = weights[1] * (1 - torch.sigmoid(beta * (kl - ratios)))
    return torch.where(desirable, good, bad)


def apo_zero_unpaired(ratios: Tensor, desirable: Tensor, beta: float, weights: tuple[float, float]) -> Tensor:
    """APO-zero for single answers: push desirable ones up and the others down."""
    good = weights[0] * (1 - torch.sigmoid(beta * ratios))
    bad = weights[1] * torch.sigmoid(beta * ratios)
    return torch.where(desirable, good, bad)


def bco(ratios: Tensor, desirable: Tensor, beta: float, delta: float) -> Tensor:
    """BCO for single answers (Jung et al., 2404.04656): a classifier of rewards less their running mean."""
    signed = torch.where(desirable, 1.0, -1.0)
    return -F.logsigmoid(signed * (beta * ratios - delta))
