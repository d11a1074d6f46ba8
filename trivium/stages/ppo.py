"""Reinforcement learning from human feedback: the model answers, a reward model scores, PPO moves it.

A completion is a sequence of actions. Token t is rewarded by r_t = -beta KL_t, the last one also by the
score of the whole. A critic V, a scalar head on the policy's own states, is learned along, and with the TD
errors d_t = r_t + gamma V_t+1 - V_t the advantages are GAE's (1506.02438),
A_t = sum_k (gamma lambda)^k d_t+k. The loss is PPO's (1707.06347), with the ratio
rho_t = pi(o_t) / pi_old(o_t) and the returns R_t = A_t + V_t:

    loss = mean_t [ -min(rho_t A_t, clip(rho_t, 1 - e, 1 + e) A_t) + c (V_t - R_t)^2 / 2 - h H_t ].

Two estimators need no critic: RLOO (2402.14740) compares the completions of a prompt, and REINFORCE++
(2501.03262) takes A_t = sum_k gamma^k r_t+k.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trivium.kit.metrics import read_metrics
from trivium.kit.numbers import Count
from trivium.kit.processes import world
from trivium.kit.settings import Settings
from trivium.learn.objectives.advantages import AdvantageSettings, KlController
from trivium.learn.objectives.policy import PPO_NAMES, PolicyGradient
from trivium.learn.objectives.policy_losses import PPO_ALGORITHMS, PolicyNumbers
from trivium.model.scalar_head import ScalarHead
from trivium.stages.parts.gauges import sycophancy_of
from trivium.stages.parts.prompts import Prompt
from trivium.stages.parts.rollout_stage import Method, RolloutStage
from trivium.stages.parts.training import Opened

POINTS = 12
"""How many points of the curve of reward and held-out reward against KL the summary keeps."""


class Penalty(Settings):
    """How the model is held close to the one it started from: a price per token on the KL."""

    coefficient: float = Field(default=0.05, ge=0)
    """The weight of the KL penalty (beta)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Schulman's estimator of the KL: k1, k2 or k3."""
    target: float | None = Field(default=None, gt=0)
    """The KL per completion towards which the coefficient is steered; without one it stays."""
    horizon: float = Field(default=10_000, gt=0)
    """Over how many completions an error of one would double the coefficient."""


class Ppo(RolloutStage):
    """Sample completions and move the model towards those that a reward model scores higher."""

    kind: Literal["ppo"]
    """Proximal policy optimisation with a learned reward."""
    formerly: ClassVar[Mapping[str, str]] = {**RolloutStage.formerly, "flattery": "sycophancy"}
    version: ClassVar[int] = 2
    # TRL's learning rate for PPO.
    gentle_rates: ClassVar[tuple[float, float] | None] = (3e-6, 0.0005)

    estimator: Literal["gae", "rloo", "reinforce++"] = "gae"
    """How advantages are estimated: GAE with a critic, leave-one-out, or REINFORCE++."""
    prompts_per_step: Count = Field(default=32, ge=1)
    """Prompts per rollout."""
    num_generations: Count = Field(default=1, ge=1)
    """Completions per prompt; `rloo` compares them."""
    epochs_per_rollout: int = Field(default=4, ge=1)
    """How often a rollout is learned from."""
    max_new_tokens: Count = Field(default=64, ge=1)
    """The longest completion in tokens."""
    kl: Penalty = Penalty()
    """The penalty for moving away from the reference model."""
    clip_ratio: float = Field(default=0.2, gt=0)
    """The ratio is clipped to 1 ± this."""
    clip_value: float | None = Field(default=0.2, gt=0)
    """The value is clipped to its old value ± this."""
    value_coefficient: float = Field(default=0.1, ge=0)
    """The weight of the value loss."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """The discount factor (gamma)."""
    decay: float = Field(default=0.95, ge=0, le=1)
    """GAE's lambda: 0 looks one token ahead, 1 to the end of the completion."""
    whiten_advantages: bool = True
    """Standardise advantages over the rollout."""
    whiten_rewards: bool = False
    """Standardise rewards over the rollout and keep their mean."""
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    """What a completion loses that does not end by itself."""
    normalise: Literal["none", "batch", "running"] = "none"
    """Whether scores are brought to mean 0 and deviation 1, over a rollout or over all so far."""
    clip_score: float | None = Field(default=None, gt=0)
    """Scores are clipped to ± this."""
    sycophancy: Count = Field(default=60, ge=0)
    """How many questions the sycophancy evaluation asks at the end; 0 for none."""

    @model_validator(mode="after")
    def something_to_compare(self) -> Self:
        if self.estimator == "rloo" and self.num_generations < 2:
            raise ValueError(
                "`estimator: rloo` compares the completions of a prompt: set `num_generations: 2`"
            )
        return self

    def method(self, opened: Opened[list[Prompt]]) -> Method:
        model = opened.model
        advantages = AdvantageSettings(
            kl=self.kl.estimator, discount=self.discount, decay=self.decay,
            whiten_advantages=self.whiten_advantages, whiten_rewards=self.whiten_rewards,
            missing_eos_penalty=self.missing_eos_penalty, normalise=self.normalise,
            clip_score=self.clip_score,
        )  # fmt: skip
        critic = ScalarHead(model.config.width).to(model.device) if self.estimator == "gae" else None
        # Another engine computes a little differently, so its draws are off-policy by that much.
        correction = "none" if self.engine.kind == "own" else "token"
        return PPO_ALGORITHMS[self.estimator], {"threshold": None, "correction": correction}, {
            "advantages": advantages,
            "critic": critic,
            "reference": self.reference(model),
            "controller": KlController(self.kl.coefficient, self.kl.target, self.kl.horizon),
        }  # fmt: skip

    def objective(self, opened: Opened[list[Prompt]]) -> PolicyGradient:
        return PolicyGradient(
            opened.batches.algorithm, PolicyNumbers(clip_low=self.clip_ratio, clip_high=self.clip_ratio),
            temperature=self.temperature, entropy_bonus=self.entropy_bonus, extra=opened.batches.critic,
            value_clip=self.clip_value, value_coefficient=self.value_coefficient,
            prune=True, names=PPO_NAMES,
        )  # fmt: skip

    def outcome(self, opened: Opened[list[Prompt]]) -> dict[str, Any]:
        """Rewards against the KL, and what became of the model's honesty."""
        if not world().leads:
            return {}
        asked = self.sycophancy
        found = {"sycophancy": sycophancy_of(opened.model, opened.tokenizer, asked)} if asked else {}
        return {"curve": _curve(opened.work.log.path), **found}


def _curve(log: Path) -> list[dict[str, float]]:
    """Rewards against the KL from the start, at a few evenly spread rollouts."""
    rows = [row for row in read_metrics(log) if "objective/kl" in row]
    places = (
        sorted({round(place * (len(rows) - 1) / (POINTS - 1)) for place in range(POINTS)}) if rows else []
    )
    return [
        {
            name: rows[place][name]
            for name in rows[place]
            if name in ("step", "objective/kl", "objective/scores")
            or (name.startswith("rewards/") and name.endswith("/mean"))
        }
        for place in places
    ]
