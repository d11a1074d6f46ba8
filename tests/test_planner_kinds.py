"""Kinds that compute with a model: what they compute, as torch counts it, and what was planned.

How long a model's answers are is not known before. Here no model ends an answer, and the plan is evaluated at
just that.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import trivium
from trivium.pipeline.checks import Checked
from trivium.pipeline.plan import planned
from trivium.pipeline.workload import job_of
from trivium.tokens.tokenizer import Tokenizer

RECIPE = """
name: kinds
stages:
  words: {kind: tokenizer, data: ./texts.jsonl, vocabulary: 300}
  corpus: {kind: corpus, data: ./texts.jsonl, tokenizer: words, validation: 0.1}
  base:
    {kind: pretrain, data: corpus, model: {depth: 2, width: 64, head_width: 16}, context: 256, batch: 1024,
     tokens: 4k}
  sft: {kind: sft, from: base, data: ./chats.jsonl, context: 128, steps: 2, batch: 1024}
  distill:
    {kind: distill, from: base, teacher: sft, data: ./chats.jsonl, context: 128, epochs: 1, batch: 1024}
  judge: {kind: reward, from: sft, data: ./pairs.jsonl, context: 128, epochs: 1, pairs: 8}
  process: {kind: reward, from: sft, data: ./steps.jsonl, steps: true, context: 128, epochs: 1, pairs: 8}
  grown: {kind: grow, from: base, layers: 4, method: identity}
  merged: {kind: merge, of: [base, sft], data: corpus, tokens: 1k}
  int8: {kind: quantize, from: base, data: corpus, scheme: int8, validation_tokens: 1k}
"""
REALISED = {"answer tokens": 1e6, "teaching": 1.0}
"""No answer ends by itself, and all groups teach."""
EXACT = ("judge", "process", "grown", "merged", "int8")
ABOUT = {"distill": 0.03}
WITHIN = {**dict.fromkeys(EXACT, 0.01), **ABOUT}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kinds")

    def write(name: str, rows: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    words = ["the", "miller", "of", "the", "town", "counts", "his", "bells", "and", "the", "river", "goes"]
    said = [" ".join(words[n % 5 : n % 5 + 4 + n % 8]) for n in range(300)]
    write("texts.jsonl", [{"text": f"{n} {one}."} for n, one in enumerate(said)])
    write("chats.jsonl", [{"prompt": f"{n}?", "completion": f" {one}"} for n, one in enumerate(said[:150])])
    pairs = [{"prompt": f"{n}?", "chosen": f" {one}", "rejected": f" no {n}"} for n, one in enumerate(said)]
    write("pairs.jsonl", pairs[:60])
    write(
        "problems.jsonl", [{"prompt": f"{100 + n} bells and {200 + n}?", "answer": str(n)} for n in range(64)]
    )
    steps = [
        {"prompt": f"{n}?", "completions": ["a b", "c d e"], "labels": [True, n % 2 == 0]} for n in range(64)
    ]
    write("steps.jsonl", steps)
    (folder / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [float(n % 2) for n in range(len(completions))]\n"
    )
    (folder / "kinds.yaml").write_text(RECIPE)
    return folder / "kinds.yaml"


@pytest.mark.parametrize("stage", WITHIN)
def test_the_flops_of_a_kind_are_those_torch_counts(recipe, stage, monkeypatch):
    runs = recipe.parent / "runs"
    trivium.run(recipe, runs=runs, only=["base", "sft"])
    monkeypatch.setattr(Tokenizer, "stop_ids", frozenset())
    plan = planned(recipe, runs, only=[stage])
    assert plan.going is not None
    plan.numbers[stage] |= REALISED
    expected = job_of(plan.going, stage, plan.numbers, Checked()).flops().total
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        seen = trivium.run(recipe, runs=runs, only=[stage])[stage]
    counted = counter.get_total_flops()
    spent = yaml.safe_load((seen.folder / "stage.yaml").read_text())["flops"]
    assert spent == pytest.approx(counted, rel=0.001)
    assert expected == pytest.approx(counted, rel=WITHIN[stage])
