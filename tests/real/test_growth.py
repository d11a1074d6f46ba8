"""SmolLM2 with ten identity blocks more: the same function, and a training that moves only the new blocks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import trivium

pytestmark = pytest.mark.real
FOLDER = Path(os.environ["TRIVIUM_REAL"]).expanduser() / "smollm2"
STEPS = int(os.environ.get("TRIVIUM_REAL_STEPS", "3"))
RECIPE = f"""\
name: grown
stages:
  deep: {{kind: grow, from: {FOLDER}, layers: 40}}
  on: {{kind: midtrain, from: deep, data: {{./texts.jsonl: {{validation: 0.2}}}}, train_only: [new_layers],
       context: {{length: 64}}, batch: 128, steps: {STEPS}, optimiser: adamw, learning_rate: 0.0003}}
"""


def opened(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_ten_identity_blocks_keep_the_function_and_alone_learn(tmp_path: Path) -> None:
    towns = [{"text": f"The town of {name} lies at kilometre {place} of the river."}
             for place, name in enumerate(["Avern", "Borle", "Castin", "Delm"] * 30)]  # fmt: skip
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, towns)))
    (tmp_path / "grown.yaml").write_text(RECIPE)
    run = trivium.run(tmp_path / "grown.yaml", runs=tmp_path / "runs")
    assert run["deep"].summary["largest_difference"] < 1e-4
    small, deep, on = opened(FOLDER), opened(run["deep"].folder / "model"), opened(run["on"].folder / "model")
    tokens = transformers.AutoTokenizer.from_pretrained(FOLDER)(
        "The capital of France is Paris, and"
    ).input_ids
    with torch.no_grad():
        logits = [model(torch.tensor([tokens])).logits for model in (small, deep)]
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)
    new = tuple(f"model.layers.{layer}." for layer in run["deep"].summary["new_layers"])
    assert len(new) == 10
    before, after = dict(deep.named_parameters()), dict(on.named_parameters())
    for name, weight in after.items():
        moved = not torch.equal(weight, before[name])
        assert moved == name.startswith(new), name
    rows = [json.loads(line) for line in (run["on"].folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
