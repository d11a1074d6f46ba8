"""Rollouts that are made one ahead of training: by which weights, corrected how, resumed bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import ends_identical_when_killed, ends_identical_when_killed_while_sampling
from small import small_trainer
from test_parallel import meet, run_until, together
from test_ppo import rollouts as ppo_rollouts
from test_rlvr import rollouts
from tuning import own, small_model

from trivium.data.rows import collate
from trivium.kit import processes
from trivium.kit.files import load_tensors, save_tensors
from trivium.kit.metrics import read_metrics
from trivium.learn.objectives.policy import PolicyGradient, token_outputs
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.stages.rlvr import Rlvr

COLUMNS = ("advantage", "old_logprob", "sampled_logprob", "correction")


def trainer_of(folder: Path, model: Any, **changes: Any) -> Any:
    feed = rollouts(model, **{"steps": 8, "minibatches": 2, "async_level": 1, **changes})
    algorithm = ALGORITHMS["dapo"]
    return small_trainer(
        folder, model=model, batches=feed, objective=PolicyGradient(algorithm, algorithm.numbers),
        checkpoint={"every_steps": 1}, optimiser="adamw",
    )  # fmt: skip


def same(one: list[Any], other: list[Any], names: tuple[str, ...] = COLUMNS) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(mine.tokens, theirs.tokens)
        and np.array_equal(mine.weights, theirs.weights)
        and all(np.array_equal(mine.columns[name], theirs.columns[name]) for name in names)
        for mine, theirs in zip(one, other, strict=True)
    )


def move(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)


@pytest.mark.parametrize("correction", ["none", "token"])
def test_without_learning_the_numbers_are_the_synchronous_ones(tmp_path, correction, monkeypatch):
    logs = []
    for level in (0, 1):
        folder = tmp_path / str(level)
        trainer = trainer_of(folder, small_model(own()), async_level=level, correction=correction)
        monkeypatch.setattr(trainer.optimiser, "step", lambda factor: None)
        trainer.run()
        logs.append(read_metrics(folder / "metrics.jsonl"))
    for one, other in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "reward", "entropy", "tokens", "val/ratio"):
            assert one[name] == other[name]
    late = [row for row in logs[1] if "staleness/kl" in row]
    assert late
    assert all(row["staleness/ratio"] == pytest.approx(1, abs=1e-4) for row in late)


def test_staleness_is_0_at_the_first_step_and_1_from_then_on(tmp_path):
    trainer_of(tmp_path, small_model(own()), minibatches=1, steps=5).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1, 1]
    assert "staleness/kl" not in rows[0]
    assert "sampling/sampling_logp_difference/mean" in rows[0]
    for row in rows[1:]:
        assert row["staleness/kl"] > 1e-6
        assert row["staleness/ratio"] != 1
        assert "sampling/sampling_logp_difference/mean" not in row


def test_of_several_steps_a_rollout_each_is_a_step_older(tmp_path):
    trainer_of(tmp_path, small_model(own()), steps=6).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 2, 3, 2, 3]
    assert ["staleness/kl" in row for row in rows] == [False, False, True, False, True, False]


def test_answers_are_drawn_from_the_weights_before_the_update():
    model, still = small_model(own()), rollouts(small_model(own()))
    feed = rollouts(model, async_level=1)
    assert same(feed.rows(0), still.rows(0))
    move(model)
    assert same(feed.rows(1), still.rows(1))
    # The third was made when the second was taken up, with the weights as they were by then.
    assert not same(feed.rows(2), still.rows(2))


def test_nothing_is_made_that_no_step_learns_from(monkeypatch):
    feed = rollouts(small_model(own()), async_level=1, steps=3, minibatches=2)
    made = []
    roll_out = feed.roll_out
    monkeypatch.setattr(feed, "roll_out", lambda rollout: made.append(rollout) or roll_out(rollout))
    for step in range(3):
        feed.rows(step)
    assert made == [0, 1]


def test_the_ratio_is_to_the_policy_that_generated():
    model = small_model(own())
    feed = rollouts(model, async_level=1)
    feed.rows(0)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    move(model)
    batch = collate(feed.rows(1))
    learned = batch.weights > 0
    old, now = batch.columns["old_logprob"][learned], token_outputs(model, batch).logprobs
    algorithm = ALGORITHMS["dapo"]
    ratio = (now - old).exp().detach()
    loss = PolicyGradient(algorithm, algorithm.numbers).loss(model, batch)
    total, weight = loss.metrics["staleness/ratio"]
    assert float(total / weight) == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert float(loss.metrics["val/ratio"][0] / weight) == pytest.approx(float(ratio.mean()), rel=1e-5)
    assert (ratio - 1).abs().max() > 0.1
    model.load_state_dict(before)
    torch.testing.assert_close(token_outputs(model, batch).logprobs, old, atol=1e-4, rtol=0)


def test_a_correction_weighs_by_the_policy_that_begins_to_learn():
    """The old log-probabilities are those at the first step, and the generating policy's ratio is capped."""
    model = small_model(own())
    feed = rollouts(model, async_level=1, correction="token", correction_cap=1.5)
    feed.rows(0)
    move(model)
    batch = collate(feed.rows(1))
    learned = batch.weights > 0
    columns = {name: one[learned] for name, one in batch.columns.items()}
    now = token_outputs(model, batch).logprobs
    torch.testing.assert_close(columns["old_logprob"], now, atol=1e-5, rtol=0)
    apart = (now - columns["sampled_logprob"]).exp()
    torch.testing.assert_close(columns["correction"], apart.clamp(max=1.5), atol=1e-4, rtol=0)
    assert apart.max() > 1.5


