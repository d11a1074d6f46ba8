"""Reinforcement learning with verifiable rewards: the model answers, a program judges, the model learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from pydantic import Field

from trivium.generate.engine import Engine
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import Combined, ready_scorers, reward_from_file
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.numbers import Count
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS, PolicyNumbers
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import LearningRate, Settings
from trivium.model.branches import prompts_can_be_shared
from trivium.model.config import ModelConfig
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.stages.parts.environments import EnvironmentWorker, Maker, described, with_tools
from trivium.stages.parts.judges import Named, judges_of, model_references, reward_files
from trivium.stages.parts.mixtures import PROMPTS, Mixture, mixture_references
from trivium.stages.parts.parents import gentle_rates_after, moments_after
from trivium.stages.parts.prompts import Curriculum, Prompt, read_prompts
from trivium.stages.parts.rollout_worker import EngineWorker, RolloutGroup, RolloutWorker
from trivium.stages.parts.rollouts import UNUSED_WITH_ROLLOUTS, RolloutBatches, RolloutSettings
from trivium.stages.parts.stage import Reference, Work
from trivium.stages.parts.training import TrainingStage, adapt, train
from trivium.tokens.tokenizer import Tokenizer

DEFAULT_STEPS = 100
SHOWN = 2
"""How many answers of every rollout are written down for a person to read."""
RATE_AT_4096 = 1e-6
"""TRL's rate, for a model of width 4096; narrower ones bear more in proportion."""
MUON_RATE = 0.0006


class Divergence(Settings):
    """How the model is held close to the one it started from."""

    coefficient: float = Field(default=0.0, ge=0)
    """The weight of the KL penalty (beta)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of the KL: k1, k2 or k3."""
    into: Literal["loss", "reward"] = "loss"
    """Whether the penalty is part of the loss or of the reward."""
    unbiased: bool = True
    """Whether the ratio multiplies the estimate, so that its gradient is the reverse KL's, as in TRL."""


class Clip(Settings):
    """Where the ratio is cut; what is not said is as in the algorithm's paper."""

    low: float | None = Field(default=None, gt=0)
    """The ratio is clipped below 1 - low."""
    high: float | None = Field(default=None, gt=0)
    """The ratio is clipped above 1 + high."""
    dual: float | None = Field(default=None, gt=1)
    """The largest ratio for negative advantages (dual clip)."""


class PassRates(Settings):
    """Which prompts are posed: those whose share of right answers lay between these bounds."""

    low: float = Field(default=0.0, ge=0, le=1)
    """The smallest share of right answers."""
    high: float = Field(default=1.0, ge=0, le=1)
    """The largest share of right answers."""
    rest: int = Field(default=2, ge=0)
    """For how many passes over the prompts one outside the bounds is left alone."""


