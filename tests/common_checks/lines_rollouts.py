"""Settings of the stages that let the model answer and learn from what its answers are worth: rlvr, ppo."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from lines import ROLLOUTS, moves, refuses
from tiny_run import Seen, loss_elsewhere

from trivium.kit.metrics import read_metrics
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.stages.parts.environments import EnvironmentWorker


def written(seen: Seen) -> list[dict[str, Any]]:
    """The answers that were written down for a person."""
    return read_metrics(seen.folder / "completions.jsonl")


def batches(seen: Seen) -> Any:
    """The rollouts, whatever kind they are."""
    return seen.trainer.batches


def column(seen: Seen, name: str, step: int = 0) -> np.ndarray:
    """A column of a step's batch at its learned tokens, answer by answer."""
    return np.concatenate([row.columns[name][row.weights > 0] for row in seen.batches[step]])


def answers(seen: Seen, step: int = 0) -> list[str]:
    """The answers of a step; a prompt that several share is none."""
    return [name for row in seen.batches[step] for name in row.ids if "/" in name]


def drawn_as_learned(seen: Seen) -> None:
    """The trainer's log-probabilities are those the engine drew from, under the same settings."""
    assert seen.column("sampling/sampling_logp_difference/mean")[0] < 1e-4


def away(seen: Seen, objective: Any = None, measure: str | None = None) -> float:
    """The first batch's loss under weights that have moved since the answers were drawn."""
    objective = objective or seen.trainer.objective
    if seen.trainer.objective.extra is not None:
        # The critic is one that the weights are placed in.
        objective = replace(objective, extra=seen.trainer.objective.extra)
    return loss_elsewhere(seen, objective, noise=0.5, measure=measure)


def objectives_differ(before: Seen, after: Seen) -> None:
    """The same answers of the same model cost something else."""
    assert away(before, after.trainer.objective) != pytest.approx(away(before), rel=1e-6)


# what is asked, and how it is answered


@moves("reward", ["mine.py:shortness"], kinds=ROLLOUTS)
def reward(before: Seen, after: Seen) -> None:
    assert "rewards/spread/mean" in before.log[0]
    assert {name for name in after.log[0] if name.startswith("rewards/")} == {
        "rewards/shortness/mean", "rewards/shortness/std"}  # fmt: skip


@moves("held_out_reward", "mine.py:shortness", kinds=["rlvr"])
def held_out_reward(before: Seen, after: Seen) -> None:
    """It is looked at, and the reward is what it was."""
    assert after.column("held_out_reward") == after.column("rewards/shortness/mean")
    assert after.column("reward")[0] == before.column("reward")[0]


@moves("prompts_per_step", 3, kinds=ROLLOUTS)
def prompts_per_step(before: Seen, after: Seen) -> None:
    assert {row["groups"] for row in after.log} == {3.0}
    assert 3.0 not in before.column("groups")


@moves("num_generations", 4, kinds=ROLLOUTS)
def num_generations(before: Seen, after: Seen) -> None:
    known = [name.partition("/")[0] for name in answers(after)]
    assert {known.count(name) for name in known} == {4}


@moves("epochs_per_rollout", 2, kinds=["rlvr"])
@moves("epochs_per_rollout", 2, kinds=["ppo"], both={"epochs_per_rollout": 1})
def epochs_per_rollout(before: Seen, after: Seen) -> None:
    assert (before.summary["rollouts"], after.summary["rollouts"]) == (2, 1)
    assert answers(after, 0) == answers(after, 1)


@moves("minibatches", 2, kinds=ROLLOUTS)
def minibatches(before: Seen, after: Seen) -> None:
    """The rollout's rows are divided between two steps."""
    assert after.summary["rollouts"] == 1
    assert not set(answers(after, 0)) & set(answers(after, 1))
    assert sorted(answers(after, 0) + answers(after, 1)) == sorted(answers(before, 0))


@moves("max_new_tokens", 3, kinds=ROLLOUTS)
def max_new_tokens(before: Seen, after: Seen) -> None:
    assert max(before.column("completions/max_length")) > 3
    assert max(after.column("completions/max_length")) == 3


@moves("temperature", 0.5, kinds=ROLLOUTS)
@moves("top_p", 0.5, kinds=["rlvr"])
@moves("top_k", 3, kinds=["rlvr"])
@moves("min_p", 0.5, kinds=["rlvr"])
def likelier_tokens(before: Seen, after: Seen) -> None:
    """Drawn among fewer, and learned under the same settings (L7)."""
    assert column(after, "sampled_logprob").mean() > column(before, "sampled_logprob").mean()
    drawn_as_learned(after)


