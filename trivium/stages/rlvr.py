"""Reinforcement learning with verifiable rewards: the model answers, a program judges, the model learns.

For every prompt a group of completions o_1 .. o_n is sampled from the policy pi_old, and scorers give each
a reward r_i. GRPO (2402.03300) and its kin estimate the advantage from the group alone, the same for all
tokens,

    A_it = (r_i - mean(r_1 .. r_n)) / std(r_1 .. r_n),

and minimise the clipped surrogate with the ratio rho_it = pi(o_it) / pi_old(o_it):

    loss = -sum_it w_i min(rho_it A_it, clip(rho_it, 1 - e_low, 1 + e_high) A_it) / d + beta KL(pi || pi_ref).

`ALGORITHMS` says what each method changes: its loss, its ratio, the weights w and d, its advantage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trivium.generate.sampling import Sampling
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.learn.objectives.advantages import KlController
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS, cispo, clipped, reinforce
from trivium.learn.objectives.step_advantages import StepRewards
from trivium.stages.parts.environments import EnvironmentWorker, described, maker_of
from trivium.stages.parts.forks import ForkingWorker, Forks
from trivium.stages.parts.judges import Named
from trivium.stages.parts.prompts import Curriculum, Prompt, read_prompts
from trivium.stages.parts.rollout_engine import RolloutEngine
from trivium.stages.parts.rollout_stage import Method, RolloutStage, from_to
from trivium.stages.parts.rollout_worker import RolloutWorker
from trivium.stages.parts.training import Opened


class Divergence(Settings):
    """How the model is held close to the one it started from."""

    coefficient: float = Field(default=0.0, ge=0)
    """The weight of the KL penalty (beta)."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Schulman's estimator of the KL in the loss: k1, k2 or k3. In the reward it is k1."""
    into: Literal["loss", "reward"] = "loss"
    """Whether the penalty is part of the loss, or taken off the reward of a completion."""
    unbiased: bool = True
    """Whether the ratio multiplies the estimate, so that its gradient is the reverse KL's, as in TRL."""


class Clip(Settings):
    """Where the ratio is clipped; by default where the algorithm's paper clips it."""

    low: float | None = Field(default=None, gt=0)
    """The ratio is clipped below 1 - low."""
    high: float | None = Field(default=None, gt=0)
    """The ratio is clipped above 1 + high."""
    dual: float | None = Field(default=None, gt=1)
    """The largest ratio for negative advantages (dual clip)."""


class PassRates(Settings):
    """Which prompts are used: those whose share of right completions lay between these bounds."""

    low: float = Field(default=0.0, ge=0, le=1)
    """The smallest share of right completions."""
    high: float = Field(default=1.0, ge=0, le=1)
    """The largest share of right completions."""
    rest: int = Field(default=2, ge=0)
    """For how many epochs a prompt outside the bounds is left out."""


