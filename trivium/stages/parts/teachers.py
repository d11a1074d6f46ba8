"""The teacher of a distillation: one vocabulary for both, and what it says stored once, by parts."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trivium.data.batches import PlannedBatches
from trivium.data.examples import any_conversation
from trivium.data.packed import PackedBatches
from trivium.data.rows import PackedSequence, collate
from trivium.data.settings import MixtureSource
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, save_tensors
from trivium.kit.fingerprint import fingerprint
from trivium.kit.processes import barrier, world
from trivium.learn.head_loss import chunk_rows
from trivium.learn.objective import Measure, accumulate
from trivium.learn.objectives.distillation import LOGPROBS, TOKENS, Distillation
from trivium.learn.objectives.distillation_losses import capped, scores_of, with_rest
from trivium.learn.precision import Precision, one_pass
from trivium.learn.validation import PASS_TOKENS, groups_of
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.model.hub import resolve
from trivium.model.transformer import Transformer
from trivium.stages.parts.shapes import Planned, planned_size
from trivium.stages.parts.stage import Work
from trivium.stages.parts.training import Opened
from trivium.tokens.tokenizer import Tokenizer

PART = 64
"""How many rows are written at once."""


def in_common(
    opened: Opened[Any], start: str, teacher: str, mixture: Mapping[str, MixtureSource]
) -> Tokenizer:
    """The tokenizer that both models can be compared in, with a chat template where the data need one."""
    work = opened.work
    theirs = Tokenizer.load(teacher_folder(work, teacher))
    found = common_tokenizer(work.stage, start, teacher, opened.parent_tokenizer, theirs)
    if not found.templates and any_conversation(work, mixture):
        raise TriviumError(
            f"{work.stage}: `data` holds conversations and {teacher} has no chat template; fine-tune it "
            "first, or give texts."
        )
    return found


def common_tokenizer(stage: str, start: str, teacher: str, before: Tokenizer, theirs: Tokenizer) -> Tokenizer:
    """The student's tokenizer, or the teacher's where that only adds tokens or a template to it."""
    if before.fingerprint == theirs.fingerprint:
        return before
    own, known = before.backend.get_vocab(), theirs.backend.get_vocab()
    if any(known.get(token) != identity for token, identity in own.items()):
        raise TriviumError(refusal(stage, start, teacher, len(own), len(known)))
    return before if len(own) == len(known) and (before.templates or not theirs.templates) else theirs


def refusal(stage: str, start: str, teacher: str, own: int, known: int) -> str:
    """Why a student cannot be compared with this teacher, and what to do instead."""
    return (
        f"{stage}: {start} and {teacher} have different vocabularies ({own:,} and {known:,} tokens), so what "
        "they expect next cannot be compared; let the teacher write texts in a `synthesize` stage and learn "
        "these with `sft`."
    )


def vocabularies_fit(start: str, teacher: str, student: Planned, theirs: Planned) -> None:
    """Refuse, before anything runs, what `common_tokenizer` would refuse, as far as it is known."""
    if isinstance(student, Path) and isinstance(theirs, Path):
        folders = [resolve(str(one)) for one in (student, theirs)]
        if all((one / "tokenizer.json").is_file() for one in folders):
            common_tokenizer("distill", start, teacher, *map(Tokenizer.load, folders))
        return
    own, known = (planned_size(one).get("vocabulary") for one in (student, theirs))
    # A template and new tokens only add to a vocabulary, so a smaller one may be part of a larger.
    if own is not None and known is not None and own > known and not isinstance(student, Path):
        raise TriviumError(refusal("distill", start, teacher, own, known))


def teacher_folder(work: Work, teacher: str) -> Path:
    """Where the teacher lies."""
    return resolve(str(work.path(teacher)))


def open_teacher(opened: Opened[Any], teacher: str) -> Transformer:
    """The teacher's weights, frozen, where the student is."""
    folder = teacher_folder(opened.work, teacher)
    found = load_model(folder, dtype=torch.float32, device=opened.device).requires_grad_(False)
    if found.config.reach < opened.context:
        raise TriviumError(
            f"{opened.work.stage}: {teacher} reads {found.config.reach:,} tokens at most, so `context` is "
            f"not {opened.context:,}; lower it."
        )
    return found


def projection(student: Transformer, teacher: Transformer | None, seed: int) -> nn.Linear | None:
    """A matrix that brings the student's hidden states to the teacher's width, where that is another."""
    if teacher is None or student.config.width == teacher.config.width:
        return None
    made = nn.Linear(student.config.width, teacher.config.width, bias=False)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(made.weight, std=student.config.width**-0.5, generator=generator)
    return made.to(student.device)


def shuffled_tokens(vocabulary: int, seed: int) -> Tensor:
    """A permutation of all tokens."""
    return torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def agreement(
    model: Transformer,
    objective: Distillation,
    rows: Mapping[str, Sequence[PackedSequence]],
    precision: Precision,
) -> dict[str, float]:
    """The objective's measures on rows that are not learned from."""
    totals: dict[str, Measure] = {}
    everything = [
        replace(row, weights=(row.targets >= 0).astype(np.float32)) for some in rows.values() for row in some
    ]
    for group in groups_of(everything, PASS_TOKENS):
        with one_pass(precision, model.device):
            accumulate(totals, objective.loss(model, collate(group, model.device)).metrics)
    return {name: float(total) / float(weight) for name, (total, weight) in totals.items() if float(weight)}