@moves("prompt_template", "Q: {prompt} A:", kinds=[*ROLLOUTS, "compare"])
def prompt_template(before: Seen, after: Seen) -> None:
    lines = [*after.folder.glob("completions.jsonl"), *after.folder.glob("report/answers.jsonl")]
    asked = [row["prompt"] for path in lines for row in read_metrics(path)]
    assert asked
    assert all(text.startswith("Q: ") and text.endswith(" A:") for text in asked)


@moves("next_words", 2, kinds=["rlvr"], both={"data": "passages.jsonl"})
def next_words(before: Seen, after: Seen) -> None:
    """Texts are cut, and their next two words are a column."""
    assert {row["prompt"] for row in written(before)} == {"Say it."}
    for prompt in batches(after).prompts:
        text = prompt.columns["text"]
        assert text.startswith(prompt.content + " " + prompt.columns["continuation"])
        assert len(prompt.columns["continuation"].split()) == 2


@moves("stop", tuple("aeiou ,.0123456789"), kinds=ROLLOUTS)
def stop(before: Seen, after: Seen, value: tuple[str, ...]) -> None:
    ends = set(value)
    assert any(ends & set(row["completion"]) for row in written(before))
    assert not any(ends & set(row["completion"]) for row in written(after))


@moves("max_rows", 1, kinds=ROLLOUTS)
def max_rows(before: Seen, after: Seen) -> None:
    assert batches(before).worker.engine.max_rows > 1
    assert batches(after).worker.engine.max_rows == 1
    assert answers(before) == answers(after)


@moves("async_level", 1, kinds=ROLLOUTS, both={"steps": 2, "epochs_per_rollout": 1})
def async_level(before: Seen, after: Seen) -> None:
    """The second rollout is made with the weights of the first; its ratio is to these."""
    assert "staleness" not in before.log[0]
    assert after.column("staleness") == [0, 1]
    assert written(after)[0] == written(before)[0]


@moves("share_prompts", False, kinds=["rlvr"])
@moves("share_prompts", False, kinds=["ppo"], both={"num_generations": 3})
def share_prompts(before: Seen, after: Seen) -> None:
    assert after.losses == pytest.approx(before.losses, abs=1e-4)
    assert sum(map(len, after.batches[0])) > sum(map(len, before.batches[0]))


@moves("tools", ("calculator",), ("python",), ("sql",), kinds=["rlvr"])
def tools(before: Seen, after: Seen, value: tuple[str]) -> None:
    worker = batches(after).worker
    assert isinstance(worker, EnvironmentWorker)
    assert set(worker.make().tools) == set(value)  # type: ignore[attr-defined]


LETTERS = tuple("aeiou ,.0123456789")
TALKATIVE = {"stop": LETTERS, "max_new_tokens": 24}
GAME = {**TALKATIVE, "environment": "mine.py:Game"}


@moves("environment", "mine.py:Game", kinds=["rlvr"], both=TALKATIVE)
def environment(before: Seen, after: Seen) -> None:
    """It replies, and what it gives for an act, ten, is added to the reward."""
    assert isinstance(batches(after).worker, EnvironmentWorker)
    earned = [row["reward"] - row["rewards"]["spread"] for row in written(after)]
    assert max(earned) > 0
    assert all(one % 10 == 0 for one in earned)
    assert any("¶" in row["completion"] for row in written(after))


@moves("turns", 1, kinds=["rlvr"], both=GAME)
def turns(before: Seen, after: Seen) -> None:
    """Every act but the last has a reply."""

    def replies(seen: Seen) -> int:
        return max(row["completion"].count("¶") for row in written(seen))

    assert replies(before) > 1
    assert replies(after) <= 1


# what it is worth


@moves("algorithm", *(name for name in ALGORITHMS if name != "dapo"), kinds=["rlvr"])
def algorithm(before: Seen, after: Seen, value: str) -> None:
    """The advantages and the loss are this algorithm's; the formulas have tests of their own."""
    objective: Any = after.trainer.objective
    assert batches(after).algorithm is objective.algorithm is ALGORITHMS[value]
    same_answers = np.array_equal(column(before, "sampled_logprob"), column(after, "sampled_logprob"))
    same_loss = math.isclose(away(after), away(after, before.trainer.objective), rel_tol=1e-6)
    if same_answers and same_loss:
        assert not np.allclose(column(before, "advantage"), column(after, "advantage"))


