"""Rollouts as a batch source: the model answers, graders reward, several optimiser steps learn from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivium.data.order import round_keys, shuffled
from trivium.data.rows import PackedSequence, collate, row_of_documents
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.grade.rewards import Combined
from trivium.kit.fingerprint import fingerprint
from trivium.kit.processes import world
from trivium.learn.objectives.advantages import combined, group_advantages, overlong_penalty
from trivium.learn.objectives.policy import Estimator, answer_log_probabilities
from trivium.learn.objectives.policy_losses import Algorithm, weight_of
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import groups_of
from trivium.model.transformer import Transformer
from trivium.stages.parts.prompts import Curriculum, Prompt, identity
from trivium.stages.parts.rollout_metrics import rollout_metrics
from trivium.stages.parts.rollout_worker import Rollout, RolloutGroup, RolloutWorker, under_filters

UNUSED_WITH_ROLLOUTS = {
    "batch": "a batch is counted in `prompts_per_step` and `num_generations` here, not in tokens",
    "tokens": "how many tokens it takes is not known before; say `steps` or `epochs`",
    "z_loss": "`z_loss` belongs to next-token prediction; leave it out",
    "validation": "rollouts are measured as they are made: leave `validation` out, and ask other prompts in "
    "an `evaluate` stage",
}
"""Settings of other trainings that stages with rollouts have no use for."""
PASS_TOKENS = 4096
"""Tokens per pass where no gradient is needed."""
ROW_TOKENS = 8192
"""A group with more than this is divided into rows that each compute the prompt once."""


@dataclass(frozen=True)
class RolloutSettings:
    """How many answers to how many prompts, and how often they are learned from."""

    steps: int
    prompts_per_step: int
    num_generations: int
    epochs_per_rollout: int = 1
    """How often the whole rollout is learned from."""
    minibatches: int = 1
    """Into how many optimiser steps one pass is divided."""
    dynamic_sampling_retries: int = 0
    """How often groups without variance are replaced by others (DAPO's dynamic sampling)."""
    truncated: Literal["keep", "mask", "penalise"] = "keep"
    overlong_buffer: int = 0
    """The last tokens before the limit, over which the penalty for length rises."""
    normalise_first: bool = False
    threshold: float = 1.0
    """The reward from which an answer counts as right."""
    held_out_scorer: int | None = None
    """The place of the scorer that says what is right and is never learned from; None: the first reward."""
    kl: float = 0.0
    kl_in_reward: bool = False
    estimator: Estimator = "k3"
    correction: Literal["none", "token", "sequence"] = "none"
    correction_cap: float = 2.0
    entropy_bonus: float = 0.0
    share_prompts: bool = True
    """Whether the prompt of a group is computed once for all its answers."""

    @property
    def steps_per_rollout(self) -> int:
        """Optimiser steps before the model answers anew."""
        return self.epochs_per_rollout * self.minibatches


class RolloutBatches:
    """Makes rollouts with the current weights and serves their answers as batches, until all are used."""

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
        curriculum: Curriculum | None = None,
        reference: Transformer | None = None,
        tell: Callable[[int, list[RolloutGroup], Sequence[Prompt]], None] | None = None,
        precision: Precision = "float32",
    ) -> None:
        """`precision` is the training's, so that both compute the same numbers from the same weights."""
        assert (reference is not None) == (settings.kl > 0)
        self.model, self.worker, self.prompts, self.reward = model, worker, prompts, reward
        self.algorithm, self.settings, self.sampling, self.seed = algorithm, settings, sampling, seed
        self.curriculum = curriculum or Curriculum(len(prompts), seed)
        self.reference, self.tell, self.precision = reference, tell, precision
        self.longest = sampling.max_new_tokens
        self.filtered = under_filters(sampling)
        self.baseline = 0.0
        self.held: tuple[int, list[PackedSequence], dict[str, float]] | None = None

    @property
    def steps(self) -> int:
        """How many optimiser steps it lasts."""
        return self.settings.steps

    @property
    def fingerprint(self) -> str:
        """Changes when any batch could change."""
        return fingerprint([identity(self.prompts), repr(self.settings), repr(self.sampling), self.seed])

    def rows(self, step: int) -> list[PackedSequence]:
        """The answers that an optimiser step learns from."""
        rollout, place = divmod(step, self.settings.steps_per_rollout)
        if self.held is None or self.held[0] != rollout:
            self.held = (rollout, *self.roll_out(rollout))
        _, rows, measures = self.held
        turn, part = divmod(place, self.settings.minibatches)
        keys = round_keys("answers", self.seed, rollout, turn)
        order = (
            shuffled(np.arange(len(rows)), len(rows), keys)
            if self.settings.minibatches > 1
            else range(len(rows))
        )
        mine = [rows[index] for index in list(order)[part :: self.settings.minibatches]] or rows[:1]
        return [_marked(row, measures if row is mine[0] else {}, place == 0) for row in mine]

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it needs to go on from the middle of a rollout."""
        json: dict[str, Any] = {"curriculum": self.curriculum.state(), "baseline": self.baseline}
        if self.held is None:
            return json, {}
        rollout, rows, measures = self.held
        json |= {"rollout": rollout, "measures": measures, "columns": sorted(rows[0].columns)}
        json["rows"] = [[list(row.lengths), list(row.ids), dict(row.facts)] for row in rows]
        tensors = {"tokens": _joined([row.tokens for row in rows])}
        tensors["targets"] = _joined([row.targets for row in rows])
        tensors["weights"] = _joined([row.weights for row in rows])
        for name in json["columns"]:
            tensors[f"column.{name}"] = _joined([row.columns[name] for row in rows])
        return json, tensors

    def restore(self, json: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a saved state."""
        self.curriculum.restore(json["curriculum"])
        self.baseline = json["baseline"]
        self.held = None
        if "rollout" not in json:
            return
        flat = {name: tensor.numpy() for name, tensor in tensors.items()}
        rows, start = [], 0
        for lengths, ids, facts in json["rows"]:
            piece = slice(start, start + sum(lengths))
            start = piece.stop
            columns = {name: flat[f"column.{name}"][piece] for name in json["columns"]}
            rows.append(
                PackedSequence(
                    flat["tokens"][piece], flat["targets"][piece], flat["weights"][piece], tuple(lengths),
                    columns, facts, tuple(ids), (0,) * len(lengths),
                )
            )  # fmt: skip
        self.held = (json["rollout"], rows, json["measures"])

    # one rollout

    def roll_out(self, rollout: int) -> tuple[list[PackedSequence], dict[str, float]]:
        """Answers to the next prompts, graded, as rows; and the measures of the whole rollout."""
        start = time.perf_counter()
        groups: list[RolloutGroup] = []
        kept: list[RolloutGroup] = []
        for attempt in range(self.settings.dynamic_sampling_retries + 1):
            fresh = self._groups(rollout, attempt, self.settings.prompts_per_step - len(kept))
            groups += fresh
            kept += [
                group
                for group in fresh
                if not self.settings.dynamic_sampling_retries or group.advantages.any()
            ]
            if len(kept) == self.settings.prompts_per_step:
                break
        measures = rollout_metrics(
            groups, self.reward.names, self.settings.threshold, self.settings.held_out_scorer
        )
        measures["rollout_seconds"] = time.perf_counter() - start
        if self.tell is not None and world().leads:
            self.tell(rollout, groups, self.prompts)
        if self.algorithm.advantage == "baseline":
            self.baseline = 0.9 * self.baseline + 0.1 * measures["reward"]
        return self._rows(kept or groups[:1]), measures

    def _groups(self, rollout: int, attempt: int, wanted: int) -> list[RolloutGroup]:
        """Sample and grade; every process takes its share of the prompts and receives all groups."""
        chosen = self.curriculum.next(wanted)
        seeds = [seed_of_sample(self.seed, 1 + (rollout * 64 + attempt) * 65536 + i) for i in range(wanted)]
        here = world()
        mine = slice(here.rank, None, here.size)
        generated = self.worker.generate(
            [self.prompts[index] for index in chosen[mine]], self.settings.num_generations, seeds[mine]
        )
        groups = [
            RolloutGroup(index, answers) for index, answers in zip(chosen[mine], generated, strict=True)
        ]
        if groups:
            self._grade(groups)
        groups = _from_all(groups)
        self._compute_advantages(groups)
        for group in groups:
            passed = [part for part in group.scores[self.settings.held_out_scorer or 0] if part is not None]
            if passed:
                self.curriculum.note(
                    group.prompt_index,
                    sum(value >= self.settings.threshold for value in passed) / len(passed),
                )
        return groups

    def _grade(self, groups: Sequence[RolloutGroup]) -> None:
        """One call of every reward for all answers, as graders may work on them side by side."""
        answers = [
            (self.prompts[group.prompt_index], answer) for group in groups for answer in group.rollouts
        ]
        names = {name for prompt, _ in answers for name in prompt.columns}
        parts = self.reward.parts(
            prompts=[prompt.content for prompt, _ in answers],
            completions=[answer.completion for _, answer in answers],
            completion_ids=[answer.tokens for _, answer in answers],
            **{name: [prompt.columns.get(name) for prompt, _ in answers] for name in sorted(names)},
        )
        start = 0
        for group in groups:
            piece = slice(start, start + len(group.rollouts))
            start = piece.stop
            group.scores = [list(part[piece]) for part in parts]

    def _compute_advantages(self, groups: Sequence[RolloutGroup]) -> None:
        """From rewards to advantages, group by group."""
        drift = self._reference_kl(groups) if self.settings.kl and self.settings.kl_in_reward else {}
        for group in groups:
            table = np.array(
                [[np.nan if value is None else value for value in part] for part in group.scores]
            ).T
            total = combined(table, self.reward.weights, normalise_first=self.settings.normalise_first)
            for index, answer in enumerate(group.rollouts):
                if answer.extra is not None:
                    total[index] = answer.extra + np.nan_to_num(total[index])
                if self.settings.overlong_buffer:
                    total[index] += overlong_penalty(
                        len(answer.tokens), self.longest, self.settings.overlong_buffer
                    )
                elif answer.truncated and self.settings.truncated == "penalise":
                    total[index] = min(total[index], 0.0)
                total[index] -= self.settings.kl * drift.get(id(answer), 0.0)
            group.rewards = [None if np.isnan(value) else float(value) for value in total]
            group.advantages = group_advantages(
                group.rewards,
                self.algorithm.advantage,
                baseline=self.baseline,
                threshold=self.settings.threshold,
            )

    def _reference_kl(self, groups: Sequence[RolloutGroup]) -> dict[int, float]:
        """For every answer the sampled log-ratio to the reference, summed (k1)."""
        answers, rows = [], []
        for group in groups:
            count = len(group.rollouts)
            unscored = replace(group, rewards=[0.0] * count, advantages=np.zeros(count))
            for index, answer in enumerate(group.rollouts):
                # A truncated answer that is masked has no learned token, and so no divergence either.
                if self._learned_tokens(answer):
                    answers.append(answer)
                    rows.append(self._row(unscored, [index]))
        assert self.reference is not None
        found = self._measured(self.reference, rows)
        return {
            id(answer): float(np.sum(np.array(answer.logprobs)[answer.learned]) - values.sum())
            for answer, values in zip(answers, found, strict=True)
        }

    # rows

    def _rows(self, groups: Sequence[RolloutGroup]) -> list[PackedSequence]:
        """Rows of all answers that can teach something; the others only count in the divisor."""
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
        if self.settings.kl and not self.settings.kl_in_reward:
            assert self.reference is not None
            rows = _with_column(rows, "reference", self._measured(self.reference, rows))
        if self.settings.correction != "none":
            rows = self._corrected(rows)
        # Spread evenly, so that every optimiser step divides by its share of what was left out.
        return [_heavier(row, left_out / len(rows)) for row in rows]

    def _teaches(self, group: RolloutGroup, index: int) -> bool:
        if not self._learned_tokens(group.rollouts[index]):
            return False
        keeps_close = self.settings.kl > 0 and not self.settings.kl_in_reward
        known = group.rewards[index] is not None
        return known and (bool(group.advantages[index]) or keeps_close or self.settings.entropy_bonus > 0)

    def _learned_tokens(self, answer: Rollout) -> int:
        return 0 if answer.truncated and self.settings.truncated == "mask" else sum(answer.learned)

    def _divisor(self, group: RolloutGroup, index: int) -> float:
        """What an answer adds to the divisor; one that no grader could judge adds nothing."""
        accepts = self.algorithm.advantage == "accept"
        if group.rewards[index] is None or (accepts and not group.advantages[index]):
            return 0.0
        length = torch.tensor([self._learned_tokens(group.rollouts[index])])
        return weight_of(length, self.algorithm.aggregation, self.longest)

    def _row(self, group: RolloutGroup, some: Sequence[int]) -> PackedSequence:
        """Some answers of a group behind their prompt, which is computed once where that pays."""
        prompt = self.prompts[group.prompt_index]
        # The last token of the prompt goes with every answer: its hidden state predicts the first token.
        shares = self.settings.share_prompts and len(some) > 1 and len(prompt.ids) > 1
        beginning = prompt.ids[-1:] if shares else prompt.ids
        documents = [np.array(prompt.ids[:-1])] if shares else []
        learned = [np.zeros(len(part)) for part in documents]
        names = ("advantage", "old_logprob", "sampled_logprob", "correction")
        columns = {name: [np.zeros(len(part), dtype=np.float32) for part in documents] for name in names}
        for index in some:
            answer = group.rollouts[index]
            size, start = len(beginning) + len(answer.tokens), len(beginning) - 1
            documents.append(np.array([*beginning, *answer.tokens]))
            kept = np.zeros(size)
            if self._learned_tokens(answer):
                kept[start + 1 :] = answer.learned
            learned.append(kept)
            values = {name: np.zeros(size, dtype=np.float32) for name in names}
            values["advantage"][start:] = group.advantages[index]
            values["old_logprob"][start:-1] = values["sampled_logprob"][start:-1] = answer.logprobs
            values["correction"][:] = 1.0
            for name in names:
                columns[name].append(values[name])
        back = [0] * len(documents) if not shares else list(range(len(documents)))
        count = len(documents) - len(some)
        facts: dict[str, list] = {
            "back": back,
            "divisor": [0.0] * count + [self._divisor(group, index) for index in some],
            "measures": [{} for _ in documents],
            "fresh": [True for _ in documents],
        }
        ids = [f"{prompt.id}"] * count + [f"{prompt.id}/{index}" for index in some]
        return row_of_documents(documents, learned=learned, columns=columns, facts=facts, ids=ids)

    @torch.no_grad()
    def _measured(self, model: Transformer, rows: Sequence[PackedSequence]) -> list[np.ndarray]:
        """The log-probabilities of every row's learned tokens under a model."""
        found: list[np.ndarray] = []
        for some in groups_of(rows, PASS_TOKENS):
            batch = collate(some, model.device)
            with one_pass(self.precision, model.device):
                logprobs, _ = answer_log_probabilities(
                    model, batch, temperature=self.sampling.temperature, filtered=self.filtered
                )
            sizes = [int((row.weights > 0).sum()) for row in some]
            found += [part.float().cpu().numpy() for part in logprobs.split(sizes)]
        return found

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


def _portions(group: RolloutGroup, useful: Sequence[int], prompt: int) -> list[list[int]]:
    """The useful answers in rows of at most `ROW_TOKENS`."""
    if not useful:
        return []
    longest = max(len(group.rollouts[index].tokens) for index in useful)
    size = max(1, (ROW_TOKENS - prompt) // longest)
    return [list(useful[start : start + size]) for start in range(0, len(useful), size)]


def _marked(row: PackedSequence, measures: dict[str, float], fresh: bool) -> PackedSequence:
    """The row with what the objective logs beside its own measures."""
    count = len(row.lengths)
    facts = {**row.facts, "measures": [measures, *({} for _ in range(count - 1))], "fresh": [fresh] * count}
    return replace(row, facts=facts)


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


def _joined(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays))


def _from_all(groups: list[RolloutGroup]) -> list[RolloutGroup]:
    """The groups of all processes, in the order of their prompts."""
    here = world()
    if here.size == 1:
        return groups
    import torch.distributed as distributed

    everyone: list[list[RolloutGroup]] = [[] for _ in range(here.size)]
    distributed.all_gather_object(everyone, groups)
    longest = max(map(len, everyone))
    return [some[index] for index in range(longest) for some in everyone if index < len(some)]
