"""Rounding felt in training acts in every stage that trains, and no stage trains a rounded matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppo_stage import PAIRS
from test_sft import CHATS
from test_tokens import own
from tuning import save, small_model, write_rows

import trivium
from trivium.kit.errors import TriviumError
from trivium.model.folder import load_model
from trivium.model.lora import adaptable
from trivium.model.quantize import quantise, quantised_as

pytest.importorskip("torchao")
ASKED = "data: ./prompts.jsonl, reward: ['mine.py:even'], prompts: 4, max_new_tokens: 12"
STAGES = {
    "midtrain": "data: ./texts.jsonl, batch: 256, context: 64, learning_rate: 0.002",
    "sft": "data: ./chats.jsonl, context: 128, batch: 512",
    "preference": "data: ./pairs.jsonl, pairs: 4, loss: simpo, sycophancy: 0",
    "reward": "data: ./pairs.jsonl, pairs: 4",
    "rlvr": f"{ASKED}, group: 4",
    "ppo": f"{ASKED}, sycophancy: 0",
}
PRETRAIN = "data: ./texts.jsonl, tokenizer: ./base, model: {depth: 1, width: 32}, batch: 256, context: 64"


def ran(tmp_path: Path, stages: dict[str, str]) -> Any:
    """A run of these stages, on a model, on it with its matrices rounded, and on it held in few bits."""
    write_rows(tmp_path / "chats.jsonl", CHATS)
    write_rows(tmp_path / "pairs.jsonl", PAIRS)
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": one["prompt"]} for one in PAIRS])
    write_rows(
        tmp_path / "texts.jsonl", [{"text": f"the river rises {n} in the hills " * 9} for n in range(60)]
    )
    (tmp_path / "mine.py").write_text(
        "def even(completion_ids, **columns):\n    return [float(ids[0] % 2) for ids in completion_ids]\n"
    )
    model = small_model(own(), inner_width=64)
    save(tmp_path / "base", model, own())
    for scheme in ("int8", "int4"):
        rounded, few = (small_model(own(), inner_width=64) for _ in range(2))
        quantise(few, scheme)
        save(tmp_path / f"{scheme}-few", few, own())
        with torch.no_grad():
            for name, layer in adaptable(rounded).items():
                layer.weight.copy_(few.get_submodule(name).weight.dequantize())
        save(tmp_path / f"{scheme}-rounded", rounded, own())
    text = "".join(f"  {name}: {{{settings}}}\n" for name, settings in stages.items())
    (tmp_path / "qat.yaml").write_text(f"name: qat\nstages:\n{text}")
    return trivium.run(tmp_path / "qat.yaml", runs=tmp_path / "runs")


def first_step(run: Any, stage: str) -> dict[str, float]:
    """What the log says the first step saw, without clocks and without what the step changed."""
    row = next(row for row in run[stage].metrics if row.get("step") == 1)
    later = {
        "tokens_per_second",
        "data_wait",
        "rollout_seconds",
        "generation_seconds",
        "scoring_seconds",
        "flops",
        "grad_norm",
        "validation_loss",
        "bits_per_byte",
    }
    return {key: value for key, value in row.items() if key not in later}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STAGES)
def test_every_stage_learns_from_what_the_rounded_model_says(tmp_path, kind):
    settings = f"kind: {kind}, steps: 1, {STAGES[kind]}"
    stages = {"plain": f"{settings}, from: ./base"}
    for scheme in ("int8", "int4"):
        stages[f"felt-{scheme}"] = f"{settings}, from: ./base, qat: {scheme}"
        stages[f"rounded-{scheme}"] = f"{settings}, from: ./{scheme}-rounded"
    run = ran(tmp_path, stages)
    for scheme in ("int8", "int4"):
        plain, rounded = (first_step(run, name) for name in ("plain", f"rounded-{scheme}"))
        felt = pytest.approx(first_step(run, f"felt-{scheme}"), abs=2e-5, rel=1e-4)
        assert rounded == felt
        assert plain != felt


@pytest.mark.quick_cases(4)
@pytest.mark.parametrize(
    "rounded",
    ["qat: int4", "adapter: {rank: 2, base: int4}", "adapter: {rank: 2, base: int4, train: [norms]}"],
)
@pytest.mark.parametrize(
    ("settings", "measure"),
    [
        (f"kind: ppo, {STAGES['ppo']}", "objective/kl"),
        (f"kind: rlvr, {STAGES['rlvr']}, kl: {{coefficient: 0.1}}", "kl"),
        ("kind: preference, data: ./pairs.jsonl, pairs: 4, sycophancy: 0", "rewards/chosen"),
        (
            "kind: preference, data: ./pairs.jsonl, pairs: 4, sycophancy: 0, reference: parent",
            "rewards/chosen",
        ),
    ],
    ids=["ppo", "rlvr", "stored", "parent"],
)
def test_the_reference_is_rounded_as_the_model_is(tmp_path, settings, measure, rounded):
    run = ran(tmp_path, {"first": f"{settings}, steps: 1, from: ./base, {rounded}"})
    row = next(row for row in run["first"].metrics if row.get("step") == 1)
    assert row[measure] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_pretraining_feels_it_too(tmp_path):
    settings = f"kind: pretrain, steps: 12, {PRETRAIN}"
    schemes = {"plain": "", "int8": ", qat: int8", "int4": ", qat: int4"}
    run = ran(tmp_path, {name: settings + qat for name, qat in schemes.items()})
    # Not at first: new layers add nothing to the stream until they have learned something.
    plain, *felt = [run[name].metrics[-1]["loss"] for name in schemes]
    assert min(abs(loss - plain) for loss in felt) > 1e-4
    # A matrix that only felt rounding is saved as it was trained.
    assert quantised_as(load_model(run["int4"].folder / "model")) is None


@pytest.mark.parametrize("kind", STAGES)
def test_a_rounded_matrix_is_not_trained(tmp_path, kind):
    with pytest.raises(TriviumError, match=r"more: .* rounded to int8, .* give an `adapter`"):
        ran(tmp_path, {"more": f"kind: {kind}, steps: 1, {STAGES[kind]}, from: ./int8-few"})


@pytest.mark.slow
def test_an_adapter_on_a_rounded_model_is(tmp_path):
    few = "from: ./int8-few, adapter: {rank: 4}, learning_rate: 0.01"
    run = ran(tmp_path, {"more": f"kind: sft, steps: 8, {STAGES['sft']}, {few}"})
    losses = [row["loss"] for row in run["more"].metrics if "loss" in row]
    assert losses[-1] < losses[0]
    with pytest.raises(TriviumError, match="exclude each other"):
        ran(tmp_path, {"more": f"kind: sft, steps: 8, {STAGES['sft']}, {few}, qat: int8"})