@moves("algorithm", "dapo", kinds=["rlvr"], both={"algorithm": "grpo"})
def dapo(before: Seen, after: Seen) -> None:
    assert batches(after).algorithm is ALGORITHMS["dapo"]


@moves("kl.coefficient", 0.5, kinds=["rlvr"], both={"steps": 1})
def kl_in_the_loss(before: Seen, after: Seen) -> None:
    """So many times the mean divergence of a token."""
    apart = away(after, measure="kl")
    assert apart != pytest.approx(0, abs=1e-4)
    assert away(after) - away(after, before.trainer.objective) == pytest.approx(0.5 * apart, rel=1e-3)


KL = {"kl.coefficient": 0.5}
REFERENCE = {"learning_rate.from": 0.05}
moves("kl.estimator", "k1", "k2", kinds=["rlvr"], both=KL)(objectives_differ)
moves("kl.estimator", "k3", kinds=["rlvr"], both={**KL, "kl.estimator": "k1"})(objectives_differ)
moves("kl.unbiased", False, kinds=["rlvr"], both=KL)(objectives_differ)


@moves("kl.into", "reward", kinds=["rlvr"], both={**KL, **REFERENCE})
@moves("kl.into", "loss", kinds=["rlvr"], both={**KL, **REFERENCE, "kl.into": "reward"})
def kl_in_the_reward(before: Seen, after: Seen, value: str) -> None:
    in_loss, in_reward = (before, after) if value == "reward" else (after, before)
    assert "kl" in in_loss.log[1]
    assert "kl" not in in_reward.log[1]
    # In the first rollout the model is its reference; then it pays for what it moved.
    for row in written(in_reward):
        pays = row["reward"] != pytest.approx(row["rewards"]["spread"], abs=1e-4)
        assert pays == (row["step"] == 2)


for side, value in (("low", 0.02), ("high", 0.02), ("dual", 1.01)):
    moves(f"clip_ratio.{side}", value, kinds=["rlvr"])(objectives_differ)


@moves("entropy_bonus", 0.1, kinds=ROLLOUTS)
def entropy_bonus(before: Seen, after: Seen) -> None:
    """So many times the mean entropy is taken off."""
    name = "policy/entropy_avg" if after.stage.kind == "ppo" else "entropy"
    entropy = away(before, measure=name)
    assert entropy > 0.1
    assert away(before, after.trainer.objective) - away(before) == pytest.approx(-0.1 * entropy, rel=1e-3)


@moves("truncated", "mask", kinds=["rlvr"])
@moves("truncated", "keep", kinds=["rlvr"], both={"truncated": "penalise"})
def truncated(before: Seen, after: Seen, value: str) -> None:
    """An answer that is cut off has no learned token, or has them all."""
    masked = after if value == "mask" else None
    assert column(before, "advantage").size
    if masked is not None:
        assert sum(row.weights.sum() for row in masked.batches[0]) < sum(
            row.weights.sum() for row in before.batches[0]
        )
    else:
        assert all(row["reward"] <= 0 for row in written(before))
        assert any(row["reward"] > 0 for row in written(after))


@moves("truncated", "penalise", kinds=["rlvr"])
def penalised(before: Seen, after: Seen) -> None:
    assert any(row["reward"] > 0 for row in written(before))
    assert all(row["reward"] <= 0 for row in written(after) if is_cut(row))


def is_cut(row: dict[str, Any]) -> bool:
    return len(row["completion"]) >= 6


@moves("overlong_buffer", 4, kinds=["rlvr"])
def overlong_buffer(before: Seen, after: Seen) -> None:
    """At the limit the penalty is one."""
    cut = [row for row in written(after) if row["step"] == 1]
    assert cut
    assert any(row["reward"] == row["rewards"]["spread"] - 1 for row in cut)
    assert all(row["reward"] == row["rewards"]["spread"] for row in written(before))


@moves("dynamic_sampling_retries", 2, kinds=["rlvr"], both={"reward": ["mine.py:same"]})
def dynamic_sampling_retries(before: Seen, after: Seen) -> None:
    """Groups that are alike are asked for twice more."""
    assert before.column("groups") == [2.0, 2.0]
    assert after.column("groups") == [6.0, 6.0]


