"""Preferences, value heads and RL go through the one trainer, and go on bit for bit amid a rollout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from designs import ToyPairs, ToyPolicy, ToyPreference, ToyRollouts, ToyValue
from small import SmallBatches, assert_identical, small_model, small_trainer, weights_of

from trivium.kit.metrics import read_metrics
from trivium.learn.trainer import Trainer


def build(design: str, folder: Path, seed: int = 0, **settings) -> Trainer:
    model = small_model(seed)
    batches, objective = {
        "policy": lambda: (ToyRollouts(model), ToyPolicy()),
        "pairs": lambda: (ToyPairs(), ToyPreference()),
        "value": lambda: (SmallBatches(), ToyValue(model.config.width)),
    }[design]()
    return small_trainer(folder, model=model, batches=batches, objective=objective, **settings)


def everything(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.named.items()}


@pytest.mark.quick_cases(3)
@pytest.mark.parametrize("design", ["policy", "pairs", "value"])
@pytest.mark.parametrize("cut", [3, 4])
def test_every_design_goes_on_bit_for_bit(tmp_path: Path, design: str, cut: int) -> None:
    """After three steps the toy policy is in the middle of a rollout: its second step waits."""
    straight = build(design, tmp_path / "straight")
    straight.run()
    halved = build(design, tmp_path / "halved")
    for _ in range(cut):
        row = halved._one_step()
        halved._after_step(row, 0)
    halved._save(wait=True)
    again = build(design, tmp_path / "halved", seed=7)
    again.run()
    assert_identical(everything(straight), everything(again))
    if design == "policy":
        assert again.batches.made == straight.batches.made == 4, "no rollout was made twice"


@pytest.mark.parametrize("design", ["policy", "pairs", "value"])
def test_every_design_is_free_of_the_pass_size(tmp_path: Path, design: str) -> None:
    """L3 for objectives whose weight counts pairs or tokens: one step, whole and in pieces."""
    whole = build(design, tmp_path / "whole", micro_batch=10_000)
    pieces = build(design, tmp_path / "pieces", micro_batch=1)
    for trainer in (whole, pieces):
        trainer._one_step()
    for name, value in everything(whole).items():
        torch.testing.assert_close(value, everything(pieces)[name], atol=1e-4, rtol=0, msg=name)


def test_reward_rises_under_the_toy_policy(tmp_path: Path) -> None:
    model = small_model()
    batches = ToyRollouts(model, steps=60, answers=16)
    before = float(batches.sample(999)["rewards"].mean())
    small_trainer(tmp_path, model=model, batches=batches, objective=ToyPolicy()).run()
    assert float(batches.sample(999)["rewards"].mean()) > before + 0.2


def test_the_second_step_of_a_rollout_is_off_policy_and_the_first_is_not(tmp_path: Path) -> None:
    """L7 in the small: at the first step the ratio is one."""
    build("policy", tmp_path).run()
    off = [row["ratio_off"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert max(off[0::2]) < 1e-5
    assert min(off[1::2]) > 1e-4


def test_a_value_head_is_trained_and_saved_with_the_model(tmp_path: Path) -> None:
    trainer = build("value", tmp_path, checkpoint={"every_steps": 4})
    before = weights_of(trainer.objective.extra)
    trainer.run()
    assert not torch.equal(before["weight"], trainer.objective.extra.weight)
    saved = trainer.checkpoints.latest()
    assert saved is not None
    assert "weights.extra.weight" in saved.tensors
    assert "optimiser.first.extra.weight" in saved.tensors
