"""Process rewards as an objective: labelled steps in, the loss of saying of each how right it is out.

At the last token t of every step the head gives p_t = sigmoid(w h_t + b), and with the label y_t (Lightman et
al., 2305.20050; Wang et al., 2312.08935)

    loss = -sum_t [y_t log p_t + (1 - y_t) log(1 - p_t)] / number of labelled steps,

which is the cross-entropy of TRL's token classifier with two labels. With soft labels y_t is the share of
roll-outs from the step that came to the right answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trivium.data.rows import Batch, PackedSequence
from trivium.learn.objective import Loss, Measure
from trivium.model.attention import Documents
from trivium.model.scalar_head import ScalarHead, scores_at
from trivium.model.transformer import Transformer


@dataclass
class StepCorrectness:
    """A scalar head read at the end of every step, trained to say whether the step is right."""

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