@moves("pass_rates.low", 0.5, kinds=["rlvr"], both={"threshold": 100.0, "prompts_per_step": 12, "steps": 3})
@moves("pass_rates.high", 0.5, kinds=["rlvr"], both={"threshold": -100.0, "prompts_per_step": 12, "steps": 3})
def pass_rates(before: Seen, after: Seen) -> None:
    """All problems lie outside after the first pass, so none is asked twice before all have been skipped."""
    assert batches(before).curriculum.visited == 36
    assert batches(after).curriculum.visited > 36


@moves("pass_rates.rest", 0, kinds=["rlvr"], both={
    "pass_rates.high": 0.5, "threshold": -100.0, "prompts_per_step": 12, "steps": 3})  # fmt: skip
def rest(before: Seen, after: Seen) -> None:
    """Who rests for fewer passes is passed over less often."""
    assert batches(after).curriculum.visited < batches(before).curriculum.visited


BOTH_REWARDS = {"reward": ["mine.py:spread", "mine.py:shortness"], "num_generations": 2}


@moves("normalise", "each", kinds=["rlvr"], both=BOTH_REWARDS)
@moves("normalise", "sum", kinds=["rlvr"], both={**BOTH_REWARDS, "normalise": "each"})
def normalise(before: Seen, after: Seen, value: str) -> None:
    """Each reward less its mean over its deviation within the group, then summed; or the plain sum."""
    each, plain = (after, before) if value == "each" else (before, after)
    for row in written(plain):
        assert row["reward"] == pytest.approx(sum(row["rewards"].values()))
    lines = written(each)
    for one, other in zip(lines[::2], lines[1::2], strict=True):
        assert one["problem"] == other["problem"]
        for mine, theirs in ((one, other), (other, one)):
            expected = 0.0
            for name, reward in mine["rewards"].items():
                values = np.array([reward, theirs["rewards"][name]])
                expected += (reward - values.mean()) / (values.std(ddof=1) + 1e-4)
            assert mine["reward"] == pytest.approx(expected, rel=1e-6)


@moves("threshold", 3.0, kinds=["rlvr"], both={"num_generations": 2, "prompts_per_step": 2, "steps": 1})
def threshold(before: Seen, after: Seen) -> None:
    rewards = [row["reward"] for row in written(after)]
    assert after.column("pass@1") == [pytest.approx(np.mean([reward >= 3 for reward in rewards]))]
    assert before.column("pass@1") == [pytest.approx(np.mean([reward >= 1 for reward in rewards]))]


@moves("correction", "token", "sequence", kinds=["rlvr"], both={"correction_cap": 0.5})
def correction(before: Seen, after: Seen) -> None:
    """Ratios near one are weighed by the cap, where it lies below one."""
    assert set(column(before, "correction").tolist()) == {1.0}
    assert set(column(after, "correction").tolist()) == {0.5}


@moves("correction", "none", kinds=["rlvr"], both={"correction_cap": 0.5, "correction": "token"})
def no_correction(before: Seen, after: Seen) -> None:
    assert set(column(after, "correction").tolist()) == {1.0}


@moves("correction_cap", 0.5, kinds=["rlvr"], both={"correction": "token"})
def correction_cap(before: Seen, after: Seen) -> None:
    assert column(before, "correction").min() > 0.99
    assert set(column(after, "correction").tolist()) == {0.5}


# ppo


def advantages(seen: Seen) -> np.ndarray:
    return column(seen, "advantage")


RAW = {"whiten_advantages": False}


@moves("estimator", "rloo", kinds=["ppo"], both={"num_generations": 2, **RAW})
def leave_one_out(before: Seen, after: Seen) -> None:
    """Two answers to a prompt have opposite advantages, the same at every token, and no critic."""
    values = advantages(after)
    halves = np.unique(values.round(4)).tolist()
    assert np.allclose(sorted(halves), sorted(-one for one in halves), atol=1e-3)
    assert after.trainer.objective.extra is None
    assert before.trainer.objective.extra is not None


@moves("estimator", "reinforce++", kinds=["ppo"], both={**RAW, "kl.coefficient": 0.0})
def reinforce(before: Seen, after: Seen) -> None:
    """Undiscounted and without a penalty, every token of an answer is worth its score."""
    scores = {round(row["reward"], 4) for row in written(after) if row["step"] == 1}
    assert set(advantages(after).round(4).tolist()) == scores


