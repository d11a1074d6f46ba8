"""Packed sequences and batches: what every batch source yields and every objective receives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trivium.tokens.items import FIRST

NOTHING = -1


def predict_text_alone(targets: np.ndarray, weights: np.ndarray) -> None:
    """Nothing predicts a picture or a sound: take them out of the targets, in place."""
    if len(targets) and targets.max() >= FIRST:
        inside = targets >= FIRST
        targets[inside], weights[inside] = NOTHING, 0.0


@dataclass(frozen=True, eq=False)
class PackedSequence:
    """An indivisible training row: one or more whole documents (or pieces of long ones), laid end to end."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    lengths: tuple[int, ...]
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    facts: Mapping[str, list] = field(default_factory=dict)
    ids: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        size, documents = len(self.tokens), len(self.lengths)
        assert len(self.targets) == len(self.weights) == size, "targets and weights match tokens"
        assert sum(self.lengths) == size, "the documents fill the row exactly"
        assert len(self.ids) == len(self.sources) == documents, "one id and one source per document"
        assert all(len(column) == size for column in self.columns.values()), "columns are per token"
        assert all(len(fact) == documents for fact in self.facts.values()), "facts are per document"

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class Batch:
    """Several rows as flat tensors: tokens of all documents in order, no padding anywhere."""

    tokens: Tensor
    targets: Tensor
    weights: Tensor
    lengths: tuple[int, ...]
    columns: dict[str, Tensor]
    facts: dict[str, list]
    ids: tuple[str, ...]
    sources: tuple[int, ...]
    rows: int
    learned: Tensor | None = None
    """The places [learned] with a target and a weight, known before anything is on a device; None is all."""

    def spread(self, values: Tensor) -> Tensor:
        """What each document has, for each of its tokens: [documents] -> [tokens]."""
        return values.repeat_interleave(torch.tensor(self.lengths, device=values.device))

    def owners(self) -> Tensor:
        """Which document each token is of, counted from 0: [tokens]."""
        return self.spread(torch.arange(len(self.lengths), device=self.tokens.device))


def row_of_documents(
    documents: Sequence[np.ndarray],
    *,
    learned: Sequence[np.ndarray | None] | None = None,
    columns: Mapping[str, Sequence[np.ndarray]] | None = None,
    facts: Mapping[str, list] | None = None,
    ids: Sequence[str] | None = None,
    sources: Sequence[int] | None = None,
) -> PackedSequence:
    """Lay documents end to end and set every target to the next token of its own document.

    `learned[i][t]` says whether (or how much) token t of document i is to be predicted; None learns all.
    """
    lengths = tuple(len(document) for document in documents)
    tokens = np.concatenate([np.asarray(document, dtype=np.int64) for document in documents])
    targets = np.empty_like(tokens)
    targets[:-1] = tokens[1:]
    last = np.cumsum(lengths) - 1
    targets[last] = NOTHING
    weights = np.ones(len(tokens), dtype=np.float32)
    if learned is not None and any(mask is not None for mask in learned):
        per_token = np.concatenate(
            [
                np.ones(length, dtype=np.float32) if mask is None else np.asarray(mask, dtype=np.float32)
                for mask, length in zip(learned, lengths, strict=True)
            ]
        )
        weights[:-1] = per_token[1:]
    weights[last] = 0.0
    predict_text_alone(targets, weights)
    return PackedSequence(
        tokens=tokens,
        targets=targets,
        weights=weights,
        lengths=lengths,
        columns={
            name: np.concatenate([np.asarray(part) for part in parts])
            for name, parts in (columns or {}).items()
        },
        facts=dict(facts or {}),
        ids=tuple(ids) if ids is not None else ("",) * len(lengths),
        sources=tuple(sources) if sources is not None else (0,) * len(lengths),
    )


def collate(rows: Sequence[PackedSequence], device: torch.device | str = "cpu") -> Batch:
    """Join rows into one flat batch on the device; every row must carry the same columns and facts."""
    assert rows, "a batch has at least one row"
    names, facts = set(rows[0].columns), set(rows[0].facts)
    assert all(set(row.columns) == names and set(row.facts) == facts for row in rows), "rows are of one kind"

    on_gpu = torch.device(device).type == "cuda"

    targets, weights = (
        np.concatenate([getattr(row, name) for row in rows]) for name in ("targets", "weights")
    )
    learns = (targets >= 0) & (weights != 0)

    def joined(arrays: list[np.ndarray]) -> Tensor:
        tensor = torch.from_numpy(np.concatenate(arrays))
        # From pinned memory a GPU takes it while the pass before is still computed.
        return tensor.pin_memory().to(device, non_blocking=True) if on_gpu else tensor.to(device)

    return Batch(
        tokens=joined([row.tokens for row in rows]),
        targets=joined([targets]),
        weights=joined([weights]),
        lengths=tuple(length for row in rows for length in row.lengths),
        columns={name: joined([row.columns[name] for row in rows]) for name in sorted(names)},
        facts={name: [fact for row in rows for fact in row.facts[name]] for name in sorted(facts)},
        ids=tuple(identity for row in rows for identity in row.ids),
        sources=tuple(source for row in rows for source in row.sources),
        rows=len(rows),
        learned=None if learns.all() else joined([np.flatnonzero(learns)]),
    )
