"""Online preferences: the model answers each prompt several times, scorers choose the best and the worst.

Offline, a model learns from answers that another one gave, which it may never give itself. Online DPO
(2402.04792) asks the model as it is at every step, so the pairs stay where it is. Any loss of pairs will do.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from trivium.data.preferences import Completion, PreferencePair, row_of, typical_tokens
from trivium.data.rows import PackedSequence
from trivium.data.settings import Mixture
from trivium.generate.engines import EngineChoice, EngineSettings
from trivium.generate.sampling import Sampling
from trivium.grade.rewards import ready_scorers
from trivium.kit.errors import TriviumError
from trivium.kit.numbers import Count
from trivium.kit.settings import Settings
from trivium.learn.objectives.advantages import AdvantageSettings
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.stages.parts.documents import PROMPTS, mixture_references
from trivium.stages.parts.judges import Named, file_references, judges_of, model_references, reward_files
from trivium.stages.parts.prompts import Prompt, read_prompts
from trivium.stages.parts.rollout_engine import refuse_endpoint, rollout_engine
from trivium.stages.parts.rollout_metrics import write_completions
from trivium.stages.parts.rollout_worker import EngineWorker, RolloutGroup
from trivium.stages.parts.rollouts import RolloutBatches, RolloutSettings
from trivium.stages.parts.stage import Reference
from trivium.stages.parts.training import Opened

DEFAULT_STEPS = 100
Judges = list[Named]
Prompts = list[Prompt]


class Online(Settings):
    """How the model is asked, and who judges what it answers."""

    num_generations: Count = Field(default=2, ge=2)
    """Answers per prompt; the best and the worst of them are the pair."""
    max_new_tokens: Count = Field(default=64, ge=1)
    """The longest answer in tokens."""
    temperature: float = Field(default=0.9, gt=0)
    """The sampling temperature."""
    prompt_template: str | None = None
    """How a model without a chat template is asked, such as `Question: {prompt}\\nAnswer:`."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    missing_eos_penalty: float | None = Field(default=None, gt=0)
    """What is taken off the score of an answer that was cut off."""
    max_rows: Count = Field(default=64, ge=1)
    """How many answers are sampled at once."""
    engine: EngineChoice = EngineSettings()
    """What samples the answers: `own` or `vllm`."""

    @model_validator(mode="after")
    def the_engine_takes_weights(self) -> Self:
        """What samples has to follow the trainer."""
        refuse_endpoint(self.engine)
        return self


def _settings(value: Any) -> Any:
    """`true` is short for all defaults, `false` for none."""
    if isinstance(value, bool):
        return {} if value else None
    return value


Asked = Annotated[Online | None, BeforeValidator(_settings, json_schema_input_type=bool | Online | None)]


