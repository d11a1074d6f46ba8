"""Reward models as objectives: of pairs the chosen answer scores higher, of steps the right ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trivium.data.preferences import CHOSEN, REJECTED
from trivium.data.rows import Batch, PackedSequence
from trivium.learn.objective import Loss, Measure
from trivium.learn.objectives.preference import pair_weights, places_of
from trivium.model.attention import Documents
from trivium.model.scalar_head import ScalarHead, scores_at, scores_at_ends
from trivium.model.transformer import Transformer


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margins: Tensor | float = 0.0, centring: float = 0.0
) -> Tensor:
    """-log P(chosen beats rejected by its margin), and a pull of both rewards towards a mean of zero.

    The margin is Llama 2's (2307.09288), the pull Eisenstein et al.'s (2312.09244): one value per pair.
    """
    return -F.logsigmoid(chosen - rejected - margins) + centring * (chosen + rejected) ** 2


def pair_scores(model: Transformer, head: ScalarHead, batch: Batch) -> tuple[Tensor, Tensor]:
    """The rewards of the chosen and of the rejected answers, pair by pair."""
    scores = scores_at_ends(model, head, batch.tokens, batch.lengths, batch.facts["back"])
    return scores[places_of(batch, CHOSEN)], scores[places_of(batch, REJECTED)]


@dataclass
class BradleyTerry:
    """A scalar head over the model's last state, trained so that chosen answers score above rejected ones."""

    extra: ScalarHead
    centring: float = 0.0

    name = "reward"

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        return pair_weights(rows, roles=(CHOSEN,))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        chosen, rejected = pair_scores(model, self.extra, batch)
        places = places_of(batch, CHOSEN).tolist()
        margins, weights = (
            torch.tensor([batch.facts[name][place] for place in places], device=chosen.device)
            for name in ("margin", "weight")
        )
        losses = bradley_terry(chosen, rejected, margins, self.centring) * weights
        apart, count = (chosen - rejected).detach(), float(len(places))
        both = torch.cat((chosen, rejected)).detach()
        metrics: dict[str, Measure] = {
            "loss": (losses.detach().sum(), weights.sum()),
            "accuracy": ((apart > 0).float().sum(), count),
            "margin": (apart.sum(), count),
            "mean_reward": (both.sum(), 2 * count),
            "rewards/chosen": (chosen.detach().sum(), count),
            "rewards/rejected": (rejected.detach().sum(), count),
        }
        return Loss(losses.sum(), metrics)


@dataclass
class StepCorrectness:
    """A scalar head read at the end of every step, trained to say whether the step is right.

    At the last token t of every step the head gives p_t = sigmoid(w h_t + b), and with the label y_t
    (Lightman et al., 2305.20050; Wang et al., 2312.08935)

        loss = -sum_t [y_t log p_t + (1 - y_t) log(1 - p_t)] / number of labelled steps,

    which is the cross-entropy of TRL's token classifier with two labels. With soft labels y_t is the share of
    roll-outs from the step that came to the right answer.
    """

    extra: ScalarHead

    name = "reward"

    def weight(self, rows: Sequence[PackedSequence]) -> float:
        """How many steps have a label."""
        return float(sum(row.columns["step"].sum() for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        places = batch.columns["step"].nonzero()[:, 0]
        labels = batch.columns["label"][places]
        context = Documents(batch.lengths, batch.tokens.device)
        scores = scores_at(model, self.extra, batch.tokens, context, places)
        losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        found, count = scores.detach(), float(len(places))
        agrees = (found > 0) == (labels >= 0.5)
        metrics: dict[str, Measure] = {
            "loss": (losses.detach(), count),
            "accuracy": (agrees.float().sum(), count),
            "mean_reward": (torch.sigmoid(found).sum(), count),
            "mean_label": (labels.sum(), count),
        }
        return Loss(losses, metrics)