@moves("estimator", "gae", kinds=["ppo"], both={**RAW, "estimator": "reinforce++"})
def generalised(before: Seen, after: Seen) -> None:
    assert before.trainer.objective.extra is None
    assert after.trainer.objective.extra is not None


PENALTY = {"learning_rate.from": 0.05, "steps": 2, "kl.coefficient": 0.5}


@moves("kl.coefficient", 0.3, kinds=["ppo"], both={"steps": 2, "learning_rate.from": 0.05})
def penalty(before: Seen, after: Seen) -> None:
    """What is paid for a divergence is its price times the divergence."""
    assert before.column("kl_coefficient") == [0.05, 0.05]
    row = after.log[1]
    assert abs(row["objective/kl"]) > 1e-6
    assert row["objective/non_score_reward"] == pytest.approx(-0.3 * row["objective/kl"], rel=1e-4)


@moves("kl.estimator", "k2", "k3", kinds=["ppo"], both=PENALTY)
@moves("kl.estimator", "k1", kinds=["ppo"], both={**PENALTY, "kl.estimator": "k2"})
def estimator(before: Seen, after: Seen, value: str) -> None:
    """Of k1 alone the sum over an answer is the divergence; the others are never negative."""
    plain, squared = (after, before) if value == "k1" else (before, after)
    row = plain.log[1]
    assert row["objective/non_score_reward"] == pytest.approx(-0.5 * row["objective/kl"], rel=1e-4)
    assert squared.log[1]["objective/non_score_reward"] <= 0
    assert squared.log[1]["objective/non_score_reward"] != pytest.approx(row["objective/non_score_reward"])


@moves("kl.target", 5.0, kinds=["ppo"], both={"kl.horizon": 10.0})
def target(before: Seen, after: Seen) -> None:
    """Far below the target the price falls, by a fifth of the answers over the horizon at most."""
    assert before.column("kl_coefficient") == [0.05, 0.05]
    assert after.column("kl_coefficient") == pytest.approx([0.05, 0.05 * (1 - 0.2 * 4 / 10)])


@moves("kl.horizon", 20.0, kinds=["ppo"], both={"kl.target": 5.0})
def horizon(before: Seen, after: Seen) -> None:
    assert before.column("kl_coefficient") == pytest.approx([0.05, 0.05 * (1 - 0.2 * 4 / 10_000)])
    assert after.column("kl_coefficient") == pytest.approx([0.05, 0.05 * (1 - 0.2 * 4 / 20)])


moves("clip_ratio", 0.01, kinds=["ppo"])(objectives_differ)
moves("clip_value", 1e-4, kinds=["ppo"])(objectives_differ)


@moves("value_coefficient", 0.7, kinds=["ppo"])
def value_coefficient(before: Seen, after: Seen) -> None:
    error = away(before, measure="loss/value_avg")
    assert error > 1e-3
    difference = away(before, after.trainer.objective) - away(before)
    assert difference == pytest.approx((0.7 - 0.1) * error, rel=1e-3)


ALONE = {**RAW, "kl.coefficient": 0.0, "estimator": "reinforce++"}


@moves("discount", 0.5, kinds=["ppo"], both=ALONE)
def discount(before: Seen, after: Seen) -> None:
    """A token is worth what comes after it, less by a half for every token in between."""
    values, worth = advantages(after), advantages(before)
    ratios = np.abs(values[worth != 0] / worth[worth != 0])
    powers = np.log2(ratios)
    assert np.allclose(powers, powers.round(), atol=1e-4)
    assert powers.max() == pytest.approx(0, abs=1e-4)
    assert powers.min() <= -2


@moves("decay", 0.0, kinds=["ppo"], both={**RAW, "kl.coefficient": 0.0})
def decay(before: Seen, after: Seen) -> None:
    """Looking one token ahead, only the last token of an answer knows of its score."""
    values = advantages(after)
    assert np.count_nonzero(np.abs(values) > 1e-6) <= 4
    assert np.count_nonzero(np.abs(advantages(before)) > 1e-6) > 4


@moves("whiten_advantages", False, kinds=["ppo"])
def whiten_advantages(before: Seen, after: Seen) -> None:
    values = advantages(before)
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std(ddof=1) == pytest.approx(1, abs=1e-3)
    assert abs(advantages(after).mean()) > 1e-2