class Rlvr(RolloutStage):
    """Sample completions, reward those that a program finds right, and reinforce them (GRPO and its kin)."""

    kind: Literal["rlvr"]
    """Reinforcement learning with verifiable rewards."""
    formerly: ClassVar[Mapping[str, str]] = {
        **RolloutStage.formerly,
        "refills": "dynamic_sampling_retries",
        "truth": "held_out_reward",
    }
    version: ClassVar[int] = 2
    # TRL's learning rate for GRPO.
    gentle_rates: ClassVar[tuple[float, float] | None] = (1e-6, 0.0006)

    held_out_reward: Named | None = None
    """A scorer that is only watched: `held_out_reward` in the log, to see whether the reward is exploited."""
    algorithm: Literal[
        "grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo", "cispo", "sapo", "vespo", "rloo",
        "reinforce", "expert_iteration",
    ] = "dapo"  # fmt: skip
    """The policy-gradient method."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that together reach this probability."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many most likely tokens; 0 is all."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Sample from tokens at least this share as likely as the most likely one."""
    next_words: Count | None = Field(default=None, ge=1)
    """Prompts are texts, cut at a drawn place: the column `continuation` holds so many words that follow."""
    kl: Divergence = Divergence()
    """The penalty for moving away from the reference model."""
    clip_ratio: Clip = Clip()
    """Where the ratio is clipped."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    """Whether completions cut off at the limit are learned from, left out, or worth nothing."""
    overlong_buffer: Count = Field(default=0, ge=0)
    """The last tokens before the limit, over which a penalty rises to 1 (DAPO)."""
    dynamic_sampling_retries: int = Field(default=0, ge=0)
    """How often groups that teach nothing are replaced by others (DAPO's dynamic sampling)."""
    pass_rates: PassRates = PassRates()
    """Which prompts are used, by their share of right completions so far."""
    normalise: Literal["sum", "each"] = "sum"
    """Whether rewards are normalised after they are summed, or each by itself before (GDPO)."""
    threshold: float = 1.0
    """The reward from which a completion counts as right."""
    correction: Literal["none", "token", "sequence"] = "none"
    """Whether importance weights correct for differences between engine and trainer, and per what; with
    `engine: vllm`, and for `reinforce` with `async_level: 1`, it is `token` where nothing is said."""
    correction_cap: float = Field(default=2.0, gt=0)
    """The largest importance weight of the correction."""
    tools: tuple[Literal["calculator", "python", "sql"], ...] = ()
    """What the model may call before it answers; a tool's output is read and never learned."""
    environment: str | None = None
    """`file.py:Class`, made from the columns of a prompt: `step(action) -> observation, reward, done`."""
    turns: Count = Field(default=4, ge=1)
    """How often the model may act in one completion, where there are tools or an environment."""

    process_rewards: Literal["potential", "sum", "outcome"] = "potential"
    """How a process reward model among the rewards teaches: each step by the value it gains or loses, which
    no number of steps adds to; by the sum of the later steps' scores (DeepSeekMath); or as one reward."""
    forks: Forks | None = None
    """Completions that share a beginning and part where the model is uncertain; else all are independent."""

    @model_validator(mode="after")
    def forks_fit(self) -> Self:
        """Whole trunks, and a method that compares completions of a group."""
        if self.forks is None:
            return self
        if self.num_generations % self.forks.branches:
            raise ValueError(
                f"`num_generations: {self.num_generations}` is no multiple of `forks.branches: "
                f"{self.forks.branches}`"
            )
        if self.engine.kind != "own":
            raise ValueError("`forks` part texts in our engine; leave `engine` out")
        if self.tools or self.environment is not None:
            raise ValueError("`forks` part within one text; leave `tools` and `environment` out")
        if ALGORITHMS[self.algorithm].advantage not in ("group", "centred"):
            raise ValueError(f"`forks` are compared within a group, which {self.algorithm} does not do")
        return self

    @model_validator(mode="after")
    def another_engine_is_corrected(self) -> Self:
        """Another engine's draws are off-policy by its rounding, and older ones need a ratio in the loss."""
        no_ratio = self.async_level > 0 and ALGORITHMS[self.algorithm].loss is reinforce
        if (self.engine.kind != "own" or no_ratio) and "correction" not in self.model_fields_set:
            self.correction = "token"
        return self

    @model_validator(mode="after")
    def groups_are_compared(self) -> Self:
        """Where a completion is compared with others to its prompt, one alone teaches nothing."""
        alone = self.num_generations == 1 and self.kl.coefficient == 0 and self.entropy_bonus == 0
        if alone and ALGORITHMS[self.algorithm].advantage in ("group", "centred", "leave_one_out"):
            raise ValueError(
                f"{self.algorithm} compares the answers to one prompt, and `num_generations: 1` leaves none "
                "to compare with; write 2 or more, or `algorithm: reinforce`"
            )
        return self

    @model_validator(mode="after")
    def the_algorithm_clips(self) -> Self:
        """A clip is given only to what reads it."""
        given = {name for name, value in self.clip_ratio if value is not None}
        loss = ALGORITHMS[self.algorithm].loss
        read = {"low", "high", "dual"} if loss is clipped else {"high"} if loss is cispo else set()
        if unread := sorted(given - read):
            raise ValueError(f"{self.algorithm} does not read `clip_ratio.{unread[0]}`; leave it out")
        return self

    def scorers(self) -> list[Named]:
        """The rewards, and last the held-out one, which weighs nothing."""
        held_out = self.held_out_reward
        if held_out is None:
            return self.reward
        return [
            *self.reward,
            {**({"name": held_out} if isinstance(held_out, str) else held_out), "weight": 0},
        ]

    def files(self) -> list[Named]:
        return [*self.scorers(), *([] if self.environment is None else [self.environment])]

    def prompts(self, opened: Opened[list[Prompt]], room: int) -> list[Prompt]:
        """Prompts that describe the tools, or the beginnings of texts."""
        return read_prompts(
            opened.work, self.data, opened.tokenizer, room=room, prompt_template=self.prompt_template,
            tools=described(self.tools) if self.tools else None, next_words=self.next_words,
        )  # fmt: skip

    def worker(self, opened: Opened[list[Prompt]], engine: RolloutEngine) -> RolloutWorker:
        """The engine alone, or in turns with tools or an environment."""
        if self.forks is not None:
            return ForkingWorker(engine, self.sampling(), self.forks)
        if self.environment is None and not self.tools:
            return super().worker(opened, engine)
        make = maker_of(opened.work, self.tools, self.environment)
        earns = self.environment is not None
        return EnvironmentWorker(
            engine, self.sampling(), opened.tokenizer, make, turns=self.turns, earns=earns
        )

    def sampling(self) -> Sampling:
        return replace(super().sampling(), top_p=self.top_p, top_k=self.top_k, min_p=self.min_p)

    @property
    def steps_earn(self) -> StepRewards | None:
        return None if self.process_rewards == "outcome" else self.process_rewards

    def method(self, opened: Opened[list[Prompt]]) -> Method:
        """The algorithm over graded completions, prompts in an order of their own."""
        rates, beta = self.pass_rates, self.kl.coefficient
        settings: dict[str, Any] = {
            "dynamic_sampling_retries": self.dynamic_sampling_retries,
            "truncated": self.truncated,
            "overlong_buffer": self.overlong_buffer,
            "normalise_first": self.normalise == "each",
            "threshold": self.threshold,
            "held_out_scorer": None if self.held_out_reward is None else len(self.reward),
            "kl_in_loss": beta > 0 and self.kl.into == "loss",
            "correction": self.correction,
            "correction_cap": self.correction_cap,
        }
        return ALGORITHMS[self.algorithm], settings, {
            "curriculum": Curriculum(
                len(opened.data), opened.work.seed, low=rates.low, high=rates.high, rest=rates.rest
            ),
            "reference": self.reference(opened.model) if beta else None,
            "controller": KlController(beta) if beta and self.kl.into == "reward" else None,
        }  # fmt: skip

    def objective(self, opened: Opened[list[Prompt]]) -> PolicyGradient:
        algorithm, clip = ALGORITHMS[self.algorithm], self.clip_ratio
        wished = {"clip_low": clip.low, "clip_high": clip.high, "dual_clip": clip.dual}
        given = {name: value for name, value in wished.items() if value is not None}
        return PolicyGradient(
            algorithm, replace(algorithm.numbers, **given), temperature=self.temperature,
            filtered=opened.batches.filtered, kl=self.kl.coefficient if self.kl.into == "loss" else 0.0,
            estimator=self.kl.estimator, unbiased=self.kl.unbiased, entropy_bonus=self.entropy_bonus,
        )  # fmt: skip

    def findings(self, opened: Opened[list[Prompt]]) -> dict[str, Any]:
        rows = opened.work.log.rows()
        equal = [row["frac_reward_zero_std"] for row in rows if "frac_reward_zero_std" in row]
        # Where steps earn, completions of equal rewards teach all the same.
        if equal and min(equal) == 1.0 and opened.batches.process is None:
            opened.work.say(
                "nothing was learned: all answers to each prompt earned the same reward in every step; "
                "give it problems that it sometimes gets right, or a reward that tells its answers apart"
            )
        if opened.batches.process is not None:
            self._watch_exploitation(opened, rows)
        return {**super().findings(opened), "problems": len(opened.data)}

    def _watch_exploitation(self, opened: Opened[list[Prompt]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Say where the steps score higher and higher and what is right does not follow."""
        process = opened.batches.process
        true = "held_out_reward" if self.held_out_reward is not None else "pass@1"
        moved = from_to(opened.work.log, [true, *(f"rewards/{one.name}/mean" for one in process.scorers)])
        for name, (first, last) in moved.items():
            if name != true and true in moved and last - first > 0.05 and moved[true][1] < moved[true][0]:
                opened.work.say(
                    f"{name} rose from {first:.2f} to {last:.2f} while {true} fell from {moved[true][0]:.2f} "
                    f"to {moved[true][1]:.2f}: the process reward is exploited; lower its weight"
                )

    def outcome(self, opened: Opened[list[Prompt]]) -> dict[str, Any]:
        return from_to(opened.work.log, ("reward", "held_out_reward", "pass@1"))
