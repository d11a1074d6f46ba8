"""What the benchmarks of digits seen and heard share: the recipe, the questions, and what a person sets."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import trivium

RECIPE = """\
name: {name}
seed: {seed}
stages:
  words: {{kind: tokenizer, vocabulary: 512, data: {{path: world:facts, limit: 2k}}}}
  base: {{kind: pretrain, data: {{"world:facts?people=40": {{limit: 2k}}}}, tokenizer: words, context: 128,
         batch: 2k, tokens: 100k, model: {{depth: 2, width: 64}}}}
  {stage}:
    kind: multimodal
    from: base
    data: {{./train.jsonl: {{weight: 0.9}}, "world:facts?people=40": {{limit: 500, weight: 0.1}}}}
    {tower}
    steps_frozen: 0.1
    learning_rate: 0.02
    new_parts_rate: 1.0
    context: 128
    batch: 2k
    steps: {steps}
"""


def arguments_of(description: str | None, name: str, steps: int, **more: int) -> argparse.Namespace:
    """The seed, the steps, further numbers, and the folder, which is there afterwards."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, default in {"seed": 1, "steps": steps, **more}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--to", type=Path)
    arguments = parser.parse_args()
    arguments.to = arguments.to or Path(tempfile.mkdtemp(prefix=f"{name}-"))
    arguments.to.mkdir(parents=True, exist_ok=True)
    return arguments


def asked(kind: str, path: Path | str, question: str) -> list[dict[str, Any]]:
    """The question about a picture (`image`) or a sound (`audio`)."""
    parts = [{"type": kind, "path": str(path)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def taught(kind: str, path: Path | str, question: str, digit: int) -> dict[str, Any]:
    """The question with its answer, to learn from."""
    return {"messages": [*asked(kind, path, question), {"role": "assistant", "content": str(digit)}]}


def answers(model: trivium.Model, kind: str, shown: list[Path], question: str) -> list[str]:
    """What the model says of each."""
    conversations = [asked(kind, path, question) for path in shown]
    said = model.generate(conversations, temperature=0, max_new_tokens=4)
    return [one.text.strip() for one in said]


def learned(
    arguments: argparse.Namespace, name: str, stage: str, tower: str, rows: list[dict[str, Any]]
) -> trivium.Model:
    """The model that learned to name what these rows show."""
    (arguments.to / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = arguments.to / f"{name}.yaml"
    recipe.write_text(
        RECIPE.format(name=name, stage=stage, tower=tower, seed=arguments.seed, steps=arguments.steps)
    )
    return trivium.run(recipe, runs=arguments.to / "runs")[stage].model()