class OnlinePairs(RolloutBatches):
    """Rollouts whose rows are preference pairs: of every prompt the best answer and the worst."""

    together = False
    """Whether all pairs of a step lie in one row, as losses over a whole batch want them."""

    def rows(self, step: int) -> list[PackedSequence]:
        progress = step / max(1, self.steps - 1)
        return [
            replace(row, facts={**row.facts, "progress": [progress] * len(row.lengths)})
            for row in super().rows(step)
        ]

    def roll_out(self, rollout: int) -> tuple[list[PackedSequence], dict[str, float]]:
        """The pairs of the next prompts, and the measures of all answers, with TRL's names beside."""
        rows, measures = super().roll_out(rollout)
        measures |= self.objective_metrics
        return rows, measures

    def _rows(self, groups: Sequence[RolloutGroup]) -> list[PackedSequence]:
        pairs = [pair for group in groups if (pair := self._pair(group)) is not None]
        rewards = [reward for group in groups for reward in group.rewards if reward is not None]
        ended = [not one.truncated for group in groups for one in group.rollouts]
        self.objective_metrics = {
            "pairs": float(len(pairs)),
            "objective/scores": float(np.mean(rewards)) if rewards else 0.0,
            "objective/scores_margin": float(np.mean([one.margin for one in pairs])) if pairs else 0.0,
            "val/contain_eos_token": float(np.mean(ended)),
        }
        # Where no answer is better than another there is nothing to learn, but the step has to have a row.
        pairs = pairs or [replace(self._made(groups[0], 0, 1, 0.0), weight=0.0)]
        portions = [pairs] if self.together else [[pair] for pair in pairs]
        typical = typical_tokens(pairs)
        found = []
        for some in portions:
            row = row_of(some, share=self.settings.share_prompts)
            found.append(replace(row, facts={**row.facts, "typical": [typical] * len(row.lengths)}))
        return found

    def _pair(self, group: RolloutGroup) -> PreferencePair | None:
        """The first of the best answers and the first of the worst; None where all are worth the same."""
        known = [(reward, place) for place, reward in enumerate(group.rewards) if reward is not None]
        if not known:
            return None
        best, worst = max(known, key=lambda one: one[0]), min(known, key=lambda one: one[0])
        if best[0] == worst[0]:
            return None
        return self._made(group, best[1], worst[1], best[0] - worst[0])

    def _made(self, group: RolloutGroup, best: int, worst: int, margin: float) -> PreferencePair:
        prompt = self.prompts[group.prompt_index]
        answers = [group.rollouts[place] for place in (best, worst)]
        return PreferencePair(
            prompt.id,
            np.array(prompt.ids, dtype=np.int64),
            tuple(Completion(np.array(one.tokens, dtype=np.int64), np.array(one.learned)) for one in answers),
            margin=margin,
        )


def online_prompts(opened: Opened[Any], settings: Online, mixture: Mixture) -> Prompts:
    """The prompts that leave room for an answer."""
    room = opened.context - settings.max_new_tokens
    if room < 1:
        raise TriviumError(
            f"{opened.work.stage}: `context` has {opened.context} tokens, which "
            f"`online.max_new_tokens: {settings.max_new_tokens}` fills; lower it."
        )
    return read_prompts(
        opened.work, mixture, opened.tokenizer, room=room, prompt_template=settings.prompt_template
    )


def online_pairs(
    opened: Opened[Any],
    settings: Online,
    prompts: Sequence[Prompt],
    reward: Sequence[Named],
    *,
    pairs: int,
    steps: int | None,
    epochs: float | None,
    share: bool,
    together: bool,
    precision: Any,
) -> OnlinePairs:
    """The batches of a stage that asks the model for its pairs."""
    work, judges = opened.work, judges_of(reward, opened.work)
    if steps is None:
        steps = DEFAULT_STEPS if epochs is None else max(1, round(epochs * len(prompts) / pairs))
    sampling = Sampling(
        temperature=settings.temperature, max_new_tokens=settings.max_new_tokens, stop=settings.stop,
        logprobs=True,
    )  # fmt: skip
    rows = min(settings.max_rows, pairs * settings.num_generations)
    engine = rollout_engine(opened, settings.engine, rows)
    found = OnlinePairs(
        opened.model, EngineWorker(engine, sampling), prompts, judges, ALGORITHMS["grpo"],
        RolloutSettings(
            steps=steps, prompts_per_step=pairs, num_generations=settings.num_generations,
            share_prompts=share, threshold=None,
        ),
        sampling=sampling, seed=work.seed, precision=precision,
        advantages=AdvantageSettings(missing_eos_penalty=settings.missing_eos_penalty),
        on_rollout=lambda rollout, groups, asked: write_completions(
            work, rollout, groups, asked, judges.names
        ),
    )  # fmt: skip
    found.together = together
    return found


def online_references(mixture: Mixture, reward: Sequence[Named]) -> list[Reference]:
    """The prompts, and the reward models and files that judge; what prompts cannot say is refused."""
    prompts = mixture_references(mixture, needs=("data", "source"), without=PROMPTS)
    return [*prompts, *model_references(reward), *file_references(reward)]


def judged_by(reward: Sequence[Named]) -> dict[str, Any]:
    """What counts of the scorers beside their names: the text of the files that hold them."""
    return {"reward_files": reward_files(reward)}


def check_judges(reward: Sequence[Named]) -> None:
    """Try the scorers."""
    ready_scorers(reward)
