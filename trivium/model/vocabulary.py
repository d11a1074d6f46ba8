"""A model that learns new tokens: rows for them in the embedding and the head, every old row as it was."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from trivium.model.transformer import Transformer
from trivium.tokens.tokenizer import Tokenizer

Start = Literal["mean", "random"]


@dataclass(frozen=True)
class Compression:
    """How many bytes one token carries, before and after the vocabulary grew."""

    before: float
    after: float


def compression(before: Tokenizer, after: Tokenizer, texts: Sequence[str]) -> Compression:
    """Bytes per token of the same texts under both vocabularies."""
    size = sum(len(text.encode()) for text in texts)
    counts = [sum(len(ids) for ids in tokenizer.encode_batch(texts)) for tokenizer in (before, after)]
    return Compression(size / counts[0], size / counts[1])


def old_pieces(before: Tokenizer, after: Tokenizer) -> dict[int, list[int]]:
    """For every added id, the old ids that spelt the same text."""
    pieces = {}
    for identity in range(before.vocabulary_size, after.vocabulary_size):
        token = after.token(identity)
        # The old merges are asked for the piece itself: a token may be half a letter, which no text spells.
        pieces[identity] = [piece.id for piece in before.backend.model.tokenize(token)]
    return pieces


def grown(matrix: Tensor, pieces: dict[int, list[int]], start: Start, generator: torch.Generator) -> Tensor:
    """The matrix with a row for every added id: its old pieces' mean, or random at the old scale."""
    old = matrix.detach()
    centre, scale = old.float().mean(0), old.float().std(0)
    rows = torch.empty(max(pieces) + 1, old.shape[1], dtype=old.dtype)
    rows[: len(old)] = old
    for identity, parts in pieces.items():
        if start == "mean":
            row = old[parts].float().mean(0)
        else:
            row = centre + scale * torch.randn(centre.shape, generator=generator)
        rows[identity] = row.to(old.dtype)
    return rows


def grow_vocabulary(
    model: Transformer, before: Tokenizer, after: Tokenizer, *, start: Start = "mean", seed: int = 0
) -> None:
    """Give the model rows for the tokens that `after` adds to `before`; the logits of old ids stay."""
    pieces = old_pieces(before, after)
    if not pieces:
        return
    generator = torch.Generator().manual_seed(seed)
    # Rows between the tokenizer's last id and the matrix's end (some families pad) belong to no token.
    vocabulary = max(pieces) + 1
    known = before.vocabulary_size
    device, dtype = model.device, model.dtype

    def module(weight: Tensor) -> Tensor:
        return grown(weight[:known].cpu(), pieces, start, generator).to(device=device, dtype=dtype)

    embedding = module(model.embedding.weight)
    model.embedding = nn.Embedding(vocabulary, model.config.width, _weight=embedding)
    if model.head is not None:
        head = module(model.head.weight)
        model.head = nn.Linear(model.config.width, vocabulary, bias=False, device=device, dtype=dtype)
        model.head.weight = nn.Parameter(head)
    model.config = model.config.changed(vocabulary=vocabulary)