def test_a_loss_without_a_ratio_is_corrected():
    common = {"kind": "rlvr", "from": "base", "data": "./problems.jsonl", "reward": ["math"]}
    assert Rlvr(**common, algorithm="reinforce", async_level=1).correction == "token"
    assert Rlvr(**common, algorithm="reinforce", async_level=1, correction="none").correction == "none"
    assert Rlvr(**common, algorithm="reinforce").correction == "none"
    assert Rlvr(**common, algorithm="dapo", async_level=1).correction == "none"


def test_the_fingerprint_counts_how_far_ahead_it_is_and_stays_without():
    model = small_model(own())
    assert rollouts(model, async_level=1).fingerprint != rollouts(model).fingerprint
    assert "async_level" not in repr(rollouts(model).settings)


def test_ppos_rollout_ahead_is_restored_with_values_and_the_coefficient():
    model = small_model(own())
    feed, again = (ppo_rollouts(model, async_level=1, target=0.1) for _ in range(2))
    feed.rows(0)
    again.restore(*feed.state())
    names = (*COLUMNS, "value", "return")
    for step in range(4):
        assert same(feed.rows(step), again.rows(step), names)
        assert feed.controller.coefficient == again.controller.coefficient
    assert again.ahead is not None
    assert set(names) <= set(again.ahead[1][0].columns)


def until_the_end(folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    model = small_model(own(), seed)
    trainer_of(Path(folder), model, correction="token").run()
    save_tensors(Path(folder) / "end.safetensors", dict(model.named_parameters()))


def test_killed_with_a_rollout_ahead_it_ends_bit_identical(tmp_path):
    ends_identical_when_killed(until_the_end, tmp_path)


def test_killed_while_a_rollout_ahead_is_drawn_it_ends_bit_identical(tmp_path):
    ends_identical_when_killed_while_sampling(until_the_end, tmp_path, second=3)


def work(rank: int, size: int, port: int, folder: str, cut: int | None) -> None:
    meet(rank, size, port)
    model = small_model(own())
    if run_until(trainer_of(Path(folder), model), cut) and rank == 0:
        save_tensors(Path(folder) / "end.safetensors", dict(model.named_parameters()))
    processes.stop()


def test_two_processes_go_on_bit_for_bit(tmp_path):
    for folder, cuts in ((tmp_path / "whole", [None]), (tmp_path / "cut", [3, None])):
        for cut in cuts:
            together(work, 2, str(folder), cut)
    whole, again = (load_tensors(tmp_path / name / "end.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one, again[name]) for name, one in whole.items())
