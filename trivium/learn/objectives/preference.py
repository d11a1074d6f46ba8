"""Preferences as an objective: answers to the same prompt in, a loss of their log-probabilities out."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from trivium.data.mixture import weight_at
from trivium.data.preferences import CHOSEN, JUDGED, MISMATCHED, REJECTED
from trivium.data.rows import NOTHING, Batch, PackedSequence
from trivium.kit.errors import TriviumError
from trivium.learn.head_loss import token_log_probabilities
from trivium.learn.holders import gathered
from trivium.learn.objective import Loss, Measure
from trivium.learn.objectives.preference_losses import (
    PAIR_LOSSES,
    WHOLE_BATCH,
    WITHOUT_REFERENCE,
    Divergence,
    Pairs,
    PreferenceNumbers,
    apo_zero_unpaired,
    bco,
    kto,
)
from trivium.model.branches import Branches
from trivium.model.lora import selected
from trivium.model.transformer import Transformer, hidden_at

UNPAIRED = frozenset({"kto", "apo_zero_unpaired", "bco"})
"""Losses of single answers, each liked or not."""
NEEDS_ALL = WHOLE_BATCH | {"kto", "bco"}
"""Losses for which all pairs of a step have to be in one row."""
PER_TOKEN = frozenset({"simpo", "orpo", "alphapo"})
"""Losses whose implicit reward is a mean over tokens."""
SHIFT_MEMORY = 0.9
"""How much of BCO's running mean of rewards stays at every step."""
Beside = Literal["parent", "adapter off", "stored", "none"]


@dataclass(frozen=True)
class Answers:
    """What a model says of all documents of a batch that hold an answer."""

    sums: Tensor
    """Summed log-probability of each document's learned tokens."""
    tokens: Tensor
    mean_logits: Tensor
    """Summed over the learned tokens of each document: the mean of all scores."""
    whole: Tensor
    """The same sums with the prompt, in the documents where that was wanted."""


def answers_under(
    model: Transformer, batch: Batch, *, tail: float = 1.0, with_prompt: Tensor | None = None
) -> Answers:
    """Sums over the answers of a batch; in the documents `with_prompt` also over all of their tokens.

    What lies beyond the length of the shorter answer of a pair counts `tail` (LD-DPO, 2409.06411).
    """
    device = batch.tokens.device
    documents = len(batch.lengths)
    owner = batch.owners()
    answering = batch.weights > 0
    wanted = answering
    if with_prompt is not None:
        all_of_it = torch.zeros(documents, dtype=torch.bool, device=device)
        all_of_it[with_prompt] = True
        wanted = answering | (all_of_it[owner] & (batch.targets != NOTHING))
    context = Branches(batch.lengths, batch.facts["back"], device)
    places = wanted.nonzero().squeeze(1)
    hidden = hidden_at(model, batch.tokens, context, places)
    logprobs, _ = token_log_probabilities(
        hidden, model.head_weight, batch.targets[places], soft_cap=model.final_soft_cap
    )
    owner, inside = owner[places], answering[places]

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(documents, dtype=values.dtype, device=device).index_add(0, owner, values)

    whole = summed(logprobs)
    counts = torch.bincount(owner[inside], minlength=documents)
    sums = whole
    if with_prompt is not None or tail != 1.0:
        share = inside.to(logprobs.dtype)
        if tail != 1.0:
            share[inside] = _up_to_the_shorter(batch, owner[inside], counts, tail)
        sums = summed(logprobs * share)
    with torch.no_grad():
        mean_row = gathered(model.head_weight.float().mean(0))
        mean_logits = summed((hidden.float() @ mean_row) * inside)
    return Answers(sums, counts, mean_logits, whole)


def _up_to_the_shorter(batch: Batch, owner: Tensor, counts: Tensor, tail: float) -> Tensor:
    """1 for the tokens of an answer up to the length of the other one, `tail` beyond it."""
    chosen, rejected = (places_of(batch, role) for role in (CHOSEN, REJECTED))
    shorter = counts.clone()
    shorter[chosen] = shorter[rejected] = torch.minimum(counts[chosen], counts[rejected])
    starts = counts.cumsum(0) - counts
    place = torch.arange(len(owner), device=owner.device) - starts[owner]
    return torch.where(place < shorter[owner], 1.0, tail)


def pair_weights(rows: Sequence[PackedSequence], roles: Collection[str] = (CHOSEN, JUDGED)) -> float:
    """The weights of all pairs, or of all single answers, in these rows."""
    named = (zip(row.facts["weight"], row.facts["role"], strict=True) for row in rows)
    return float(sum(weight for pairs in named for weight, role in pairs if role in roles))