class Rlvr(TrainingStage):
    """Let the model answer prompts and reinforce the answers that a program finds right."""

    kind: Literal["rlvr"]
    """Reinforcement learning with verifiable rewards."""
    formerly: ClassVar[Mapping[str, str]] = {
        "prompts": "prompts_per_step",
        "group": "num_generations",
        "passes": "epochs_per_rollout",
        "parts": "minibatches",
        "refills": "dynamic_sampling_retries",
        "truth": "held_out_reward",
        "wording": "prompt_template",
        "rows": "max_rows",
    }
    version: ClassVar[int] = 2
    unused: ClassVar[Mapping[str, str]] = UNUSED_WITH_ROLLOUTS

    start: str = Field(alias="from")
    """The model to start from."""
    data: Mixture
    """Prompts with what the reward needs to judge an answer."""
    reward: list[Named] = Field(min_length=1)
    """Scorers by name, `file.py:function` with TRL's signature, or {model: rm} for a reward stage; {name,
    weight, ...} to weigh them."""
    held_out_reward: Named | None = None
    """A scorer that is only looked at: `held_out_reward` in the log, beside a reward that may be tricked."""
    algorithm: Literal[
        "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "sapo", "vespo", "rloo",
        "reinforce", "expert_iteration",
    ] = "dapo"  # fmt: skip
    """The policy-gradient method."""
    prompts_per_step: Count = Field(default=8, ge=1)
    """Problems per rollout."""
    num_generations: Count = Field(default=8, ge=1)
    """Answers per prompt."""
    epochs_per_rollout: int = Field(default=1, ge=1)
    """How often a rollout is learned from."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps in one pass over a rollout."""
    max_new_tokens: Count = Field(default=256, ge=1)
    """The longest answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """The sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together reach this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many most likely tokens; 0 is all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this share as likely as the most likely one."""
    prompt_template: str | None = None
    """How a model without a chat template is asked, such as `Question: {prompt}\\nAnswer:`."""
    next_words: Count | None = Field(default=None, ge=1)
    """Pose texts, cut at a drawn place: the column `continuation` holds so many of the words that follow."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    kl: Divergence = Divergence()
    """The penalty for moving away from the reference model."""
    clip_ratio: Clip = Clip()
    """Where the ratio is clipped."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """The weight of the entropy in the objective."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """Whether answers cut off at the limit are learned from, left out, or worth nothing."""
    overlong_buffer: Count = Field(default=0, ge=0)
    """The last tokens before the limit, over which a penalty rises to 1 (DAPO)."""
    dynamic_sampling_retries: int = Field(default=0, ge=0)
    """How often groups that teach nothing are replaced by others (DAPO's dynamic sampling)."""
    pass_rates: PassRates = PassRates()
    """Which prompts are used, by their share of right answers so far."""
    normalise: Literal["sum", "each"] = "sum"
    """Whether rewards are normalised after they are summed, or each by itself before (GDPO)."""
    threshold: float = 1.0
    """The reward from which an answer counts as right."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Whether differences between the engine's numbers and the trainer's are weighed out, and per what."""
    correction_cap: float = Field(default=2.0, gt=0)
    """The largest importance weight of the correction."""
    tools: tuple[Literal["calculator", "python", "sql"], ...] = ()
    """What the model may call before it answers; what a tool says is read and never learned."""
    environment: str | None = None
    """`file.py:Class`, made from the columns of a prompt: `step(action) -> observation, reward, done`."""
    turns: Count = Field(default=4, ge=1)
    """How often the model may act in one answer, where there are tools or an environment."""
    max_rows: Count = Field(default=64, ge=1)
    """How many answers are written at once."""
    share_prompts: bool = True
    """Whether the training forward computes a group's prompt once."""
    learning_rate: LearningRate = LearningRate(decay="constant")
    """The learning rate: a number, `parent`, or a schedule."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""
    compile: Literal["auto", "on", "off"] = "off"
    """Whether to compile the model."""

    def references(self) -> list[Reference]:
        """`from` names the model to go on from; `data` its prompts; a reward may lie in a file."""
        files = [Reference("reward_files", file, ("source",)) for file in self._reward_files()]
        models = model_references(self._scorers())
        prompts = mixture_references(self.data, without=PROMPTS)
        return [Reference("from", self.start, ("model",)), *prompts, *models, *files]

    def counted(self) -> dict[str, Any]:
        """The text of the files that hold rewards counts as well."""
        return {**super().counted(), "reward_files": self._reward_files()}

    def _reward_files(self) -> list[str]:
        environment = [] if self.environment is None else [self.environment]
        return reward_files([*self._scorers(), *environment])

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What can be said before the prompts are read."""
        parent = inputs.get(self.start)
        known = {"parameters", "vocabulary", "width"}
        return {key: parent[key] for key in known & set(parent)} if isinstance(parent, Mapping) else {}

    def check_machine(self) -> None:
        """Try the scorers."""
        ready_scorers(self._scorers())

    def run(self, work: Work) -> dict[str, Any]:
        """Answer, grade and learn to the end, and leave a Hugging Face folder."""
        folder = resolve(str(work.path(self.start)))
        tokenizer = Tokenizer.load(folder)
        model = load_model(folder, dtype=torch.float32, device=machine.device())
        # The engine keeps the model's layers, so an adapter has to lie on them before there is one.
        adapt(work, self, model)
        reward = judges_of(self._scorers(), work)
        room = load_config(folder).context - self.max_new_tokens
        if room < 1:
            raise TriviumError(
                f"{work.stage}: the model reads {model.config.context} tokens, which `max_new_tokens: "
                f"{self.max_new_tokens}` fills; lower it."
            )
        prompts = read_prompts(
            work, self.data, tokenizer, room=room, prompt_template=self.prompt_template,
            tools=described(self.tools) if self.tools else None, next_words=self.next_words,
        )  # fmt: skip
        engine = Engine(
            model, tokenizer, max_rows=min(self.max_rows, self.prompts_per_step * self.num_generations)
        )
        feed = self.rollouts(work, model, self._worker(work, engine, tokenizer), prompts, reward)
        summary = train(
            work, self, model, tokenizer, self.objective(feed), feed, self._rates(work, folder, model.config),
            parent_moments=moments_after(work, self, self.start, folder),
        )  # fmt: skip
        return {
            **summary,
            **_from_to(work, ("reward", "held_out_reward", "pass@1")),
            "problems": len(prompts),
            "rollouts": -(-feed.steps // feed.settings.steps_per_rollout),
        }

    def _scorers(self) -> list[Named]:
        """The rewards, and last the truth, which weighs nothing."""
        if self.held_out_reward is None:
            return self.reward
        truth = (
            {"name": self.held_out_reward} if isinstance(self.held_out_reward, str) else self.held_out_reward
        )
        return [*self.reward, {**truth, "weight": 0}]

    def _worker(self, work: Work, engine: Engine, tokenizer: Tokenizer) -> RolloutWorker:
        """The engine alone, or in turns with tools or an environment."""
        if self.environment is None and not self.tools:
            return EngineWorker(engine, self.sampling())
        if self.environment is not None and self.tools:
            raise TriviumError(f"{work.stage}: give it `tools` or an `environment`, not both.")
        make = with_tools(self.tools)
        if self.environment is not None:
            make = cast(Maker, reward_from_file(self.environment, work.base).function)
        earns = self.environment is not None
        return EnvironmentWorker(engine, self.sampling(), tokenizer, make, turns=self.turns, earns=earns)

    def sampling(self) -> Sampling:
        """How the answers are drawn."""
        return Sampling(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            max_new_tokens=self.max_new_tokens, stop=self.stop, logprobs=True,
        )  # fmt: skip

    def objective(self, feed: RolloutBatches) -> PolicyGradient:
        """The algorithm with what this stage changes about it."""
        algorithm = ALGORITHMS[self.algorithm]
        wished = {
            "clip_low": self.clip_ratio.low,
            "clip_high": self.clip_ratio.high,
            "dual_clip": self.clip_ratio.dual,
        }
        numbers: PolicyNumbers = replace(
            algorithm.numbers, **{name: value for name, value in wished.items() if value is not None}
        )
        in_loss = self.kl.into == "loss"
        return PolicyGradient(
            algorithm, numbers, temperature=self.temperature, filtered=feed.filtered,
            kl=self.kl.coefficient if in_loss else 0.0, estimator=self.kl.estimator,
            unbiased=self.kl.unbiased, entropy_bonus=self.entropy_bonus,
        )  # fmt: skip

    def rollouts(
        self, work: Work, model: Any, worker: RolloutWorker, prompts: Sequence[Prompt], reward: Combined
    ) -> RolloutBatches:
        """The feed: prompts in, graded answers out."""
        rates = self.pass_rates
        settings = RolloutSettings(
            steps=self._steps(len(prompts)), prompts_per_step=self.prompts_per_step,
            num_generations=self.num_generations, epochs_per_rollout=self.epochs_per_rollout,
            minibatches=self.minibatches, dynamic_sampling_retries=self.dynamic_sampling_retries,
            truncated=self.truncated, overlong_buffer=self.overlong_buffer,
            normalise_first=self.normalise == "each", threshold=self.threshold,
            held_out_scorer=None if self.held_out_reward is None else len(self.reward),
            kl=self.kl.coefficient, kl_in_reward=self.kl.into == "reward", estimator=self.kl.estimator,
            correction=self.correction, correction_cap=self.correction_cap, entropy_bonus=self.entropy_bonus,
            share_prompts=self.share_prompts and prompts_can_be_shared(model.config),
        )  # fmt: skip
        return RolloutBatches(
            model, worker, prompts, reward, ALGORITHMS[self.algorithm], settings,
            sampling=self.sampling(), seed=work.seed,
            curriculum=Curriculum(len(prompts), work.seed, low=rates.low, high=rates.high, rest=rates.rest),
            reference=copy.deepcopy(model).requires_grad_(False) if self.kl.coefficient else None,
            tell=lambda rollout, groups, asked: _write_down(work, rollout, groups, asked, reward.names),
            precision=self.precision,
        )  # fmt: skip

    def _steps(self, prompts: int) -> int:
        if self.epochs is None:
            return self.steps or DEFAULT_STEPS
        if self.steps is not None:
            raise TriviumError("rlvr: say how long to train with one of `steps` and `epochs`.")
        return (
            max(1, math.ceil(self.epochs * prompts / self.prompts_per_step))
            * self.epochs_per_rollout
            * self.minibatches
        )

    def _rates(self, work: Work, folder: Path, config: ModelConfig) -> LearningRates:
        return gentle_rates_after(
            work, self, self.start, folder, config, adamw_at_4096=RATE_AT_4096, muon=MUON_RATE
        )


def _from_to(work: Work, names: Sequence[str]) -> dict[str, list[float]]:
    """The mean of each measure over the first tenth of the rollouts that have it, and over the last tenth."""
    rows = read_metrics(work.log.path)
    found = {}
    for name in names:
        # A rollout logs its measures once, with the first of the steps that learn from it.
        values = [row[name] for row in rows if "step" in row and name in row]
        tenth = max(1, len(values) // 10)
        if values:
            found[name] = [sum(some) / len(some) for some in (values[:tenth], values[-tenth:])]
    return found


def _write_down(
    work: Work, rollout: int, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt], names: Sequence[str]
) -> None:
    """A few answers of every rollout with the reward of each grader, for a person to read."""
    log = MetricsLog(work.folder / "completions.jsonl")
    log.rewind(rollout)
    for group in groups[:SHOWN]:
        for index in {0, len(group.rollouts) - 1}:
            answer = group.rollouts[index]
            log.write(
                {
                    "step": rollout + 1,
                    "problem": prompts[group.prompt_index].id,
                    "prompt": prompts[group.prompt_index].content,
                    "completion": answer.completion,
                    "rewards": dict(zip(names, [part[index] for part in group.scores], strict=True)),
                    "reward": group.rewards[index],
                    "advantage": float(group.advantages[index]),
                }
            )
