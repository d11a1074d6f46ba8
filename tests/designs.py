"""Toy objectives and feeds of the shapes that preferences, PPO and RL need, to prove the loop fits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from small import VOCABULARY
from torch import Tensor, nn

from trivium.data.rows import Batch, PackedSequence, row_of_documents
from trivium.learn.head_loss import token_log_probabilities
from trivium.learn.objective import Loss
from trivium.model.attention import Documents
from trivium.model.transformer import Transformer

LENGTH = 6


class ToyRollouts:
    """Samples answers from the model itself, scores them, and serves each batch of them for two steps."""

    fingerprint = "toy-rollouts"

    def __init__(self, model: Transformer, steps: int = 8, per_rollout: int = 2, answers: int = 4) -> None:
        self.model, self.steps = model, steps
        self.per_rollout, self.answers = per_rollout, answers
        self.rollout: dict[str, Tensor] = {}
        self.made = 0

    def sample(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.full((self.answers, 1), 1)
        logprobs = []
        with torch.no_grad():
            for _ in range(LENGTH):
                documents = Documents([tokens.shape[1]] * self.answers)
                hidden = self.model(tokens.flatten(), documents).view(
                    self.answers, -1, self.model.config.width
                )
                choice = self.model.logits(hidden[:, -1]).log_softmax(-1)
                drawn = torch.multinomial(choice.exp(), 1, generator=generator)
                logprobs.append(choice.gather(1, drawn))
                tokens = torch.cat((tokens, drawn), 1)
        rewards = (tokens[:, 1:] % 2 == 0).float().mean(1)
        self.made += 1
        return {"tokens": tokens, "logprobs": torch.cat(logprobs, 1), "rewards": rewards}

    def rows(self, step: int) -> list[PackedSequence]:
        if step % self.per_rollout == 0 or not self.rollout:
            self.rollout = self.sample(step)
        advantages = self.rollout["rewards"] - self.rollout["rewards"].mean()
        rows = []
        for index in range(self.answers):
            old = np.zeros(LENGTH + 1, dtype=np.float32)
            old[:-1] = self.rollout["logprobs"][index].numpy()
            advantage = np.full(LENGTH + 1, float(advantages[index]), dtype=np.float32)
            rows.append(
                row_of_documents(
                    [self.rollout["tokens"][index].numpy()],
                    columns={"old_logprob": [old], "advantage": [advantage]},
                    ids=[f"answer{index}"],
                )
            )
        return rows

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"made": self.made}, dict(self.rollout)

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.made, self.rollout = json["made"], dict(tensors)


class ToyPolicy:
    """A clipped policy gradient over the answers' tokens."""

    name = "toy_policy"
    extra = None

    def weight(self, rows: list[PackedSequence]) -> float:
        return float(sum(row.weights.sum() for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        hidden = model(batch.tokens, Documents(batch.lengths))
        logprobs, _ = token_log_probabilities(hidden, model.head_weight, batch.targets)
        ratio = torch.exp(logprobs - batch.columns["old_logprob"])
        advantage = batch.columns["advantage"]
        gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) * batch.weights
        off = ((ratio - 1).abs() * batch.weights).sum().detach()
        return Loss(-gain.sum(), {"ratio_off": (off, batch.weights.sum())})


class ToyPairs:
    """Rows of two documents that belong together, with the reference's log-probabilities as facts."""

    fingerprint = "toy-pairs"
    steps = 8

    def rows(self, step: int) -> list[PackedSequence]:
        random = np.random.default_rng(step)
        rows = []
        for pair in range(3):
            documents = [random.integers(0, VOCABULARY, n) for n in random.integers(4, 9, 2)]
            rows.append(
                row_of_documents(
                    documents, facts={"reference": [-20.0, -22.0]}, ids=[f"{pair}-chosen", f"{pair}-rejected"]
                )
            )
        return rows

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> tuple[dict, dict]:
        return {}, {}

    def restore(self, json: dict, tensors: dict) -> None:
        assert json == {}


class ToyPreference:
    """DPO's loss: the weight of a step counts pairs, not tokens."""

    name = "toy_preference"
    extra = None

    def weight(self, rows: list[PackedSequence]) -> float:
        return float(len(rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        hidden = model(batch.tokens, Documents(batch.lengths))
        logprobs, _ = token_log_probabilities(hidden, model.head_weight, batch.targets)
        owner = torch.arange(len(batch.lengths)).repeat_interleave(torch.tensor(batch.lengths))
        sums = torch.zeros(len(batch.lengths)).index_add(0, owner, logprobs * batch.weights)
        ratios = (sums - torch.tensor(batch.facts["reference"])).view(-1, 2)
        margin = 0.1 * (ratios[:, 0] - ratios[:, 1])
        accuracy = (margin > 0).float().sum()
        return Loss(
            -nn.functional.logsigmoid(margin).sum(), {"rewards/accuracies": (accuracy, float(len(margin)))}
        )


class ToyValue:
    """A value head trained beside the model on the hidden states."""

    name = "toy_value"

    def __init__(self, width: int) -> None:
        torch.manual_seed(11)
        self.extra = nn.Linear(width, 1)

    def weight(self, rows: list[PackedSequence]) -> float:
        return float(sum(len(row) for row in rows))

    def loss(self, model: Transformer, batch: Batch) -> Loss:
        hidden = model(batch.tokens, Documents(batch.lengths))
        values = self.extra(hidden).squeeze(-1)
        return Loss(((values - batch.tokens / VOCABULARY) ** 2).sum())
