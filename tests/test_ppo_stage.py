"""RLHF as a stage: killed and resumed exactly, run from a recipe, its reward model in other stages too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from killing import ends_identical_when_killed, ends_identical_when_killed_while_sampling
from small import small_trainer, weights_of
from test_ppo import rollouts
from tuning import own, save, small_model, write_rows

import trivium
from trivium.kit.errors import TriviumError
from trivium.kit.files import save_tensors
from trivium.learn.objectives.advantages import AdvantageSettings
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import PPO_ALGORITHMS


def trainer_of(folder: Path, seed: int = 0) -> Any:
    model = small_model(own(), seed)
    advantages, algorithm = AdvantageSettings(normalise="running"), PPO_ALGORITHMS["gae"]
    feed = rollouts(model, minibatches=2, epochs_per_rollout=2, target=0.5, advantages=advantages)
    return small_trainer(
        folder, model=model, batches=feed,
        objective=PolicyGradient(algorithm, algorithm.numbers, extra=feed.critic, prune=True),
        checkpoint={"every_steps": 1}, optimiser="adamw",
    )  # fmt: skip


def until_the_end(folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    trainer = trainer_of(Path(folder), seed)
    trainer.run()
    save_tensors(
        Path(folder) / "end.safetensors",
        {**weights_of(trainer.model), "critic": trainer.objective.extra.score.weight},
    )


@pytest.mark.slow
def test_killed_in_the_middle_of_a_rollout_it_ends_bit_identical(tmp_path):
    """L1: weights, critic, penalty and what is sampled after the resume."""
    log = ends_identical_when_killed(until_the_end, tmp_path)
    assert log[-1]["kl_coefficient"] != 0.1


@pytest.mark.slow
def test_killed_while_answers_are_drawn_it_ends_bit_identical(tmp_path):
    ends_identical_when_killed_while_sampling(until_the_end, tmp_path)


PAIRS = [
    {"prompt": f"{asked} the", "chosen": " river rises", "rejected": " 12 sacks"}
    for asked in ("in", "and", "or", "for", "by", "with", "near", "at")
]


def recipe(tmp_path: Path, ppo: str) -> Path:
    save(tmp_path / "base", small_model(own()), own())
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": one["prompt"]} for one in PAIRS])
    (tmp_path / "mine.py").write_text(
        "def longer(prompts, completions, **columns):\n    return [float(len(one)) for one in completions]\n"
    )
    path = tmp_path / "rlhf.yaml"
    path.write_text(
        "name: rlhf\nstages:\n"
        "  rm: {kind: reward, from: ./base, data: ./pairs.jsonl, pairs: 4, steps: 4}\n"
        "  ppo: {kind: ppo, from: ./base, data: ./prompts.jsonl, reward: [{model: rm}, "
        "{name: 'mine.py:longer', weight: 0}], prompts: 4, passes: 2, max_new_tokens: 12, sycophancy: 2, "
        f"{ppo}}}\n"
    )
    return path


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        # 0.6 epochs of 8 prompts are 2 rollouts of 4, each learnt from twice in 2 parts.
        ("epochs: 0.6, parts: 2", 8),
        ("steps: 2, estimator: rloo, group: 2", 2),
        ("steps: 2, adapter: {rank: 2}", 2),
    ],
)
def test_a_stage_runs_from_a_recipe_and_logs_under_trls_names(tmp_path, settings, steps):
    run = trivium.run(recipe(tmp_path, settings), runs=tmp_path / "runs")
    rows = [row for row in run["ppo"].metrics if "step" in row]
    assert len(rows) == steps
    assert {
        "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
        "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
        "loss/policy_avg", "val/ratio", "val/num_eos_tokens", "rewards/rm/mean", "rewards/longer/mean",
    } <= set(rows[0])  # fmt: skip
    assert ("loss/value_avg" in rows[0]) == ("rloo" not in settings)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert rows[0]["objective/scores"] == pytest.approx(rows[0]["rewards/rm/mean"], abs=1e-6)
    summary = run["ppo"].summary
    assert summary["curve"][0]["step"] == 1
    assert {"objective/kl", "rewards/longer/mean"} <= set(summary["curve"][0])
    assert "sycophancy" in summary
    assert run["ppo"].model() is not None


def test_a_part_that_is_trained_whole_is_compared_with_the_parents(tmp_path):
    """An adapter too weak to change anything beside a head that learns: all divergence is the head's."""
    settings = "steps: 4, learning_rate: 0.1, adapter: {rank: 1, alpha: 1e-9, train: [head]}"
    run = trivium.run(recipe(tmp_path, settings), runs=tmp_path / "runs")
    apart = [row["objective/kl"] for row in run["ppo"].metrics if "objective/kl" in row]
    assert apart[0] == pytest.approx(0, abs=1e-4)
    assert abs(apart[-1]) > 1e-2


def test_another_reward_model_is_another_stage(tmp_path):
    path = recipe(tmp_path, "steps: 2")
    from trivium.recipe.graph import build
    from trivium.recipe.schema import load

    before = build(load(path))["ppo"].fingerprint
    assert build(load(path, ["stages.rm.steps=5"]))["ppo"].fingerprint != before
    assert build(load(path))["ppo"].fingerprint == before
    with pytest.raises(TriviumError, match="makes a reward model"):
        build(load(path, ["stages.ppo.from=rm"]))
    with pytest.raises(TriviumError, match="num_generations"):
        load(path, ["stages.ppo.estimator=rloo"])


def test_a_reward_stage_rewards_rlvr_as_well(tmp_path):
    path = recipe(tmp_path, "steps: 2")
    path.write_text(
        path.read_text() + "  rl: {kind: rlvr, from: ./base, data: ./prompts.jsonl, reward: [{model: rm}, "
        "{name: random, weight: 0.1}], steps: 1, prompts: 2, group: 2, max_new_tokens: 6}\n"
    )
    row = trivium.run(path, runs=tmp_path / "runs", only=["rl"])["rl"].metrics[-1]
    expected = row["rewards/rm/mean"] + 0.1 * row["rewards/random/mean"]
    assert row["reward"] == pytest.approx(expected, abs=1e-6)
