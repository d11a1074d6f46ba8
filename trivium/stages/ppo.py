"""Reinforcement learning from human feedback: the model answers, a reward model scores, PPO moves it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from trivium.generate.engine import Engine
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, ready_scorers
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.numbers import Count
from trivium.kit.processes import world
from trivium.learn.objectives.ppo import Controller, Estimator, ProximalPolicy
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import LearningRate, Settings
from trivium.model.branches import prompts_can_be_shared
from trivium.model.config import ModelConfig
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer
from trivium.stages.parts.gauges import sycophancy_of
from trivium.stages.parts.judges import Named, file_references, judges_of, model_references, reward_files
from trivium.stages.parts.mixtures import PROMPTS, Mixture, mixture_references
from trivium.stages.parts.parents import gentle_rates_after, moments_after
from trivium.stages.parts.prompts import Prompt, read_prompts
from trivium.stages.parts.rollout_worker import EngineWorker, RolloutGroup
from trivium.stages.parts.rollouts import UNUSED_WITH_ROLLOUTS, RolloutSettings
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import TrainingStage, adapt, train
from trivium.stages.parts.valued import BY_TOKENS, AdvantageSettings, ValuedRolloutBatches
from trivium.tokens.tokenizer import Tokenizer

DEFAULT_STEPS = 100
SHOWN = 4
"""How many answers of every rollout are written down for a person to read."""
POINTS = 12
"""How many points of the curve of proxy and truth against divergence the summary keeps."""
RATE_AT_4096 = 3e-6
"""TRL's rate, for a model of width 4096; narrower ones bear more in proportion."""
MUON_RATE = 0.0005


class Penalty(Settings):
    """How the model is held close to the one it started from: a price per token on the divergence."""

    coefficient: float = Field(default=0.05, ge=0)
    """The weight of the KL penalty (beta)."""
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """Schulman's estimator of the KL: k1, k2 or k3."""
    target: float | None = Field(default=None, gt=0)
    """The divergence per answer towards which the coefficient is steered; without one it stays."""
    horizon: float = Field(default=10_000, gt=0)
    """Over how many answers an error of one would double the coefficient."""