class TaughtBatches(PlannedBatches):
    """Planned batches whose rows are changed on their way: the teacher's numbers beside them, say."""

    # The student may write the rows itself, and a teacher computes on the device that trains.
    ahead = False

    def __init__(
        self,
        planned: PackedBatches,
        change: Callable[[int, list[PackedSequence]], list[PackedSequence]],
        *,
        measures: Mapping[str, float] | None = None,
        identity: str = "",
    ) -> None:
        """`change` takes a step with its rows; it fills `measures`, which are logged."""
        self.planned, self.change, self.plan = planned, change, planned.plan
        self.measures: Mapping[str, float] = {} if measures is None else measures
        self.identity = identity

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.planned.fingerprint, self.identity])

    def rows(self, step: int) -> list[PackedSequence]:
        return self.change(step, self.planned.rows(step))

    def metrics(self, step: int) -> Mapping[str, float]:
        return dict(self.measures)

    def consumed(self, step: int) -> dict[str, float]:
        return self.planned.consumed(step)

    def shares(self, step: int) -> dict[str, float]:
        return self.planned.shares(step)


@dataclass(frozen=True)
class Stored:
    """Where the teacher's numbers of a row lie: which file, and which of its places."""

    path: Path
    start: int
    end: int


def stored_teacher(
    work: Work,
    objective: Distillation,
    planned: PackedBatches,
    *,
    top_k: int,
    identity: str,
    precision: Precision,
) -> TaughtBatches:
    """The batches with the teacher's likeliest tokens, stored part by part before the training begins.

    Rows come in the order in which the plan first uses them, so what is never trained on is never stored.
    `identity` tells teachers apart.
    """
    assert objective.teacher is not None
    teacher, head, temperature = objective.teacher, objective.head(), objective.numbers.temperature
    if top_k >= len(head):
        raise TriviumError(
            f"{work.stage}: `top_k: {top_k}` is no part of a vocabulary of {len(head):,} tokens; lower it, "
            "or leave it out and let the teacher compute along."
        )
    places = list(dict.fromkeys(place for step in range(planned.steps) for place in planned.plan.rows(step)))
    name = fingerprint([identity, top_k, temperature, planned.fingerprint])
    folder = work.folder / "teacher" / name
    known: dict[tuple[int, int], Stored] = {}
    held = positions = 0.0
    for start in range(0, len(places), PART):
        path, some = folder / f"{start:09d}.safetensors", places[start : start + PART]
        rows = [planned.packed[source].row(row) for source, row in some]
        if not path.exists() and world().leads:
            if start == 0:
                work.say(f"storing the teacher's {top_k} likeliest tokens of {len(places)} rows")
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(path, _said(teacher, head, rows, top_k, temperature, precision))
        barrier()
        # Read once from end to end, which compares the checksum.
        logprobs = load_tensors(path)[LOGPROBS]
        held, positions = held + float(logprobs[:, :-1].exp().sum()), positions + len(logprobs)
        ends = np.cumsum([int((row.weights != 0).sum()) for row in rows]).tolist()
        for place, first, last in zip(some, [0, *ends], ends):
            known[place] = Stored(path, first, last)
    work.say(f"the {top_k} likeliest tokens hold {held / max(positions, 1):.2%} of the teacher's probability")

    def change(step: int, rows: list[PackedSequence]) -> list[PackedSequence]:
        return [
            _with_numbers(row, known[place]) for place, row in zip(planned.plan.rows(step), rows, strict=True)
        ]

    return TaughtBatches(planned, change, identity=name)


@torch.no_grad()
def _said(
    teacher: Transformer,
    head: Tensor,
    rows: Sequence[PackedSequence],
    top_k: int,
    temperature: float,
    precision: Precision,
) -> dict[str, Tensor]:
    """The likeliest tokens [places, k] and their log-probabilities with the rest [places, k + 1]."""
    tokens, logprobs = [], []
    for group in groups_of(rows, PASS_TOKENS):
        batch = collate(group, teacher.device)
        places = batch.weights != 0
        with one_pass(precision, teacher.device):
            hidden = teacher(batch.tokens, Documents(batch.lengths, batch.tokens.device))[places]
        for piece in hidden.split(chunk_rows(len(head), hidden.device)):
            logits = capped(scores_of(piece, head), teacher.final_soft_cap)
            scores = torch.log_softmax(logits / temperature, -1)
            found = scores.topk(top_k, -1).indices
            tokens.append(found.to(torch.int32).cpu())
            logprobs.append(with_rest(scores, found).cpu())
    return {TOKENS: torch.cat(tokens), LOGPROBS: torch.cat(logprobs)}


def _with_numbers(row: PackedSequence, stored: Stored) -> PackedSequence:
    """The row with what the teacher said at its learned places, and zeros elsewhere."""
    from safetensors import safe_open

    learned = row.weights != 0
    columns: dict[str, Any] = {}
    with safe_open(stored.path, framework="np") as file:
        for name in (TOKENS, LOGPROBS):
            mine = file.get_slice(name)[stored.start : stored.end]
            columns[name] = np.zeros((len(row), mine.shape[1]), dtype=mine.dtype)
            columns[name][learned] = mine
    return replace(row, columns={**row.columns, **columns})


def clear_stored(folder: Path) -> None:
    """Throw the stored numbers away, once the model is whole."""
    if world().leads:
        shutil.rmtree(folder / "teacher", ignore_errors=True)
