"""Rollouts for PPO: answers scored as a whole, and from that what each of their tokens is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivium.data.rows import PackedSequence, collate
from trivium.kit.fingerprint import fingerprint
from trivium.learn.objectives.policy_losses import Algorithm, clipped
from trivium.learn.objectives.ppo import (
    Controller,
    Estimator,
    Scale,
    discounted,
    gae,
    kl_estimate,
    leave_one_out,
    log_probabilities_and_values,
    token_rewards,
    whitened,
)
from trivium.learn.precision import one_pass
from trivium.learn.validation import groups_of
from trivium.model.lora import selected
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer
from trivium.stages.parts.rollout_worker import Rollout, RolloutGroup
from trivium.stages.parts.rollouts import PASS_TOKENS, RolloutBatches

BY_TOKENS = Algorithm(clipped, aggregation="token")
"""What the rollouts need to know: a batch is divided by its tokens."""


@dataclass(frozen=True)
class AdvantageSettings:
    """How scores become advantages."""

    estimator: Estimator = "gae"
    kl: Literal["k1", "k2", "k3"] = "k1"
    discount: float = 1.0
    decay: float = 0.95
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    normalise: Literal["none", "batch", "running"] = "none"
    clip_score: float | None = None


@dataclass
class Tokens:
    """What the rollout knows of every token of one answer."""

    policy: np.ndarray
    reference: np.ndarray
    values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray


class ValuedRolloutBatches(RolloutBatches):
    """Rollouts whose advantages and returns differ from token to token."""

    def __init__(
        self, *positional: Any, worth: AdvantageSettings, critic: ScalarHead | None,
        anchor: Transformer | None, controller: Controller, **planned: Any,
    ) -> None:  # fmt: skip
        """`anchor` is the reference, None where it is the model without its adapter; the rest is as ever."""
        super().__init__(*positional, **planned)
        self.worth, self.critic, self.anchor, self.controller = worth, critic, anchor, controller
        self.scale = Scale()
        self.tokens: dict[int, Tokens] = {}
        """What this rollout knows, by the identity of the answer."""
        self.told: dict[str, float] = {}

    @property
    def fingerprint(self) -> str:
        """Changes when any batch could change."""
        return fingerprint([super().fingerprint, repr(self.worth)])

    def roll_out(self, rollout: int) -> tuple[list[PackedSequence], dict[str, float]]:
        """Answers with the worth of their tokens as rows; and the measures under TRL's names."""
        rows, measures = super().roll_out(rollout)
        self.tokens = {}
        # A reward model's numbers know no right and wrong.
        known = {name: value for name, value in measures.items() if not name.startswith("pass@")}
        return rows, known | self.told

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it needs to go on from the middle of a rollout."""
        json, tensors = super().state()
        return json | {"coefficient": self.controller.coefficient, "scale": vars(self.scale)}, tensors

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        super().restore(json, tensors)
        self.controller.coefficient, self.scale = json["coefficient"], Scale(**json["scale"])

    def _compute_advantages(self, groups: Sequence[RolloutGroup]) -> None:
        """From the scores of whole answers to advantages and returns of tokens, over the whole rollout."""
        super()._compute_advantages(groups)
        for group in groups:
            # An answer that no reward could judge teaches nothing; every other one does.
            group.advantages = np.array([float(reward is not None) for reward in group.rewards])
        self._look(groups)
        judged = [
            (group, index, answer)
            for group in groups
            for index, answer in enumerate(group.rollouts)
            if group.rewards[index] is not None
        ]
        if not judged:
            return
        scores = self._scores(
            np.array([group.rewards[index] for group, index, _ in judged], dtype=float), judged
        )
        coefficient = self.controller.coefficient
        apart = [
            kl_estimate(self._of(one).policy, self._of(one).reference, self.worth.kl) for _, _, one in judged
        ]
        rewards = [token_rewards(coefficient * one, score) for one, score in zip(apart, scores, strict=True)]
        if self.worth.whiten_rewards:
            rewards = _split(whitened(np.concatenate(rewards), centre=False), rewards)
        for (_, _, answer), mine in zip(judged, rewards, strict=True):
            self._estimate(self._of(answer), mine)
        if self.worth.estimator == "rloo":
            self._compare(
                groups, {id(answer): mine.sum() for (_, _, answer), mine in zip(judged, rewards, strict=True)}
            )
        self._whiten([self._of(answer) for _, _, answer in judged])
        divergence = float(
            np.mean([(one.policy - one.reference).sum() for one in map(self._of, _answers(judged))])
        )
        penalty = float(np.mean([-coefficient * one.sum() for one in apart]))
        self.told = {
            "objective/kl": divergence,
            "objective/non_score_reward": penalty,
            "objective/scores": float(scores.mean()),
            "objective/rlhf_reward": float(scores.mean()) + penalty,
            "objective/entropy": float(
                np.mean([-one.policy.sum() for one in map(self._of, _answers(judged))])
            ),
            "val/num_eos_tokens": float(sum(not answer.truncated for _, _, answer in judged)),
            "kl_coefficient": coefficient,
        }
        self.controller.update(divergence, len(judged))

    def _scores(self, scores: np.ndarray, judged: Sequence[tuple[RolloutGroup, int, Rollout]]) -> np.ndarray:
        """Scores brought to scale and cut, less the penalty for an answer that did not end."""
        if self.worth.normalise == "running":
            self.scale.take_in(scores)
        if self.worth.normalise == "batch":
            self.scale = Scale()
            self.scale.take_in(scores)
        if self.worth.normalise != "none":
            scores = self.scale.apply(scores)
        if self.worth.clip_score is not None:
            scores = scores.clip(-self.worth.clip_score, self.worth.clip_score)
        if self.worth.missing_eos_penalty is not None:
            endless = np.array([answer.truncated for _, _, answer in judged])
            scores = scores - self.worth.missing_eos_penalty * endless
        return scores

    def _estimate(self, tokens: Tokens, rewards: np.ndarray) -> None:
        """Advantages and returns of one answer by itself."""
        worth = self.worth
        if worth.estimator == "gae":
            tokens.advantages = gae(rewards, tokens.values, worth.discount, worth.decay)
            tokens.returns = tokens.advantages + tokens.values
        elif worth.estimator == "reinforce++":
            tokens.advantages = discounted(rewards, worth.discount)

    def _compare(self, groups: Sequence[RolloutGroup], totals: dict[int, float]) -> None:
        """RLOO's advantages: one number for all tokens of an answer; alone it has none."""
        for group in groups:
            some = [answer for answer in group.rollouts if id(answer) in totals]
            if len(some) > 1:
                better = leave_one_out(np.array([totals[id(answer)] for answer in some]))
                for answer, value in zip(some, better, strict=True):
                    self._of(answer).advantages = np.full(len(answer.tokens), value)

    def _whiten(self, everything: Sequence[Tokens]) -> None:
        """Advantages on one scale over the whole rollout; RLOO's stay as they are in its paper."""
        if self.worth.whiten_advantages and self.worth.estimator != "rloo":
            parts = [one.advantages for one in everything]
            for one, part in zip(everything, _split(whitened(np.concatenate(parts)), parts), strict=True):
                one.advantages = part

    @torch.no_grad()
    def _look(self, groups: Sequence[RolloutGroup]) -> None:
        """Ask reference and critic about every token of every answer."""
        rows = [super(ValuedRolloutBatches, self)._row(group, range(len(group.rollouts))) for group in groups]
        reference = self._under_reference(rows)
        values: list[np.ndarray] = []
        for some in groups_of(rows, PASS_TOKENS) if self.critic is not None else []:
            batch = collate(some, self.model.device)
            with one_pass(self.precision, self.model.device):
                _, _, found = log_probabilities_and_values(
                    self.model, self.critic, batch, self.sampling.temperature
                )
            sizes = [int((row.weights > 0).sum()) for row in some]
            values += [part.cpu().numpy() for part in found.split(sizes)]
        for place, group in enumerate(groups):
            lengths = np.cumsum([len(answer.tokens) for answer in group.rollouts])[:-1]
            theirs = np.split(reference[place], lengths)
            mine = np.split(values[place] if values else np.zeros_like(reference[place]), lengths)
            for answer, other, value in zip(group.rollouts, theirs, mine, strict=True):
                nothing = np.zeros(len(answer.tokens))
                self.tokens[id(answer)] = Tokens(
                    np.array(answer.logprobs, dtype=np.float64), other.astype(np.float64),
                    value.astype(np.float64), nothing, nothing,
                )  # fmt: skip

    def _under_reference(self, rows: Sequence[PackedSequence]) -> list[np.ndarray]:
        if self.anchor is not None:
            return self._measured(self.anchor, rows)
        with selected(self.model, None):
            return self._measured(self.model, rows)

    def _of(self, answer: Rollout) -> Tokens:
        return self.tokens[id(answer)]

    def _row(self, group: RolloutGroup, some: Sequence[int]) -> PackedSequence:
        """A row whose columns say for each learned token what it is worth."""
        row = super()._row(group, some)
        mine = [self._of(group.rollouts[index]) for index in some]
        learned = row.weights > 0
        columns = dict(row.columns)
        for name, parts in (
            ("advantage", [one.advantages for one in mine]),
            ("value", [one.values for one in mine]),
            ("return", [one.returns for one in mine]),
        ):
            columns[name] = np.zeros(len(row), dtype=np.float32)
            columns[name][learned] = np.concatenate(parts)
        return PackedSequence(**{**vars(row), "columns": columns})


def _answers(judged: Sequence[tuple[RolloutGroup, int, Rollout]]) -> list[Rollout]:
    return [answer for _, _, answer in judged]


def _split(whole: np.ndarray, like: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The parts of an array, as long as these."""
    return np.split(whole, np.cumsum([len(part) for part in like])[:-1])