class Ppo(TrainingStage):
    """Let the model answer prompts and move it towards what a reward model scores higher."""

    kind: Literal["ppo"]
    """Proximal policy optimisation with a learned reward."""
    formerly: ClassVar[Mapping[str, str]] = {
        "flattery": "sycophancy",
        "prompts": "prompts_per_step",
        "group": "num_generations",
        "passes": "epochs_per_rollout",
        "parts": "minibatches",
        "wording": "prompt_template",
        "rows": "max_rows",
    }
    version: ClassVar[int] = 2
    unused: ClassVar[Mapping[str, str]] = UNUSED_WITH_ROLLOUTS

    start: str = Field(alias="from")
    """The policy to begin with, which is also the reference."""
    data: Mixture
    """Prompts."""
    reward: list[Named] = Field(min_length=1)
    """`{model: rm}` for a reward stage, beside any scorer; {..., weight: 0} is watched and not learned."""
    estimator: Estimator = "gae"
    """How advantages are estimated: GAE with a critic, leave-one-out, or REINFORCE++."""
    prompts_per_step: Count = Field(default=32, ge=1)
    """Prompts per rollout."""
    num_generations: Count = Field(default=1, ge=1)
    """Answers per prompt; `rloo` compares them."""
    epochs_per_rollout: int = Field(default=4, ge=1)
    """How often a rollout is learned from."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass over a rollout."""
    max_new_tokens: Count = Field(default=64, ge=1)
    """The longest answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """The sampling temperature."""
    prompt_template: str | None = None
    """How a model without a chat template is asked, such as `Question: {prompt}\\nAnswer:`."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
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
    """How far GAE looks ahead before it trusts the critic: 0 one token, 1 to the end."""
    whiten_advantages: bool = True
    """Standardise advantages over the rollout."""
    whiten_rewards: bool = False
    """Standardise rewards over the rollout and keep their mean."""
    missing_eos_penalty: float | None = Field(default=None, ge=0)
    """What an answer loses that does not end by itself."""
    normalise: Literal["none", "batch", "running"] = "none"
    """Whether scores are brought to mean 0 and deviation 1, over a rollout or over all so far."""
    clip_score: float | None = Field(default=None, gt=0)
    """Scores are clipped to ± this."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """The weight of the entropy in the objective."""
    max_rows: Count = Field(default=64, ge=1)
    """How many answers are written at once."""
    share_prompts: bool = True
    """Whether the training forward computes a group's prompt once."""
    sycophancy: Count = Field(default=60, ge=0)
    """How many questions the sycophancy evaluation asks at the end; 0 for none."""
    learning_rate: LearningRate = LearningRate(decay="constant")
    """The learning rate: a number, `parent`, or a schedule."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""
    compile: Literal["auto", "on", "off"] = "off"
    """Whether to compile the model."""

    @model_validator(mode="after")
    def fits_together(self) -> Ppo:
        """RLOO needs something to compare; how long to train is said in one way."""
        if self.estimator == "rloo" and self.num_generations < 2:
            raise ValueError("`estimator: rloo` compares the answers to a prompt: say `group: 2` or more")
        if self.steps is not None and self.epochs is not None:
            raise ValueError("say how long to train with one of `steps` and `epochs`")
        return self

    def references(self) -> list[Reference]:
        """`from` names the policy; `data` the prompts; rewards may be reward stages or lie in files."""
        return [
            Reference("from", self.start, ("model",)),
            *mixture_references(self.data, without=PROMPTS),
            *model_references(self.reward),
            *file_references(self.reward),
        ]

    def counted(self) -> dict[str, Any]:
        """The text of the files that hold rewards counts as well."""
        return {**super().counted(), "reward_files": reward_files(self.reward)}

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the prompts are read."""
        parent = inputs.get(self.start)
        known = {"parameters", "vocabulary", "width"}
        return {key: parent[key] for key in known & set(parent)} if isinstance(parent, Mapping) else {}

    def check_machine(self) -> None:
        """Try the scorers."""
        ready_scorers(self.reward)

    def run(self, work: Work) -> dict[str, Any]:
        """Answer, score and learn to the end, and leave a Hugging Face folder."""
        folder = resolve(str(work.path(self.start)))
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder, dtype=torch.float32, device=machine.device())
        room = load_config(folder).context - self.max_new_tokens
        if room < 1:
            raise TriviumError(
                f"{work.stage}: the model reads {model.config.context} tokens, which `max_new_tokens: "
                f"{self.max_new_tokens}` fills; lower it."
            )
        prompts = read_prompts(work, self.data, tokenizer, room=room, prompt_template=self.prompt_template)
        adapt(work, self, model)
        # Only now, so that it is what the model is at the start: rounded, where that is.
        anchor = None if self._beside_itself() else copy.deepcopy(model).requires_grad_(False)
        engine = Engine(
            model, tokenizer, max_rows=min(self.max_rows, self.prompts_per_step * self.num_generations)
        )
        critic = ScalarHead(model.config.width).to(model.device) if self.estimator == "gae" else None
        feed = self.rollouts(
            work,
            model,
            EngineWorker(engine, self.sampling()),
            prompts,
            judges_of(self.reward, work),
            critic,
            anchor,
        )
        summary = train(
            work, self, model, tokenizer, self.objective(critic), feed,
            self._rates(work, folder, model.config),
            parent_moments=moments_after(work, self, self.start, folder),
        )  # fmt: skip
        looks: dict[str, Any] = {}
        if world().leads:
            looks["curve"] = _curve(work)
            if self.sycophancy:
                looks["sycophancy"] = sycophancy_of(model, tokenizer, self.sycophancy)
        rollouts = -(-feed.steps // feed.settings.steps_per_rollout)
        return {**summary, "prompts": len(prompts), "rollouts": rollouts, **looks}

    def _beside_itself(self) -> bool:
        """Whether the model without its adapter is the reference, so that no second copy is needed."""
        return self.adapter is not None and not self.adapter.train

    def sampling(self) -> Sampling:
        """How the answers are drawn."""
        return Sampling(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, stop=self.stop, logprobs=True
        )

    def objective(self, critic: ScalarHead | None) -> ProximalPolicy:
        """The clipped losses."""
        return ProximalPolicy(
            critic, temperature=self.temperature, clip=self.clip_ratio, value_clip=self.clip_value,
            value_coefficient=self.value_coefficient, entropy_bonus=self.entropy_bonus,
        )  # fmt: skip

    def rollouts(
        self, work: Work, model: Transformer, worker: EngineWorker, prompts: Sequence[Prompt],
        reward: Combined, critic: ScalarHead | None, anchor: Transformer | None,
    ) -> ValuedRolloutBatches:  # fmt: skip
        """The feed: prompts in, scored and valued answers out."""
        settings = RolloutSettings(
            steps=self._steps(len(prompts)), prompts_per_step=self.prompts_per_step,
            num_generations=self.num_generations, epochs_per_rollout=self.epochs_per_rollout,
            minibatches=self.minibatches, threshold=math.inf,
            share_prompts=self.share_prompts and prompts_can_be_shared(model.config),
        )  # fmt: skip
        worth = AdvantageSettings(
            estimator=self.estimator, kl=self.kl.estimator, discount=self.discount, decay=self.decay,
            whiten_advantages=self.whiten_advantages, whiten_rewards=self.whiten_rewards,
            missing_eos_penalty=self.missing_eos_penalty, normalise=self.normalise,
            clip_score=self.clip_score,
        )  # fmt: skip
        return ValuedRolloutBatches(
            model, worker, prompts, reward, BY_TOKENS, settings, sampling=self.sampling(), seed=work.seed,
            worth=worth, critic=critic, anchor=anchor,
            controller=Controller(self.kl.coefficient, self.kl.target, self.kl.horizon),
            tell=lambda rollout, groups, asked: _write_down(work, rollout, groups, asked, reward.names),
            precision=self.precision,
        )  # fmt: skip

    def _steps(self, prompts: int) -> int:
        if self.epochs is None:
            return self.steps or DEFAULT_STEPS
        return (
            max(1, math.ceil(self.epochs * prompts / self.prompts_per_step))
            * self.epochs_per_rollout
            * self.minibatches
        )

    def _rates(self, work: Work, folder: Path, config: ModelConfig) -> LearningRates:
        return gentle_rates_after(
            work, self, self.start, folder, config, adamw_at_4096=RATE_AT_4096, muon=MUON_RATE
        )


def _curve(work: Work) -> list[dict[str, float]]:
    """Rewards against the divergence from the start, at a few evenly spread rollouts."""
    rows = [row for row in read_metrics(work.log.path) if "objective/kl" in row]
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


def _write_down(
    work: Work, rollout: int, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], names: Sequence[str]
) -> None:
    """A few answers of every rollout with the score of each judge, for a person to read."""
    log = MetricsLog(work.folder / "completions.jsonl")
    log.rewind(rollout)
    for group in groups[:SHOWN]:
        answer = group.rollouts[0]
        log.write(
            {
                "step": rollout + 1,
                "problem": prompts[group.prompt_index].id,
                "prompt": prompts[group.prompt_index].content,
                "completion": answer.completion,
                "rewards": dict(zip(names, [part[0] for part in group.scores], strict=True)),
                "reward": group.rewards[0],
            }
        )
