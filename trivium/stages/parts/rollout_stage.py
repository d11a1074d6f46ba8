"""What `rlvr` and `ppo` share: a model samples completions, scorers reward them, the model learns."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trivium.data.settings import Mixture
from trivium.generate.engines import EngineChoice, EngineSettings
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import ready_scorers
from trivium.kit.errors import TriviumError
from trivium.kit.metrics import MetricsLog
from trivium.kit.numbers import Count
from trivium.learn.objectives.policy_losses import Algorithm
from trivium.learn.objectives.step_advantages import StepRewards
from trivium.learn.settings import LearningRate
from trivium.model.branches import prompts_can_be_shared
from trivium.model.transformer import Transformer
from trivium.stages.parts.documents import PROMPTS
from trivium.stages.parts.judges import Named, file_references, judges_of, model_references, reward_files
from trivium.stages.parts.process_rewards import process_rewards_of
from trivium.stages.parts.prompts import Prompt, read_prompts
from trivium.stages.parts.rollout_engine import RolloutEngine, refuse_endpoint, rollout_engine
from trivium.stages.parts.rollout_metrics import write_completions
from trivium.stages.parts.rollout_worker import EngineWorker, RolloutWorker
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.training import Opened, TrainingStage

DEFAULT_STEPS = 100
Method = tuple[Algorithm, dict[str, Any], dict[str, Any]]


class RolloutStage(TrainingStage):
    """Settings and steps of a stage that learns from what the model samples itself."""

    formerly: ClassVar[Mapping[str, str]] = {
        "prompts": "prompts_per_step",
        "group": "num_generations",
        "passes": "epochs_per_rollout",
        "parts": "minibatches",
        "wording": "prompt_template",
        "rows": "max_rows",
    }
    unused: ClassVar[Mapping[str, str]] = {
        "batch": "a batch is counted in `prompts_per_step` and `num_generations` here, not in tokens",
        "tokens": "how many tokens it takes is not known before; say `steps` or `epochs`",
        "z_loss": "`z_loss` belongs to next-token prediction; leave it out",
        "validation": "rollouts are measured as they are made: leave `validation` out, and ask other prompts "
        "in an `evaluate` stage",
    }
    unused_in_data: ClassVar[tuple[str, ...]] = PROMPTS

    start: str = Field(alias="from")
    """The model to start from, which is also the reference."""
    data: Mixture
    """Prompts, with the columns that the reward needs to judge a completion."""
    reward: list[Named] = Field(min_length=1)
    """Scorers by name, `file.py:function` with TRL's signature, or {model: rm} for a reward stage; {name,
    weight, ...} for a weighted sum, with `weight: 0` to log one and not learn from it."""
    prompts_per_step: Count = Field(default=8, ge=1)
    """Prompts per rollout."""
    num_generations: Count = Field(default=8, ge=1)
    """Completions per prompt."""
    epochs_per_rollout: int = Field(default=1, ge=1)
    """How often a rollout is learned from."""
    minibatches: int = Field(default=1, ge=1)
    """Optimiser steps in one epoch over a rollout."""
    max_new_tokens: Count = Field(default=256, ge=1)
    """The longest completion in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """The sampling temperature."""
    prompt_template: str | None = None
    """How a model without a chat template is asked, such as `Question: {prompt}\\nAnswer:`."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion."""
    entropy_bonus: float = Field(default=0.0, ge=0)
    """The weight of the entropy in the objective."""
    max_rows: Count = Field(default=64, ge=1)
    """How many completions are sampled at once."""
    engine: EngineChoice = EngineSettings()
    """What samples the completions: `own` or `vllm`."""
    async_level: int = Field(default=0, ge=0, le=1)
    """How many rollouts generation is ahead: with 1 each is made with the weights before the update that
    precedes its own (one step off), and the ratio to the policy that generated corrects for it."""
    share_prompts: bool = True
    """Whether the training forward computes a group's prompt once."""
    learning_rate: LearningRate = LearningRate(decay="constant")
    """The learning rate: a number, `parent`, or a schedule."""
    optimiser: Literal["muon", "adamw"] = "adamw"
    """`muon` for matrices with AdamW for the rest, or `adamw` for all weights."""
    compile: Literal["auto", "on", "off"] = "off"
    """Whether to compile the model."""

    @model_validator(mode="after")
    def the_engine_takes_weights(self) -> Self:
        """What samples has to follow the trainer, and to say how likely its tokens were."""
        refuse_endpoint(self.engine)
        return self

    def scorers(self) -> list[Named]:
        """All scorers of a completion."""
        return self.reward

    def files(self) -> list[Named]:
        return self.scorers()

    def references(self) -> list[Reference]:
        """`from` names the model, `data` its prompts; a reward may be a reward stage or lie in a file."""
        models, files = model_references(self.scorers()), file_references(self.files())
        return [*super().references(), *models, *files]

    def counted(self) -> dict[str, Any]:
        found = {**super().counted(), "reward_files": reward_files(self.files())}
        # Our own engine is what every earlier rollout was made with, and no setting of those.
        if self.engine.kind == "own":
            del found["engine"]
        # So are those that were made with the weights that learn from them.
        if not self.async_level:
            del found["async_level"]
        return found

    def check_machine(self) -> None:
        super().check_machine()
        ready_scorers(self.scorers())
        self.engine.check_machine()

    def read(self, opened: Opened[list[Prompt]]) -> None:
        """The prompts that leave room for a completion."""
        room = opened.config.context - self.max_new_tokens
        if room < 1:
            raise TriviumError(
                f"{opened.work.stage}: the model reads {opened.config.context} tokens, which "
                f"`max_new_tokens: {self.max_new_tokens}` fills; lower it."
            )
        opened.data = self.prompts(opened, room)

    def prepare_batches(self, opened: Opened[list[Prompt]]) -> None:
        """The engine keeps the model's layers, so whatever is laid on them is there by now."""
        work, reward = opened.work, judges_of(self.scorers(), opened.work)
        rows = min(self.max_rows, self.prompts_per_step * self.num_generations)
        algorithm, settings, more = self.method(opened)
        if self.steps_earn is not None:
            more["process"] = process_rewards_of(reward, self.steps_earn, opened.tokenizer)
        common = RolloutSettings(
            steps=self._steps(len(opened.data)), prompts_per_step=self.prompts_per_step,
            num_generations=self.num_generations, epochs_per_rollout=self.epochs_per_rollout,
            minibatches=self.minibatches, entropy_bonus=self.entropy_bonus,
            async_level=self.async_level,
            share_prompts=self.share_prompts and prompts_can_be_shared(opened.model.config), **settings,
        )  # fmt: skip
        opened.batches = RolloutBatches(
            opened.model, self.worker(opened, rollout_engine(opened, self.engine, rows)),
            opened.data, reward, algorithm, common, sampling=self.sampling(), seed=work.seed,
            on_rollout=lambda rollout, groups, asked: write_completions(
                work, rollout, groups, asked, reward.names
            ),
            precision=self.precision, **more,
        )  # fmt: skip

    def findings(self, opened: Opened[list[Prompt]]) -> dict[str, Any]:
        rollouts = -(-opened.batches.steps // opened.batches.settings.steps_per_rollout)
        return {"prompts": len(opened.data), "rollouts": rollouts, **self.outcome(opened)}

    def prompts(self, opened: Opened[list[Prompt]], room: int) -> list[Prompt]:
        """All prompts of at most `room` tokens."""
        return read_prompts(
            opened.work, self.data, opened.tokenizer, room=room, prompt_template=self.prompt_template
        )

    def worker(self, opened: Opened[list[Prompt]], engine: RolloutEngine) -> RolloutWorker:
        """Who samples the completions."""
        return EngineWorker(engine, self.sampling())

    def sampling(self) -> Sampling:
        return Sampling(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, stop=self.stop, logprobs=True
        )

    def reference(self, model: Transformer) -> Transformer:
        """The model as it is now: itself where it will differ by an adapter alone, else a frozen copy."""
        off = self.adapter is not None and not self.adapter.train
        return model if off else copy.deepcopy(model).requires_grad_(False)

    @property
    def steps_earn(self) -> StepRewards | None:
        """How the scores of a process reward model reach the tokens; None: as a reward of the whole."""
        return None

    def method(self, opened: Opened[list[Prompt]]) -> Method:
        """What the method is: its algorithm, its rollout settings, and what else its rollouts need."""
        raise NotImplementedError

    def _steps(self, prompts: int) -> int:
        if self.epochs is None:
            return self.steps or DEFAULT_STEPS
        rollouts = max(1, math.ceil(self.epochs * prompts / self.prompts_per_step))
        return rollouts * self.epochs_per_rollout * self.minibatches

    def outcome(self, opened: Opened[list[Prompt]]) -> dict[str, Any]:
        """What the summary says besides."""
        return {}


def from_to(log: MetricsLog, names: Sequence[str]) -> dict[str, list[float]]:
    """The mean of each measure over the first tenth of the steps that have it, and over the last tenth."""
    rows = log.rows()
    found = {}
    for name in names:
        values = [row[name] for row in rows if "step" in row and name in row]
        tenth = max(1, len(values) // 10)
        if values:
            found[name] = [sum(some) / len(some) for some in (values[:tenth], values[-tenth:])]
    return found