def places_of(batch: Batch, *roles: str) -> Tensor:
    """The documents of a batch that are of these roles."""
    found = [index for index, role in enumerate(batch.facts["role"]) if role in roles]
    return torch.tensor(found, dtype=torch.long, device=batch.tokens.device)


@dataclass
class Preference:
    """Any mix of preference losses over rows of judged answers, against a reference or without one."""

    losses: Mapping[str, float]
    """Which losses, and how much each counts; `sft` is the likelihood of the chosen answer."""
    numbers: PreferenceNumbers = field(default_factory=PreferenceNumbers)
    betas: tuple[tuple[float, float], ...] | None = None
    """(place in the stage from 0 to 1, beta), joined by straight lines; None keeps that of `numbers`."""
    beside: Beside = "parent"
    reference: Transformer | None = None
    desirable: float = 1.0
    undesirable: float = 1.0
    whole_chosen: bool = False
    """Whether the `sft` share also learns the prompt, as ORPO's authors and TRL do."""
    ld_alpha: float = 1.0
    divergence: Divergence = "reverse_kl"
    bend: float = 0.5
    memory: dict[str, float] = field(default_factory=dict)
    """What lasts from step to step; the batch source saves it."""

    name = "preference"
    extra = None

    def __post_init__(self) -> None:
        kinds = {name in UNPAIRED for name in self.losses}
        assert len(kinds) == 1, "losses of pairs and of single answers do not mix"
        self.single = kinds == {True}
        assert (self.beside == "parent") == (self.reference is not None)

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """The weights of the pairs."""
        return pair_weights(rows)

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        whole = places_of(batch, CHOSEN) if self.whole_chosen else None
        found = answers_under(model, batch, tail=self.ld_alpha, with_prompt=whole)
        beside, numbers = self._beside(model, batch, found), self._numbers(batch)
        if self.single:
            return self._of_single_answers(batch, found, beside, numbers)
        return self._of_pairs(batch, found, beside, numbers)

    def rewards(self, model: Transformer, batch: Batch) -> dict[str, Measure]:
        """The measures alone, for pairs that are not learned from."""
        found = answers_under(model, batch, tail=self.ld_alpha)
        beside = self._beside(model, batch, found)
        if self.single:
            return self._measures_of_single_answers(batch, found, beside, self.numbers.beta)
        return self._measures_of_pairs(batch, found, _pairs(batch, found, beside), self.numbers.beta)

    def _numbers(self, batch: Batch) -> PreferenceNumbers:
        if self.betas is None:
            return self.numbers
        return replace(self.numbers, beta=weight_at(self.betas, batch.facts["progress"][0], after=True))

    @torch.no_grad()
    def _beside(self, model: Transformer, batch: Batch, found: Answers) -> Tensor:
        """The log-probabilities of the same answers under the reference."""
        if self.beside == "none":
            return torch.zeros_like(found.sums)
        if self.beside == "stored":
            stored = torch.tensor(batch.facts["reference"], dtype=torch.float64)
            return stored.to(found.sums.dtype).to(found.sums.device)
        if self.beside == "adapter off":
            with selected(model, None):
                return answers_under(model, batch, tail=self.ld_alpha).sums
        assert self.reference is not None
        return answers_under(self.reference, batch, tail=self.ld_alpha).sums

    def _of_pairs(self, batch: Batch, found: Answers, beside: Tensor, numbers: PreferenceNumbers) -> Loss:
        pairs = replace(_pairs(batch, found, beside), divergence=self.divergence, bend=self.bend)
        chosen = places_of(batch, CHOSEN)
        weights = _fact(batch, "weight", chosen)
        if not WHOLE_BATCH.isdisjoint(self.losses) and bool((weights != weights[0]).any()):
            raise TriviumError("aot sorts the answers of all pairs; take the `weight` out of their rows.")
        values = torch.zeros_like(pairs.chosen)
        metrics = self._measures_of_pairs(batch, found, pairs, numbers.beta)
        for name, share in self.losses.items():
            if name == "sft":
                # Divided by the tokens of a mean pair of the step, the mean over pairs is one over tokens.
                value = -found.whole[chosen] / _fact(batch, "typical", chosen)
                metrics["nll_loss"] = ((value * weights).detach().sum(), weights.sum())
            else:
                value = PAIR_LOSSES[name](pairs, numbers)
            values = values + share * value
        return _weighed(values, weights, metrics)

    def _measures_of_pairs(
        self, batch: Batch, found: Answers, pairs: Pairs, beta: float
    ) -> dict[str, Measure]:
        chosen, rejected = places_of(batch, CHOSEN), places_of(batch, REJECTED)
        rewards = self._rewards(pairs, beta)
        margins = rewards[0] - rewards[1]
        count = float(len(chosen))
        return {
            "rewards/chosen": (rewards[0].sum(), count),
            "rewards/rejected": (rewards[1].sum(), count),
            "rewards/margins": (margins.sum(), count),
            "rewards/accuracies": ((margins > 0).float().sum(), count),
            "logps/chosen": (pairs.chosen.detach().sum(), count),
            "logps/rejected": (pairs.rejected.detach().sum(), count),
            "logits/chosen": (found.mean_logits[chosen].sum(), found.tokens[chosen].sum()),
            "logits/rejected": (found.mean_logits[rejected].sum(), found.tokens[rejected].sum()),
        }

    def _rewards(self, pairs: Pairs, beta: float) -> tuple[Tensor, Tensor]:
        """The rewards that the loss implies, for the log."""
        if PER_TOKEN.isdisjoint(self.losses):
            return beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach()
        return (
            beta * (pairs.chosen / pairs.chosen_tokens).detach(),
            beta * (pairs.rejected / pairs.rejected_tokens).detach(),
        )

    def _of_single_answers(
        self, batch: Batch, found: Answers, beside: Tensor, numbers: PreferenceNumbers
    ) -> Loss:
        judged = places_of(batch, JUDGED)
        ratios = found.sums[judged] - beside[judged]
        labels, weights = _fact(batch, "label", judged), _fact(batch, "weight", judged)
        good, bad = torch.ones_like(labels, dtype=torch.bool), torch.zeros_like(labels, dtype=torch.bool)
        beta, sides = numbers.beta, (self.desirable, self.undesirable)
        values = torch.zeros_like(ratios)
        metrics = self._measures_of_single_answers(batch, found, beside, beta)
        for name, share in self.losses.items():
            if name == "kto":
                mismatched = places_of(batch, MISMATCHED)
                kl = (found.sums - beside)[mismatched].detach().mean().clamp(min=0)
                metrics["kl"] = (kl, 1.0)
                liked, disliked = (kto(ratios, side, kl, beta, sides) for side in (good, bad))
            elif name == "apo_zero_unpaired":
                liked, disliked = (apo_zero_unpaired(ratios, side, beta, sides) for side in (good, bad))
            else:
                shift = self._shift(beta * ratios.detach(), labels)
                liked, disliked = (bco(ratios, side, beta, shift) for side in (good, bad))
            # A label between 0 and 1 is that share of both verdicts.
            values = values + share * (labels * liked + (1 - labels) * disliked)
        return _weighed(values, weights, metrics)

    def _measures_of_single_answers(
        self, batch: Batch, found: Answers, beside: Tensor, beta: float
    ) -> dict[str, Measure]:
        judged = places_of(batch, JUDGED)
        labels = _fact(batch, "label", judged)
        sums = found.sums[judged].detach()
        metrics: dict[str, Measure] = {}
        for name, side in (("chosen", labels), ("rejected", 1 - labels)):
            metrics |= {
                f"rewards/{name}": ((beta * (sums - beside[judged]) * side).sum(), side.sum()),
                f"logps/{name}": ((sums * side).sum(), side.sum()),
                f"logits/{name}": (
                    (found.mean_logits[judged] * side).sum(),
                    (found.tokens[judged] * side).sum(),
                ),
            }
        return metrics

    def _shift(self, rewards: Tensor, labels: Tensor) -> float:
        """BCO's running mean of the rewards of both kinds, with this step's taken in."""
        sides = [
            float((rewards * side).sum() / side.sum()) for side in (labels, 1 - labels) if float(side.sum())
        ]
        now = sum(sides) / len(sides)
        before = self.memory.get("shift")
        self.memory["shift"] = now if before is None else SHIFT_MEMORY * before + (1 - SHIFT_MEMORY) * now
        return self.memory["shift"]


def _weighed(values: Tensor, weights: Tensor, metrics: dict[str, Measure]) -> Loss:
    weighed = (values * weights).sum()
    metrics["loss"] = (weighed.detach(), weights.sum())
    return Loss(weighed, metrics)


def _pairs(batch: Batch, found: Answers, beside: Tensor) -> Pairs:
    chosen, rejected = places_of(batch, CHOSEN), places_of(batch, REJECTED)
    return Pairs(
        chosen=found.sums[chosen],
        rejected=found.sums[rejected],
        reference_chosen=beside[chosen],
        reference_rejected=beside[rejected],
        chosen_tokens=found.tokens[chosen],
        rejected_tokens=found.tokens[rejected],
    )


def needs_reference(losses: Mapping[str, float]) -> bool:
    """Whether some loss compares with a reference."""
    return not WITHOUT_REFERENCE.issuperset(losses)


def _fact(batch: Batch, name: str, places: Tensor) -> Tensor:
    values = batch.facts[name]
    return torch.tensor(
        [values[place] for place in places.tolist()], dtype=torch.float32, device=batch.tokens.device
    )
