"""Labelled solutions in a stage: each source read and divided by prompt, a judge measured on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from trivium.data.counted import CountedSource, CountedSources, read_counted
from trivium.data.door import Place
from trivium.data.rows import collate
from trivium.data.settings import MixtureSource
from trivium.data.steps import StepData, StepSolution, row_of_steps
from trivium.evals.first_error import step_report
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import PASS_TOKENS, groups_of
from trivium.model.attention import Documents
from trivium.model.scalar_head import ScalarHead, scores_at
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

Solutions = CountedSources[StepSolution]


def read_solutions(
    work: Place,
    mixture: Mapping[str, MixtureSource],
    tokenizer: Tokenizer,
    context: int,
    separator: str,
    *,
    until_error: bool = False,
) -> Solutions:
    """Read every source; solutions of one prompt are all learned from, or all held out."""
    return read_counted(
        work, mixture, lambda: StepData(tokenizer, context, separator, until_error=until_error),
        called="solutions", cut="without their last steps", learned="steps with a label",
    )  # fmt: skip


@torch.no_grad()
def judged_steps(
    model: Transformer, head: ScalarHead, sources: Sequence[CountedSource[StepSolution]], precision: Precision
) -> dict[str, Any]:
    """Accuracy, calibration and first-error F1 of a process reward model on solutions held out."""
    solutions = [one for source in sources for one in source.items]
    if not solutions:
        return {}
    rows = [row_of_steps([one]) for one in solutions]
    scores: list[np.ndarray] = []
    done = 0
    for some in groups_of(rows, PASS_TOKENS):
        batch = collate(some, model.device)
        mine = solutions[done : done + len(some)]
        done += len(some)
        starts = np.cumsum([0, *batch.lengths[:-1]])
        places = np.concatenate([one.places + start for one, start in zip(mine, starts, strict=True)])
        with one_pass(precision, model.device):
            found = scores_at(
                model, head, batch.tokens, Documents(batch.lengths, model.device),
                torch.from_numpy(places).to(model.device),
            )  # fmt: skip
        scores += [
            part.numpy()
            for part in torch.sigmoid(found.float()).cpu().split([len(one.places) for one in mine])
        ]
    return step_report(
        [one.tolist() for one in scores], [one.labels.tolist() for one in solutions],
        cut=[one.cut for one in solutions],
    )  # fmt: skip
