"""The cost of a stage against torch's own counter, which sees every product that is really computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import trivium
from trivium.generate.forward import forward_pass_of
from trivium.lab.compare_stages import stage_facts
from trivium.lab.gather import Seen
from trivium.model.folder import load_model

MODEL = "{depth: 2, width: 64, head_width: 16}"
RECIPE = f"""
name: cost
stages:
  words: {{kind: tokenizer, data: "world:prose?limit=200", vocabulary: 400}}
  full:
    {{kind: pretrain, data: "world:chronicle?characters=4000&limit=8", tokenizer: words, model: {MODEL},
     context: 256, batch: 1024, tokens: 4k, validation: {{times: 1}}}}
  short:
    {{kind: pretrain, data: ./short.jsonl, tokenizer: words, model: {MODEL}, context: 256, batch: 1024,
     tokens: 4k, optimiser: adamw}}
  sft: {{kind: sft, from: full, data: "world:chat?limit=40", context: 256, epochs: 1, batch: 1024}}
  dpo:
    {{kind: preference, from: sft, loss: dpo, data: "world:taste?limit=24", context: 256, epochs: 1,
     pairs: 8}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cost")
    texts = [f"{n} {'and so on ' * (2 + n % 5)}." for n in range(600)]
    (folder / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "cost.yaml").write_text(RECIPE)
    return folder / "cost.yaml"


@pytest.mark.quick_cases(1)
@pytest.mark.parametrize("stage", ["full", "short", "sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_the_operations_of_a_stage_are_those_torch_counts(recipe: Path, stage: str):
    runs = recipe.parent / "runs"
    record = yaml.safe_load(recipe.read_text())["stages"][stage]
    trivium.run(recipe, runs=runs, only=[record.get("from", record.get("tokenizer"))])
    if "from" in record:
        # The engine probes the machine once for these shapes; that is no work of the stage.
        forward_pass_of(load_model(runs / "cost" / record["from"] / "model"), rows=64)
    # The unfused kernel is made of products that the counter knows; they are the same ones.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        trivium.run(recipe, runs=runs, only=[stage])
    seen = Seen(stage, (runs / "cost" / stage).resolve())
    facts = stage_facts(seen, [seen])
    assert facts["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)
