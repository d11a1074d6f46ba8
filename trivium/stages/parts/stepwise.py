"""Labelled solutions in a stage: each source read and divided by prompt, a judge measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trivium.data.door import Place, documents
from trivium.data.mixture import weights_over
from trivium.data.preference_sources import described
from trivium.data.rows import collate
from trivium.data.settings import MixtureSource, all_weighted_or_none
from trivium.data.sources import Reading
from trivium.data.split import in_validation, prompt_hash
from trivium.data.steps import StepData, StepSource, row_of_steps
from trivium.evals.first_error import step_report
from trivium.kit.errors import TriviumError
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import PASS_TOKENS, groups_of
from trivium.model.attention import Documents
from trivium.model.scalar_head import ScalarHead, scores_at
from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Solutions:
    """The solutions of all sources: what is learned from, what is held out, and what became of each row."""

    training: list[StepSource]
    validation: list[StepSource]
    facts: dict[str, dict[str, Any]]


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
    all_weighted_or_none(work.stage, mixture)
    found = Solutions([], [], {})
    for name, source in mixture.items():
        reading = Reading()
        reader = StepData(tokenizer, context, separator, until_error=until_error)
        solutions = list(reader.read(documents(work, [source], reading), skip=source.on_bad == "skip"))
        tally = {**reader.tally.facts(), "bad": reading.bad, "empty": reading.empty}
        tally["named"] = [*reading.named, *tally["named"]]
        if not solutions:
            because = f"; {tally['named'][0]}" if tally["named"] else ""
            raise TriviumError(f"{name}: none of its {tally['rows']} rows can be learned from{because}.")
        held_out = [in_validation(prompt_hash(one.prompt), source.validation) for one in solutions]
        if all(held_out):
            raise TriviumError(
                f"{name}: `validation: {source.validation:g}` holds out all of its {len(solutions)} "
                "solutions, so nothing is left to learn from; lower it or give the source more prompts."
            )
        seen = [one for one, held in zip(solutions, held_out, strict=True) if not held]
        unseen = [one for one, held in zip(solutions, held_out, strict=True) if held]
        weights = None if source.weight is None else weights_over(source.weight)
        found.training.append(StepSource(name, seen, weights, source.max_repeats))
        found.validation.append(StepSource(name, unseen))
        tally |= {"learned_from": len(seen), "held_out": len(unseen)}
        for line in described(name, tally):
            work.say(line.replace("in answers", "steps with a label"))
        found.facts[name] = tally
    return found


@torch.no_grad()
def judged_steps(
    model: Transformer, head: ScalarHead, sources: Sequence[StepSource], precision: Precision
) -> dict[str, Any]:
    """Accuracy, calibration and first-error F1 of a process reward model on solutions held out."""
    solutions = [one for source in sources for one in source.solutions]
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