@moves("whiten_rewards", True, kinds=["ppo"], both=ALONE)
def whiten_rewards(before: Seen, after: Seen) -> None:
    """With one reward at the end of each answer, all rewards have a deviation of one and their own mean."""
    scores, found = advantages(before), advantages(after)
    size = 6
    rewards = np.zeros(len(scores))
    rewards[size - 1 :: size] = scores[size - 1 :: size]
    if len(scores) == 4 * size:
        scaled = (rewards - rewards.mean()) / np.sqrt(rewards.var(ddof=1) + 1e-8) + rewards.mean()
        assert found[size - 1] == pytest.approx(scaled[size - 1], rel=1e-4)
    assert not np.allclose(scores, found)


@moves("missing_eos_penalty", 2.0, kinds=["ppo"], both={"normalise": "none"})
def missing_eos_penalty(before: Seen, after: Seen) -> None:
    """Answers cut off at the limit score so much less."""
    cut = 4 - after.log[0]["val/num_eos_tokens"]
    assert cut > 0
    difference = after.log[0]["objective/scores"] - before.log[0]["objective/scores"]
    assert difference == pytest.approx(-2.0 * cut / 4)


@moves("normalise", "batch", "running", kinds=["ppo"])
@moves("normalise", "none", kinds=["ppo"], both={"normalise": "batch"})
def scores_to_scale(before: Seen, after: Seen, value: str) -> None:
    """In the first rollout, scores have the mean zero either way."""
    plain, scaled = (after, before) if value == "none" else (before, after)
    assert abs(plain.log[0]["objective/scores"]) > 0.1
    assert scaled.log[0]["objective/scores"] == pytest.approx(0, abs=1e-6)


@moves("normalise", "running", kinds=["ppo"], both={"normalise": "batch", "steps": 3})
def running_scale(before: Seen, after: Seen) -> None:
    """Over all rollouts so far, later ones need not have the mean zero."""
    assert before.column("objective/scores") == pytest.approx([0] * 3, abs=1e-6)
    assert after.column("objective/scores") != pytest.approx([0] * 3, abs=1e-3)


@moves("clip_score", 0.5, kinds=["ppo"])
def clip_score(before: Seen, after: Seen) -> None:
    assert before.log[0]["objective/scores"] > 0.5
    assert abs(after.log[0]["objective/scores"]) <= 0.5


# process rewards and forks

STEPWISE = {"reward": ["mine.py:spread", {"model": "prm", "weight": 0.5}]}


@moves("process_rewards", "sum", "outcome", kinds=["rlvr"], both=STEPWISE)
def process_rewards(before: Seen, after: Seen, value: str) -> None:
    """The same completions; with `outcome` all tokens of one have the same advantage."""
    assert answers(before) == answers(after)
    assert not np.array_equal(column(before, "advantage"), column(after, "advantage"))
    counts = {name: len(advantages_of(seen)) for name, seen in (("before", before), ("after", after))}
    assert counts["before"] > len(answers(before))
    assert (counts["after"] == len(answers(after))) == (value == "outcome")


def advantages_of(seen: Seen) -> set[tuple[str, float]]:
    """Every advantage that a token of a completion has."""
    found = set()
    for row in seen.batches[0]:
        owners = np.repeat(np.arange(len(row.lengths)), row.lengths)[row.weights > 0]
        values = row.columns["advantage"][row.weights > 0].tolist()
        found |= {(row.ids[owner], value) for owner, value in zip(owners, values, strict=True)}
    return found


FORKED = {"num_generations": 4, "forks": {"below": 0.9}}


@moves("forks", {"branches": 2, "below": 0.9}, kinds=["rlvr"], both={"num_generations": 4})
@moves("forks.at", "step", kinds=["rlvr"], both={**FORKED, "forks": {"below": 0.9, "separator": "1"}})
@moves("forks.below", 0.005, kinds=["rlvr"], both=FORKED)
@moves("forks.branches", 4, kinds=["rlvr"], both=FORKED)
@moves("forks.within", 1, kinds=["rlvr"], both={**FORKED, "forks": {"at": "step", "separator": " "}})
@moves("forks.separator", "1", kinds=["rlvr"], both={**FORKED, "forks": {"at": "step", "separator": " "}})
def forks(before: Seen, after: Seen) -> None:
    """Other completions share other beginnings, and what they share is drawn once."""
    for seen in (before, after):
        drawn_as_learned(seen)
    assert written(before) != written(after)
    assert after.column("completions/drawn_tokens") != before.column("completions/drawn_tokens")


refuses("forks.branches", 3, "no multiple", kinds=["rlvr"], both=FORKED)
