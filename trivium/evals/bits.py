"""How well a model predicts text: bits per byte, source by source, beside the floor where it is known."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trivium import world
from trivium.data.sources import Document, read_documents, world_call
from trivium.data.split import unseen
from trivium.evals.asking import Subject
from trivium.evals.knowledge import first_question, recall
from trivium.evals.results import Record
from trivium.evals.settings import Settings
from trivium.evals.task import Found, as_task, listed, of_the_world
from trivium.kit.errors import TriviumError
from trivium.model.attention import Documents

SOURCES = ("prose", "facts", "sums", "craft", "tongue")
TOKENS_AT_ONCE = 4096
LONGEST_PIECE = 4096
"""Characters of a file's text that are one item: a whole book would be a single one, without an interval."""


def texts_of(
    source: str, settings: Settings, held_out: float = 0.0
) -> Iterator[tuple[str, str, float | None]]:
    """Documents of a source of the world (its test split) or of a file: id, text, and its entropy in bits.

    Of a file only what a stage holds out of it with this share; all where that is nothing. A long text is
    cut at the ends of lines into pieces that count as documents of their own.
    """
    if of_the_world(source):
        name, options = world_call(source)
        arguments = {"split": "test", "seed": settings.seed, "limit": settings.limit, **options}
        for one in world.documents(name, **arguments):
            if one.text is None:
                raise TriviumError(f"world:{name} holds no plain texts to predict in this form.")
            yield one.id, one.text, one.truth.get("bits")
        return
    if held_out:
        documents: Iterable[Document] = unseen(source, held_out, settings.limit)
    else:
        documents = islice(read_documents(source), settings.limit)
    yield from islice(pieces_of(documents), settings.limit)


def pieces_of(documents: Iterable[Document]) -> Iterator[tuple[str, str, None]]:
    """Id and text of every document, cut after the last line that ends before `LONGEST_PIECE`."""
    for document in documents:
        if document.text is None:
            raise TriviumError(f"{document.id} has no `text` to predict; map one with columns.")
        if len(document.text) <= LONGEST_PIECE:
            yield document.id, document.text, None
            continue
        ends = rf"(?s).{{1,{LONGEST_PIECE}}}(?:(?<=\n)|\Z)|.{{{LONGEST_PIECE}}}"
        for number, piece in enumerate(re.findall(ends, document.text), start=1):
            yield f"{document.id}, piece {number}", piece, None


@torch.inference_mode()
def bits_of(subject: Subject, texts: Sequence[str]) -> list[tuple[float, int]]:
    """For each text the bits of its tokens but the first, as in training, and the bytes these spell."""
    model, tokenizer = subject.model, subject.tokenizer
    spelled = tokenizer.byte_lengths()
    pieces: list[tuple[int, list[int]]] = []
    begin = [] if tokenizer.beginning_id is None else [tokenizer.beginning_id]
    for number, ids in enumerate(tokenizer.encode_batch(list(texts))):
        whole = [*begin, *ids]
        step = subject.window - 1
        # Pieces overlap in one token, so that every token but the first is predicted once.
        for start in range(0, max(len(whole) - 1, 0), step):
            pieces.append((number, whole[start : start + step + 1]))
    bits, sizes = [0.0] * len(texts), [0] * len(texts)
    batch: list[tuple[int, list[int]]] = []
    for place, piece in enumerate(pieces):
        batch.append(piece)
        after = len(pieces[place + 1][1]) if place + 1 < len(pieces) else TOKENS_AT_ONCE
        if sum(len(ids) for _, ids in batch) + after <= TOKENS_AT_ONCE:
            continue
        tokens = torch.tensor([token for _, ids in batch for token in ids], device=model.device)
        hidden = model(tokens, Documents([len(ids) for _, ids in batch], model.device))
        start = 0
        for number, ids in batch:
            logits = model.logits(hidden[start : start + len(ids) - 1])
            chosen = tokens[start + 1 : start + len(ids), None]
            losses = torch.logsumexp(logits, dim=-1) - logits.gather(1, chosen)[:, 0]
            bits[number] += float(losses.double().sum()) / math.log(2)
            sizes[number] += int(spelled[ids[1:]].sum())
            start += len(ids)
        batch = []
    return list(zip(bits, sizes))


def records_of(
    subject: Subject, settings: Settings, sources: Sequence[str], held_out: float = 0.0
) -> list[Record]:
    """One record per document, weighted by its bytes."""
    records = []
    for source in sources:
        told = list(texts_of(source, settings, held_out))
        measured = bits_of(subject, [text for _, text, _ in told])
        for (name, text, floor), (bits, size) in zip(told, measured):
            if not size:
                continue
            scores, weights = {"bits per byte": bits / size}, {"bits per byte": float(size)}
            if floor is not None:
                whole = len(text.encode())
                scores["floor"], weights["floor"] = floor / whole, float(whole)
            label = Path(source).name if held_out else source.removeprefix("world:")
            records.append(Record(name, text, "", (), scores, weights, "", {"source": label}))
    return records


def first_texts(settings: Settings, sources: str | Sequence[str] = SOURCES, held_out: float = 0.0) -> None:
    """What a task over texts of the world foresees."""
    for source in listed(sources):
        if of_the_world(source):
            next(texts_of(source, settings), None)


@as_task("bits", ("bits per byte",), foresee=first_texts)
def run_bits(
    subject: Subject, settings: Settings, sources: str | Sequence[str] = SOURCES, held_out: float = 0.0
) -> Found:
    """How many bits per byte the model needs for validation text; `floor` is what no model can beat."""
    return Found(records_of(subject, settings, listed(sources), held_out), style="continue")


@as_task(
    "forgetting", ("bits per byte", "multiple-choice accuracy"), ("shots", "samples"), first_question("facts")
)
def run_forgetting(subject: Subject, settings: Settings, **options: Any) -> Found:
    """What the base model learnt first, to be compared after every later stage.

    That is the prose of the first language, and facts chosen from four.
    """
    half = settings.model_copy(update={"limit": max(1, settings.limit // 2)})
    return Found(records_of(subject, half, ["prose"]) + recall(subject, half, "facts", 16, **options))
