"""Loss and gradient beside TRL's GRPOTrainer, for every loss it has, away from where all of them agree."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_rlvr import rollouts
from tuning import own, save, small_model

from trivium.data.rows import collate
from trivium.learn.objectives.policy import PolicyGradient
from trivium.learn.objectives.policy_losses import ALGORITHMS
from trivium.model.folder import stored_form
from trivium.model.transformer import Transformer
from trivium.model.weights import stored_tensors
from trivium.stages.parts.rollouts import RolloutBatches

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_DISABLED", "true")
datasets = pytest.importorskip("datasets")
pytest.importorskip("trl")

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {"scale_rewards": "none"},
    "dapo": {"epsilon_high": 0.28},
    "gspo": {
        "loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4,
    },
    "luspo": {"importance_sampling_level": "sequence"},
    "cispo": {"epsilon_high": 5.0},
    "sapo": {},
    "vespo": {},
}  # fmt: skip


def graded(prompts: list, completions: list, **columns: Any) -> list[float]:
    return [len(completion) % 5 / 4 for completion in completions]


def moved(model: Transformer) -> None:
    """Weights some steps after the rollout, so that ratios differ from one and clips bite."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def trl_trainer(folder: Path, name: str, **settings: Any) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=4, num_generations=4, use_cpu=True,
        bf16=False, report_to=[], gradient_checkpointing=False, max_completion_length=12,
        **{"loss_type": name, **LOSSES[name], **settings},
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "the river"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def padded(feed: RolloutBatches) -> dict[str, torch.Tensor]:
    """The feed's answers as TRL lays them out: prompts padded on the left, answers on the right."""
    rows = feed.rows(0)
    found = []
    for row in rows:
        (name,) = {identity.partition("/")[0] for identity in row.ids}
        prompt = next(one.ids for one in feed.prompts if one.id == name)
        ends = np.cumsum(row.lengths)
        for index, (end, length) in enumerate(zip(ends, row.lengths, strict=True)):
            if "/" not in row.ids[index]:
                continue
            piece = slice(end - length, end - 1)
            kept = np.flatnonzero(row.targets[piece] >= 0)[-1:] + 1
            answer = row.tokens[end - length : end]
            count = length - (1 if row.facts["back"][index] else len(prompt))
            columns = {name: column[piece][-count:] for name, column in row.columns.items()}
            learned = row.weights[piece][-count:] > 0
            assert kept.size
            found.append((prompt, answer[-count:], learned, columns))
    longest, head = max(len(one[1]) for one in found), max(len(one[0]) for one in found)

    def right(values: list, dtype: torch.dtype) -> torch.Tensor:
        return torch.stack(
            [
                torch.tensor([*map(float, value), *[0.0] * (longest - len(value))]).to(dtype)
                for value in values
            ]
        )

    result = {
        "prompt_ids": torch.tensor([[0] * (head - len(one[0])) + one[0] for one in found]),
        "prompt_mask": torch.tensor([[0] * (head - len(one[0])) + [1] * len(one[0]) for one in found]),
        "completion_ids": right([one[1] for one in found], torch.long),
        "completion_mask": right([np.ones(len(one[1])) for one in found], torch.long),
        "tool_mask": right([one[2] for one in found], torch.long),
        "advantages": torch.tensor([float(one[3]["advantage"][0]) for one in found]),
        "old_per_token_logps": right([one[3]["old_logprob"] for one in found], torch.float32),
    }
    if "reference" in found[0][3]:
        result["ref_per_token_logps"] = right([one[3]["reference"] for one in found], torch.float32)
    result["num_items_in_batch"] = (result["completion_mask"] * result["tool_mask"]).sum()
    return result


@pytest.mark.slow
@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_those_of_trl(tmp_path, name, kl, monkeypatch):
    monkeypatch.setattr(RolloutBatches, "_teaches", lambda self, group, index: True)
    model, tokenizer = small_model(own()), own()
    reference = small_model(own(), 4).requires_grad_(False) if kl else None
    feed = rollouts(model, function=graded, algorithm=name, reference=reference, kl_in_loss=kl > 0)
    drawn = feed.worker.generate

    def with_a_tool(*arguments: Any) -> Any:
        generated = drawn(*arguments)
        for answers in generated:
            answers[1].learned[2:4] = [False] * len(answers[1].learned[2:4])
        return generated

    monkeypatch.setattr(feed.worker, "generate", with_a_tool)
    inputs = padded(feed)
    rows = feed.rows(0)
    moved(model)
    folder = save(tmp_path / "model", model, tokenizer)
    trainer = trl_trainer(folder, name, beta=kl)
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()

    algorithm = ALGORITHMS[name]
    objective = PolicyGradient(algorithm, algorithm.numbers, kl=kl, unbiased=True)
    found = objective.loss(model, collate(rows))
    loss = found.sum / objective.weight(rows)
    loss.backward()
    assert_same(model, loss, expected, trainer, found.metrics)


def assert_same(model: Transformer, loss: Any, expected: Any, trainer: Any, found: Any) -> None:
    """The same loss, gradient and measures; both losses have been differentiated."""
    assert loss.item() == pytest.approx(expected.item(), abs=2e-5)
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    theirs = dict(trainer.model.named_parameters())
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.values())
    assert largest > 1e-3
    for stored in stored_tensors(model.config):
        torch.testing.assert_close(
            stored_form(stored, gradients), theirs[stored.name].grad, atol=2e-5 * largest, rtol=1e-3
        )
    metrics = trainer._metrics["train"]
    names = set(metrics) & set(found)
    assert {"entropy", *(metric for metric in metrics if metric.startswith("clip_ratio/"))} <= names
    for metric in names:
        total, weight = found[metric]
        assert float(total) / float(weight) == pytest.approx(metrics[metric][0], abs=2e-5), metric


@pytest.mark.slow
def test_leave_one_out_is_that_of_trls_rloo_trainer(tmp_path, monkeypatch):
    """One ratio for the whole answer, clipped, with every sibling's mean as the baseline."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import RLOOConfig, RLOOTrainer

    monkeypatch.setattr(RolloutBatches, "_teaches", lambda self, group, index: True)
    model = small_model(own())
    feed = rollouts(model, function=graded, algorithm="rloo")
    inputs, rows = padded(feed), feed.rows(0)
    inputs["old_logps"] = (inputs["old_per_token_logps"] * inputs["completion_mask"]).sum(1)
    moved(model)
    folder = save(tmp_path / "model", model, own())
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=RLOOConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=4, num_generations=4, use_cpu=True,
            bf16=False, report_to=[], gradient_checkpointing=False, max_completion_length=12,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "the river"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.model.train()
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    objective = PolicyGradient(ALGORITHMS["rloo"], ALGORITHMS["rloo"].numbers)
    found = objective.loss(model, collate(rows))
    loss = found.sum / objective.weight(rows)
    loss.backward()
    assert_same(model, loss, expected, trainer, found.metrics)
