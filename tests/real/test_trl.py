"""TRL goes on from our fine-tuned model, we from TRL's: the same losses, one optimiser step each."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl

import trivium

pytestmark = pytest.mark.real
FOLDER = Path(os.environ["TRIVIUM_REAL"]).expanduser() / "smollm2"
ROWS = [
    {"prompt": "Question: what is 12 + 30?\nAnswer:", "completion": " It is 42."},
    {"prompt": "The river Avern", "completion": " rises in the hills and flows to the sea."},
    {"prompt": "Question: who wrote Hamlet?\nAnswer:", "completion": " William Shakespeare did."},
]
RECIPE = """\
name: tuned
stages:
  sft: {kind: sft, from: FOLDER, data: {./rows.jsonl: {validation: 0}}, steps: 2, optimiser: adamw,
        context: 64, batch: 64, learning_rate: {from: 0.00001, warmup: 0, decay: constant},
        weight_decay: 0, clip: 1}
"""


def ours(folder: Path, place: Path) -> tuple[list[float], Path]:
    """The losses of two steps and the model after them."""
    place.mkdir()
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (place / "tuned.yaml").write_text(RECIPE.replace("FOLDER", str(folder)))
    stage = trivium.run(place / "tuned.yaml", only="sft", runs=place / "runs")["sft"].folder
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row], stage / "model"


def theirs(folder: Path, place: Path) -> tuple[list[float], Path]:
    """The same by TRL."""
    settings = trl.SFTConfig(
        output_dir=str(place / "state"), max_steps=2, per_device_train_batch_size=len(ROWS), use_cpu=True,
        bf16=False, learning_rate=1e-5, lr_scheduler_type="constant", weight_decay=0.0, adam_beta2=0.95,
        adam_epsilon=1e-10,
        max_grad_norm=1.0, gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=settings, train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    losses: list[float] = []
    compute = trainer.compute_loss

    def noted(*inputs: Any, **named: Any) -> Any:
        loss = compute(*inputs, **named)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = noted  # type: ignore[method-assign]
    trainer.train()
    trainer.save_model(str(place / "model"))
    return losses, place / "model"


def test_each_goes_on_from_the_others_model(tmp_path: Path) -> None:
    _, made_here = ours(FOLDER, tmp_path / "first")
    _, made_there = theirs(FOLDER, tmp_path / "second")
    for number, folder in enumerate((made_here, made_there)):
        mine, _ = ours(folder, tmp_path / f"mine{number}")
        expected, _ = theirs(folder, tmp_path / f"theirs{number}")
        print(folder.name, mine, expected)
        # The second loss is after an optimiser step of each.
        assert mine == pytest.approx(expected, abs=1e-4)
