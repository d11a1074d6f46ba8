"""Rollouts as a batch source: the model answers, graders reward, several optimiser steps learn from it.

One rollout: sample groups of completions, grade them, make advantages of the rewards (`advantages.py`), pack
what teaches something. Columns hold one number per token, so that a method may tell tokens apart; a method
that does not gives all tokens of a completion the same advantage.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivium.data.order import round_keys, shuffled
from trivium.data.rows import PackedSequence, collate, row_of_documents
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.grade.rewards import Combined
from trivium.kit.fingerprint import fingerprint
from trivium.kit.processes import everyone, world
from trivium.learn.objectives.advantages import (
    AdvantageSettings,
    KlController,
    RunningScale,
    combined,
    discounted,
    gae,
    group_advantages,
    overlong_penalty,
    token_rewards,
    whitened,
)
from trivium.learn.objectives.policy import token_outputs
from trivium.learn.objectives.policy_losses import Algorithm, kl_estimate, loss_weights
from trivium.learn.objectives.step_advantages import tree_advantages
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import PASS_TOKENS, groups_of
from trivium.model.lora import selected
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer
from trivium.stages.parts.process_rewards import ProcessRewards
from trivium.stages.parts.prompts import Curriculum, Prompt, identity
from trivium.stages.parts.rollout_metrics import objective_metrics, rollout_metrics
from trivium.stages.parts.rollout_state import Made, restored, saved
from trivium.stages.parts.rollout_worker import (
    Rollout,
    RolloutGroup,
    RolloutWorker,
    generated_by_all,
    under_filters,
)

ROW_TOKENS = 8192
"""A group with more than this is divided into rows that each compute the prompt once."""
AHEAD = "ahead."
"""What the names of tensors of a rollout made ahead begin with in a state."""


@dataclass(frozen=True)
class RolloutSettings:
    """How many completions of how many prompts, and what of them is learned how often."""

    steps: int
    prompts_per_step: int
    num_generations: int
    epochs_per_rollout: int = 1
    minibatches: int = 1
    """Into how many optimiser steps one pass over a rollout is divided."""
    dynamic_sampling_retries: int = 0
    """How often groups without variance are replaced by others (DAPO's dynamic sampling)."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    overlong_buffer: int = 0
    """The last tokens before the limit, over which the penalty for length rises."""
    normalise_first: bool = False
    threshold: float | None = 1.0
    """The reward from which a completion counts as right; None where scores know no right and wrong."""
    held_out_scorer: int | None = None
    """The place of the scorer that says what is right and is never learned from; None: the first reward."""
    kl_in_loss: bool = False
    """Whether the objective compares every learned token with the reference."""
    correction: Literal["none", "token", "sequence"] = "none"
    correction_cap: float = 2.0
    entropy_bonus: float = 0.0
    share_prompts: bool = True
    """Whether the prompt of a group is computed once for all its completions."""
    async_level: int = field(default=0, repr=False)
    """How many rollouts are made before the one that is learned from has changed the weights.

    Not in `repr`, so that the fingerprint of batches made without it, and what is kept under it, stays."""

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps between two rollouts."""
        return self.epochs_per_rollout * self.minibatches


class RolloutBatches:
    """Makes rollouts with the current weights and serves them as batches, until all are used."""

    def __init__(
        self,
        model: Transformer,
        worker: RolloutWorker,
        prompts: Sequence[Prompt],
        reward: Combined,
        algorithm: Algorithm,
        settings: RolloutSettings,
        *,
        sampling: Sampling,
        seed: int,
        advantages: AdvantageSettings | None = None,
        curriculum: Curriculum | None = None,
        reference: Transformer | None = None,
        controller: KlController | None = None,
        critic: ScalarHead | None = None,
        process: ProcessRewards | None = None,
        on_rollout: Callable[[int, list[RolloutGroup], Sequence[Prompt]], None] | None = None,
        precision: Precision = "float32",
    ) -> None:
        """`reference` is a frozen copy, or the model itself where it is the model without its adapter.

        `controller` has the coefficient of the KL where that is taken off the reward. `precision` is the
        training's, so that both compute the same numbers from the same weights.
        """
        assert (reference is not None) == (settings.kl_in_loss or controller is not None)
        self.model, self.worker, self.prompts, self.reward = model, worker, prompts, reward
        self.algorithm, self.settings, self.sampling, self.seed = algorithm, settings, sampling, seed
        self.advantages = advantages or AdvantageSettings()
        self.curriculum = curriculum or Curriculum(len(prompts), seed)
        self.reference, self.controller, self.critic = reference, controller, critic
        self.process, self.on_rollout, self.precision = process, on_rollout, precision
        self.longest = sampling.max_new_tokens
        self.filtered = under_filters(sampling)
        self.baseline = 0.0
        self.scale = RunningScale()
        self.objective_metrics: dict[str, float] = {}
        self.waited = 0.0
        """Seconds for which the processes waited for the last, in this rollout."""
        self.spent: dict[str, float] = {}
        self.held: Made | None = None
        self.ahead: Made | None = None

    @property
    def steps(self) -> int:
        return self.settings.steps

    @property
    def fingerprint(self) -> str:
        """Changes when any batch could change; files of rewards are counted by the stage."""
        method = [self.algorithm.advantage, self.algorithm.aggregation]
        reward = [self.reward.names, self.reward.weights]
        settings = [repr(one) for one in (self.settings, self.advantages, self.sampling)]
        if self.settings.async_level:
            settings.append(f"async_level={self.settings.async_level}")
        return fingerprint([identity(self.prompts), *settings, *method, *reward, self.seed])

    def rows(self, step: int) -> list[PackedSequence]:
        rollout, place = divmod(step, self.settings.steps_per_rollout)
        if self.held is None or self.held[0] != rollout:
            self._take_up(rollout)
        assert self.held is not None
        rows, count = self.held[1], self.settings.minibatches
        turn, part = divmod(place, count)
        keys = round_keys("answers", self.seed, rollout, turn)
        order = shuffled(np.arange(len(rows)), len(rows), keys) if count > 1 else range(len(rows))
        mine = [rows[index] for index in list(order)[part::count]] or rows[:1]
        # Whether trainer and sampler still have the same weights, so that their numbers can be compared.
        stale = self.settings.async_level > 0 and rollout > 0
        facts = {"fresh": place == 0 and not stale}
        if self.settings.async_level:
            facts["stale"] = place == 0 and stale
        return [
            replace(
                row,
                facts={**row.facts, **{name: [is_so] * len(row.lengths) for name, is_so in facts.items()}},
            )
            for row in mine
        ]

    def _take_up(self, rollout: int) -> None:
        """Learn from the next rollout, and make the one after it before the weights change."""
        if self.ahead is not None and self.ahead[0] == rollout:
            self.held = self.ahead
        else:
            self.held = (rollout, *self.roll_out(rollout))
        self.ahead = None
        if not self.settings.async_level:
            return
        if (rollout + 1) * self.settings.steps_per_rollout < self.steps:
            self.ahead = (rollout + 1, *self.roll_out(rollout + 1))
        if self.settings.correction != "none":
            self.held = (rollout, self._corrected(self.held[1]), self.held[2])

    def metrics(self, step: int) -> Mapping[str, float]:
        assert self.held is not None
        rollout, _, measures = self.held
        if not self.settings.async_level:
            return measures
        made = max(0, rollout - 1) * self.settings.steps_per_rollout
        return {**measures, "staleness": float(step - made)}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        json: dict[str, Any] = {"curriculum": self.curriculum.state(), "baseline": self.baseline}
        json["scale"] = vars(self.scale)
        json["coefficient"] = None if self.controller is None else self.controller.coefficient
        if self.held is None:
            return json, {}
        held, tensors = saved(self.held)
        json |= held
        if self.ahead is not None:
            json["ahead"], ahead = saved(self.ahead)
            tensors |= {f"{AHEAD}{name}": tensor for name, tensor in ahead.items()}
        return json, tensors

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.curriculum.restore(json["curriculum"])
        self.baseline, self.scale = json["baseline"], RunningScale(**json["scale"])
        if self.controller is not None:
            self.controller.coefficient = json["coefficient"]
        self.held = self.ahead = None
        if "rollout" in json:
            self.held = restored(json, tensors)
        if "ahead" in json:
            ahead = {name.removeprefix(AHEAD): one for name, one in tensors.items() if name.startswith(AHEAD)}
            self.ahead = restored(json["ahead"], ahead)

    # one rollout

    def roll_out(self, rollout: int) -> tuple[list[PackedSequence], dict[str, float]]:
        """Completions of the next prompts, graded, as rows; and the measures of the whole rollout."""
        start = time.perf_counter()
        self.spent = {"generation_seconds": 0.0, "scoring_seconds": 0.0}
        self.waited = 0.0
        groups: list[RolloutGroup] = []
        kept: list[RolloutGroup] = []
        retries = self.settings.dynamic_sampling_retries
        for attempt in range(retries + 1):
            fresh = self._groups(rollout, attempt, self.settings.prompts_per_step - len(kept))
            groups += fresh
            kept += [group for group in fresh if not retries or any(map(_has_advantage, group.rollouts))]
            if len(kept) == self.settings.prompts_per_step:
                break
        measures = rollout_metrics(
            groups, self.reward.names, self.settings.threshold, self.settings.held_out_scorer
        )
        measures |= {**self.objective_metrics, "rollout_seconds": time.perf_counter() - start, **self.spent}
        if world().size > 1:
            measures["rollout_wait_share"] = self.waited / self.spent["generation_seconds"]
        if self.on_rollout is not None and world().leads:
            self.on_rollout(rollout, groups, self.prompts)
        if self.algorithm.advantage == "baseline":
            self.baseline = 0.9 * self.baseline + 0.1 * measures["reward"]
        return self._rows(kept or groups[:1]), measures

    def _groups(self, rollout: int, attempt: int, wanted: int) -> list[RolloutGroup]:
        """Sample and grade; every process answers and grades some prompts and receives all groups."""
        chosen = self.curriculum.next(wanted)
        seeds = [seed_of_sample(self.seed, 1 + (rollout * 64 + attempt) * 65536 + i) for i in range(wanted)]
        here = world()
        prompts = [self.prompts[index] for index in chosen]
        count = self.settings.num_generations
        with self._timed("generation_seconds"):
            generated, waited = generated_by_all(self.worker, self.model, prompts, count, seeds)
        self.waited += waited
        groups = [RolloutGroup(index, rollouts) for index, rollouts in zip(chosen, generated, strict=True)]
        # Who grades what does not depend on who was faster: graders may look at several completions at once.
        groups = groups[here.rank :: here.size]
        with self._timed("scoring_seconds"):
            if groups:
                self._grade(groups)
            groups = _from_all(groups)
        self._compute_advantages(groups)
        threshold = self.settings.threshold
        for group in groups:
            judged = [
                score for score in group.scores[self.settings.held_out_scorer or 0] if score is not None
            ]
            if judged and threshold is not None:
                self.curriculum.note(
                    group.prompt_index, sum(score >= threshold for score in judged) / len(judged)
                )
        return groups

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add to a rollout's log how long this takes, with the wait for other processes."""
        start = time.perf_counter()
        yield
        self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start

    def _grade(self, groups: Sequence[RolloutGroup]) -> None:
        """One call of every reward for all completions, as graders may work on them side by side."""
        pairs = [(self.prompts[group.prompt_index], one) for group in groups for one in group.rollouts]
        names = {name for prompt, _ in pairs for name in prompt.columns}
        scores = self.reward.parts(
            prompts=[prompt.content for prompt, _ in pairs],
            completions=[rollout.completion for _, rollout in pairs],
            completion_ids=[rollout.tokens for _, rollout in pairs],
            **{name: [prompt.columns.get(name) for prompt, _ in pairs] for name in sorted(names)},
        )
        if self.process is not None:
            self.process.grade(pairs)
        start = 0
        for group in groups:
            piece = slice(start, start + len(group.rollouts))
            start = piece.stop
            group.scores = [list(part[piece]) for part in scores]

    # from scores to advantages

    def _compute_advantages(self, groups: Sequence[RolloutGroup]) -> None:
        """The reward R of every completion, and r_t, A_t (and the critic's target) of each of its tokens."""
        self.objective_metrics = {}
        for group in groups:
            group.rewards = self._rewards(group)
        judged = [
            (rollout, reward)
            for group in groups
            for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
            if reward is not None
        ]
        if not judged:
            return
        if self.controller is not None or self.critic is not None:
            self._evaluate(groups)
        rollouts = [rollout for rollout, _ in judged]
        scores = self._scaled(np.array([reward for _, reward in judged]), rollouts)
        beta = 0.0 if self.controller is None else self.controller.coefficient
        kl = [_kl(rollout, self.advantages.kl) for rollout in rollouts]
        rewards = [token_rewards(beta * one, score) for one, score in zip(kl, scores, strict=True)]
        if self.advantages.whiten_rewards:
            rewards = whitened(rewards, centre=False)
        for rollout, mine in zip(rollouts, rewards, strict=True):
            rollout.rewards = mine
        self._estimate(groups, rollouts)
        if self.controller is not None:
            self.objective_metrics = objective_metrics(rollouts, scores, [beta * one.sum() for one in kl])
            self.objective_metrics["kl_coefficient"] = beta
            self.controller.update(self.objective_metrics["objective/kl"], len(rollouts))

    def _rewards(self, group: RolloutGroup) -> list[float | None]:
        """The weighted sum of the scores of each completion, with what its length costs it."""
        table = np.array([[np.nan if score is None else score for score in part] for part in group.scores]).T
        total = combined(table, self.reward.weights, normalise_first=self.settings.normalise_first)
        if self.process is not None and not any(self.reward.weights):
            # What is rewarded step by step alone has no reward of the whole.
            total = np.nan_to_num(total)
        for index, rollout in enumerate(group.rollouts):
            if rollout.environment_reward is not None:
                total[index] = rollout.environment_reward + np.nan_to_num(total[index])
            if self.settings.overlong_buffer:
                total[index] += overlong_penalty(
                    len(rollout.tokens), self.longest, self.settings.overlong_buffer
                )
            elif rollout.truncated and self.settings.truncated == "penalise":
                total[index] = min(total[index], 0.0)
        return [None if np.isnan(value) else float(value) for value in total]

    def _scaled(self, scores: np.ndarray, rollouts: Sequence[Rollout]) -> np.ndarray:
        """Scores brought to scale and clipped, less the penalty for a completion that did not end."""
        if self.advantages.normalise == "batch":
            self.scale = RunningScale()
        if self.advantages.normalise != "none":
            self.scale.accumulate(scores)
            scores = self.scale.apply(scores)
        if self.advantages.clip_score is not None:
            scores = scores.clip(-self.advantages.clip_score, self.advantages.clip_score)
        if self.advantages.missing_eos_penalty is not None:
            endless = np.array([rollout.truncated for rollout in rollouts])
            scores = scores - self.advantages.missing_eos_penalty * endless
        return scores

    def _evaluate(self, groups: Sequence[RolloutGroup]) -> None:
        """Ask the reference and the critic about every learned token."""
        members, rows = [], []
        for group in groups:
            learned = [index for index, one in enumerate(group.rollouts) if self._learned_tokens(one)]
            for some in _portions(group, learned, len(self.prompts[group.prompt_index].ids)):
                members.append([group.rollouts[index] for index in some])
                rows.append(self._row(group, some))
        asked = {} if self.controller is None else {"reference": self._under_reference(rows)}
        if self.critic is not None:
            asked["values"] = self._measured(self.model, rows, self.critic)
        for name, found in asked.items():
            for rollouts, flat in zip(members, found, strict=True):
                sizes = np.cumsum([sum(rollout.learned) for rollout in rollouts])[:-1]
                for rollout, mine in zip(rollouts, np.split(flat, sizes), strict=True):
                    column = getattr(rollout, name).copy()
                    column[rollout.learned] = mine
                    setattr(rollout, name, column)

    def _estimate(self, groups: Sequence[RolloutGroup], judged: Sequence[Rollout]) -> None:
        """A_t by the algorithm's estimator."""
        settings, estimator = self.advantages, self.algorithm.advantage
        if estimator == "gae" or estimator == "reinforce++":
            for one in judged:
                if estimator == "gae":
                    one.advantages = gae(one.rewards, one.values, settings.discount, settings.decay)
                    one.returns = one.advantages + one.values
                else:
                    one.advantages = discounted(one.rewards, settings.discount)
            if settings.whiten_advantages:
                for one, mine in zip(judged, whitened([one.advantages for one in judged]), strict=True):
                    one.advantages = mine
            return
        for group in groups:
            # The completion is one action here, and what it pays for the KL part of its reward.
            group.rewards = [
                None if reward is None else float(rollout.rewards.sum())
                for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
            ]
            if any(rollout.trunk is not None for rollout in group.rollouts):
                self._estimate_tree(group, scale=estimator == "group")
            else:
                found = group_advantages(
                    group.rewards, estimator, baseline=self.baseline, threshold=self.settings.threshold or 0.0
                )
                for rollout, advantage in zip(group.rollouts, found, strict=True):
                    rollout.advantages = np.full(len(rollout.tokens), advantage)
            if self.process is not None:
                earned = self.process.advantages(group.rollouts, scale=estimator == "group")
                for rollout, mine in zip(group.rollouts, earned, strict=True):
                    rollout.advantages = rollout.advantages + mine

    def _estimate_tree(self, group: RolloutGroup, *, scale: bool) -> None:
        """A_t of completions that share beginnings; one without a reward has none and counts for no other."""
        graded = [
            (rollout, reward)
            for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
            if reward is not None
        ]
        found = tree_advantages(
            np.array([reward for _, reward in graded]), [one.trunk or 0 for one, _ in graded],
            [one.fork for one, _ in graded], [len(one.tokens) for one, _ in graded], scale=scale,
        )  # fmt: skip
        for (rollout, _), mine in zip(graded, found, strict=True):
            rollout.advantages = mine

    # rows

    def _rows(self, groups: Sequence[RolloutGroup]) -> list[PackedSequence]:
        """Rows of all completions that can teach something; the others only count in the divisor."""
        rows, left_out = [], 0.0
        for group in groups:
            useful = [i for i in range(len(group.rollouts)) if self._teaches(group, i)]
            left_out += sum(self._divisor(group, i) for i in range(len(group.rollouts)) if i not in useful)
            for some in _portions(group, useful, len(self.prompts[group.prompt_index].ids)):
                rows.append(self._row(group, some))
        if not rows:
            group = max(groups, key=lambda group: sum(map(self._learned_tokens, group.rollouts)))
            index = max(range(len(group.rollouts)), key=lambda i: self._learned_tokens(group.rollouts[i]))
            left_out -= self._divisor(group, index)
            rows = [self._row(group, [index])]
        if self.settings.kl_in_loss:
            rows = _with_column(rows, "reference", self._under_reference(rows))
        # A rollout made ahead is corrected by the weights that begin to learn from it.
        if self.settings.correction != "none" and not self.settings.async_level:
            rows = self._corrected(rows)
        # Spread evenly, so that every optimiser step divides by its share of what was left out.
        return [_heavier(row, left_out / len(rows)) for row in rows]

    def _teaches(self, group: RolloutGroup, index: int) -> bool:
        if not self._learned_tokens(group.rollouts[index]) or group.rewards[index] is None:
            return False
        # Only a comparison within a group has advantages of exactly zero that say there is nothing to learn.
        compares = self.algorithm.advantage not in ("gae", "reinforce++")
        other_terms = self.settings.kl_in_loss or self.settings.entropy_bonus > 0
        return not compares or other_terms or _has_advantage(group.rollouts[index])

    def _learned_tokens(self, rollout: Rollout) -> int:
        return 0 if rollout.truncated and self.settings.truncated == "mask" else sum(rollout.learned)

    def _weights(self, rollout: Rollout) -> tuple[float, float]:
        token, whole = loss_weights(self._learned_tokens(rollout), self.algorithm.aggregation, self.longest)
        return rollout.weight * token, rollout.weight * whole

    def _divisor(self, group: RolloutGroup, index: int) -> float:
        """What a completion adds to the divisor; one that no scorer could judge adds nothing."""
        rollout = group.rollouts[index]
        rejected = self.algorithm.advantage == "accept" and not _has_advantage(rollout)
        return 0.0 if group.rewards[index] is None or rejected else self._weights(rollout)[1]

    def _row(self, group: RolloutGroup, some: Sequence[int]) -> PackedSequence:
        """Some completions of a group behind their prompt, which is computed once where that pays."""
        prompt = self.prompts[group.prompt_index]
        # The last token of the prompt goes with every completion: its hidden state predicts the first token.
        shares = self.settings.share_prompts and len(some) > 1 and len(prompt.ids) > 1
        beginning = prompt.ids[-1:] if shares else prompt.ids
        documents = [np.array(prompt.ids[:-1])] if shares else []
        weights = [np.zeros(len(part)) for part in documents]
        names = ["advantage", "old_logprob", "sampled_logprob", "correction"]
        names += [] if self.critic is None else ["value", "return"]
        columns = {name: [np.zeros(len(part), dtype=np.float32) for part in documents] for name in names}
        for index in some:
            rollout = group.rollouts[index]
            size, start = len(beginning) + len(rollout.tokens), len(beginning) - 1
            documents.append(np.array([*beginning, *rollout.tokens]))
            learned = np.zeros(size)
            if self._learned_tokens(rollout):
                learned[start + 1 :] = np.array(rollout.learned) * self._weights(rollout)[0]
            weights.append(learned)
            values = {name: np.zeros(size, dtype=np.float32) for name in names}
            values["advantage"][start:-1] = rollout.advantages
            values["old_logprob"][start:-1] = values["sampled_logprob"][start:-1] = rollout.logprobs
            values["correction"][:] = 1.0
            if self.critic is not None:
                values["value"][start:-1], values["return"][start:-1] = rollout.values, rollout.returns
            for name in names:
                columns[name].append(values[name])
        count = len(documents) - len(some)
        facts: dict[str, list] = {
            "back": list(range(len(documents))) if shares else [0] * len(documents),
            "divisor": [0.0] * count + [self._divisor(group, index) for index in some],
        }
        ids = [f"{prompt.id}"] * count + [f"{prompt.id}/{index}" for index in some]
        return row_of_documents(documents, learned=weights, columns=columns, facts=facts, ids=ids)

    @torch.no_grad()
    def _measured(
        self, model: Transformer, rows: Sequence[PackedSequence], critic: ScalarHead | None = None
    ) -> list[np.ndarray]:
        """The log-probability, or the critic's value, of every row's learned tokens under a model."""
        found: list[np.ndarray] = []
        for some in groups_of(rows, PASS_TOKENS):
            batch = collate(some, model.device)
            with one_pass(self.precision, model.device):
                outputs = token_outputs(
                    model, batch, temperature=self.sampling.temperature, filtered=self.filtered,
                    critic=critic, prune=critic is not None,
                )  # fmt: skip
            sizes = [int((row.weights > 0).sum()) for row in some]
            values = outputs.logprobs if outputs.values is None else outputs.values
            found += [part.float().cpu().numpy() for part in values.split(sizes)]
        return found

    def _under_reference(self, rows: Sequence[PackedSequence]) -> list[np.ndarray]:
        assert self.reference is not None
        with selected(self.model, None) if self.reference is self.model else nullcontext():
            return self._measured(self.reference, rows)

    def _corrected(self, rows: list[PackedSequence]) -> list[PackedSequence]:
        """The trainer's own numbers as the old ones; how far off the engine's were is a capped weight."""
        rows = _with_column(rows, "old_logprob", self._measured(self.model, rows))
        corrected = []
        for row in rows:
            learned = row.weights > 0
            apart = np.where(learned, row.columns["old_logprob"] - row.columns["sampled_logprob"], 0.0)
            if self.settings.correction == "sequence":
                owner = np.repeat(np.arange(len(row.lengths)), row.lengths)
                apart = np.bincount(owner, apart, len(row.lengths))[owner]
            weight = np.minimum(np.exp(apart), self.settings.correction_cap).astype(np.float32)
            corrected.append(replace(row, columns={**row.columns, "correction": weight}))
        return corrected


def _has_advantage(rollout: Rollout) -> bool:
    return bool(rollout.advantages.any())


def _kl(rollout: Rollout, estimator: Literal["k1", "k2", "k3"]) -> np.ndarray:
    """The estimate of the KL at every token, 0 where the reference was not asked: [tokens]"""
    logprobs = torch.tensor(rollout.logprobs, dtype=torch.float64)
    return kl_estimate(logprobs, torch.from_numpy(rollout.reference), estimator).numpy()


def _portions(group: RolloutGroup, useful: Sequence[int], prompt: int) -> list[list[int]]:
    """The useful completions in rows of at most `ROW_TOKENS`."""
    if not useful:
        return []
    longest = max(len(group.rollouts[index].tokens) for index in useful)
    size = max(1, (ROW_TOKENS - prompt) // longest)
    return [list(useful[start : start + size]) for start in range(0, len(useful), size)]


def _heavier(row: PackedSequence, divisor: float) -> PackedSequence:
    first, *others = row.facts["divisor"]
    return replace(row, facts={**row.facts, "divisor": [first + divisor, *others]})


def _with_column(
    rows: Sequence[PackedSequence], name: str, values: Sequence[np.ndarray]
) -> list[PackedSequence]:
    """The rows with a column that has these values at the learned tokens."""
    changed = []
    for row, mine in zip(rows, values, strict=True):
        column = np.zeros(len(row), dtype=np.float32)
        column[row.weights > 0] = mine
        changed.append(replace(row, columns={**row.columns, name: column}))
    return changed


def _from_all(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The groups of all processes, in the order of their prompts."""
    said = everyone(groups)
    longest = max(map(len, said))
    return [some[index] for index in range(longest) for some in said if index < len(some)]
