"""Quick looks at a model after a stage that learned from preferences or rewards: sycophancy and drift."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trivium.data.rows import collate, row_of_documents
from trivium.evals.evaluate import evaluate
from trivium.evals.results import as_json
from trivium.evals.settings import Settings
from trivium.evals.statistics import bootstrap
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.generate.sampling import Sampling, seed_of_sample
from trivium.kit.processes import world
from trivium.learn.head_loss import token_log_probabilities
from trivium.learn.validation import PASS_TOKENS, groups_of
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

DRIFT_TOKENS = 128


def sycophancy_of(model: Transformer, tokenizer: Tokenizer, questions: int) -> dict[str, Any]:
    """The headline numbers of the sycophancy evaluation, each with its interval."""
    found = evaluate(model, tokenizer, ["sycophancy"], Settings(limit=questions)).tasks["sycophancy"]
    measures = found.measures()
    return {name: as_json(measures[name]) for name in found.headline if name in measures}


@torch.no_grad()
def drift_from(
    parent: Transformer, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]],
    *, longest: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """KL(model || parent) of an answer in nats, unbiased, from answers that the model draws (k1)."""
    requests = [
        Request(
            list(prompt), Sampling(max_new_tokens=longest, logprobs=True, seed=seed_of_sample(seed, number))
        )
        for number, prompt in enumerate(prompts)
    ]
    # In the type of the passes below, or rounding would be taken for a difference of the models.
    engine = Engine(model, tokenizer, dtype=model.dtype)
    drawn = [answers[0] for answers in engine.generate(requests)]
    rows = []
    for prompt, answer in zip(prompts, drawn, strict=True):
        learned = np.arange(len(prompt) + len(answer.tokens)) >= len(prompt)
        rows.append(row_of_documents([np.array([*prompt, *answer.tokens])], learned=[learned]))
    under_parent: list[float] = []
    for group in groups_of(rows, PASS_TOKENS):
        batch = collate(group, parent.device)
        hidden = parent(batch.tokens, Documents(batch.lengths, batch.tokens.device))
        places = batch.weights > 0
        logprobs, _ = token_log_probabilities(
            hidden[places], parent.head_weight, batch.targets[places], soft_cap=parent.final_soft_cap
        )
        sizes = [int((row.weights > 0).sum()) for row in group]
        under_parent += [float(part.sum()) for part in logprobs.split(sizes)]
    apart = [sum(answer.logprobs) - other for answer, other in zip(drawn, under_parent, strict=True)]
    return as_json(bootstrap(np.array(apart), seed=seed))


def gauges(
    parent: Path, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]],
    questions: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """How far a model drifted from its parent on these prompts, and whether it flatters.

    The first process alone looks.
    """
    if not world().leads:
        return {}
    found: dict[str, Any] = {}
    room = model.config.context - max(map(len, prompts), default=0)
    if prompts and room > 0:
        before = load_model(parent, dtype=torch.float32, device=model.device)
        longest = min(DRIFT_TOKENS, room)
        found["kl"] = drift_from(before, model, tokenizer, prompts, longest=longest, seed=seed)
    if questions:
        found["sycophancy"] = sycophancy_of(model, tokenizer, questions)
    return found
