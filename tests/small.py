"""A model, a batch source and a trainer small enough for a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.data.rows import Batch, PackedSequence, row_of_documents
from trivium.kit.metrics import MetricsLog
from trivium.kit.progress import Progress
from trivium.learn.objective import Loss
from trivium.learn.objectives.next_token import NextToken
from trivium.learn.optimisers import LearningRates
from trivium.learn.settings import Training
from trivium.learn.trainer import Hooks, Trainer
from trivium.model.attention import Documents
from trivium.model.config import ModelConfig
from trivium.model.scalar_head import ScalarHead
from trivium.model.transformer import Transformer

VOCABULARY = 61
RATES = LearningRates(matrices=0.02, embeddings=0.02, head=0.005, scalars=0.01, weight_decay=0.01)


def small_model(seed: int = 0, **changes: Any) -> Transformer:
    """Two layers of width 32, initialised by the seed alone."""
    settings: dict[str, Any] = {
        "vocabulary": VOCABULARY, "width": 32, "layers": 2, "heads": 2, "inner_width": 48, "context": 64,
        "query_key_norm": "head",
    }  # fmt: skip
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(**{**settings, **changes}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return model


class SmallBatches:
    """Rows of uneven documents, each step's a pure function of the step."""

    def __init__(self, steps: int = 8, rows: int = 4, longest: int = 24) -> None:
        self.steps = steps
        self.rows_per_step = rows
        self.longest = longest
        self.fingerprint = f"small-{rows}-{longest}"

    def rows(self, step: int) -> list[PackedSequence]:
        random = np.random.default_rng(1000 + step)
        rows = []
        for row in range(self.rows_per_step):
            lengths = random.integers(3, self.longest, random.integers(1, 4))
            # A learnable text: each token follows from the one before, with a little noise.
            documents = [(np.arange(n) * 7 + random.integers(0, 3, n)) % VOCABULARY for n in lengths]
            learned = [(random.random(n) < 0.8).astype(np.float32) for n in lengths]
            ids = [f"step{step}-row{row}-{index}" for index in range(len(lengths))]
            rows.append(row_of_documents(documents, learned=learned, ids=ids))
        return rows

    def metrics(self, step: int) -> dict[str, float]:
        return {}

    def state(self) -> tuple[dict, dict]:
        return {}, {}

    def restore(self, json: dict, tensors: dict) -> None:
        assert json == {}


class Scored(NextToken):
    """The next token and, by a head of its own that is trained along, where in the row a token stands."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = ScalarHead(32, seed=1)

    def loss(self, model: Any, batch: Batch) -> Loss:
        found = super().loss(model, batch)
        scores = self.extra(model(batch.tokens, Documents(batch.lengths, batch.tokens.device)))
        places = torch.arange(len(scores)) / len(scores)
        return Loss(found.sum + ((scores - places) ** 2 * batch.weights).sum(), found.metrics)


def small_trainer(
    folder: Path,
    *,
    model: Transformer | None = None,
    batches: Any = None,
    objective: Any = None,
    hooks: Hooks | None = None,
    parent_moments: Any = None,
    seed: int = 0,
    watched: bool = True,
    fill: Any = None,
    **settings: Any,
) -> Trainer:
    """A trainer over the small model and batches; keywords are training settings."""
    return Trainer(
        model=model or small_model(),
        objective=objective or NextToken(),
        batches=batches or SmallBatches(),
        settings=Training(**settings),
        rates=RATES,
        folder=folder,
        log=MetricsLog(folder / "metrics.jsonl"),
        progress=Progress("test"),
        seed=seed,
        hooks=hooks or Hooks(),
        parent_moments=parent_moments,
        watched=watched,
        fill=fill,
    )


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_identical(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit, and nothing missing."""
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def tiny_recipe(steps: int, every: int) -> str:
    """A training of so many short steps, which saves its state at every so many."""
    return f"""\
name: tiny
seed: 3
stages:
  words: {{kind: tokenizer, data: [{{path: world:prose, limit: 60}}], vocabulary: 300}}
  corpus: {{kind: corpus, data: [{{path: world:prose, limit: 60}}], tokenizer: words, validation: 0.1}}
  base: {{kind: pretrain, data: corpus, model: {{depth: 1, width: 32, head_width: 16, heads: 2}}, context: 64,
         batch: 512, steps: {steps}, checkpoint: {{every_steps: {every}}}}}
"""
