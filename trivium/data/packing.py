"""Lay documents into rows of a given length, ahead of time, so that little is cut and nothing is lost."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from trivium.data.order import round_keys, shuffled

Method = Literal["best_fit", "concatenate"]


@dataclass(frozen=True)
class Packing:
    """Which piece of which document stands where: row r holds pieces `rows[r]` up to `rows[r + 1]`."""

    context: int
    documents: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    rows: np.ndarray
    dropped_tokens: int
    cut_documents: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    def pieces(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents, starts and ends of the pieces in a row."""
        inside = slice(self.rows[row], self.rows[row + 1])
        return self.documents[inside], self.starts[inside], self.ends[inside]

    @property
    def tokens(self) -> int:
        """How many tokens the rows hold."""
        return int((self.ends - self.starts).sum())

    def report(self) -> dict[str, float]:
        """What became of every token: packed + dropped is what came in."""
        return {
            "rows": len(self),
            "pieces": len(self.documents),
            "documents_cut": self.cut_documents,
            "tokens_packed": self.tokens,
            "tokens_dropped": self.dropped_tokens,
            "filled": self.tokens / max(1, len(self) * self.context),
        }


def pack(lengths: np.ndarray, context: int, *, method: Method = "best_fit", seed: int = 0) -> Packing:
    """Lay documents of these lengths into rows of at most `context` tokens.

    A document longer than a row is cut into pieces. One token alone has nothing to predict and is dropped.
    """
    assert context >= 2, "a row needs a token and one to predict"
    lengths = np.asarray(lengths, dtype=np.int64)
    order = shuffled(np.arange(len(lengths)), max(1, len(lengths)), round_keys("packing", seed))
    if method == "concatenate":
        return _concatenate(lengths, order, context)
    documents, starts, ends = _pieces(lengths, order, context)
    kept = ends - starts >= 2
    dropped = int((ends - starts)[~kept].sum())
    documents, starts, ends = documents[kept], starts[kept], ends[kept]
    bins, count = best_fit(ends - starts, context)
    by_row = np.argsort(bins, kind="stable")
    rows = np.searchsorted(bins[by_row], np.arange(count + 1))
    cut = int((lengths > context).sum())
    return Packing(context, documents[by_row], starts[by_row], ends[by_row], rows, dropped, cut)


def _pieces(
    lengths: np.ndarray, order: np.ndarray, context: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whole rows off each document until what is left fits one."""
    ordered = lengths[order]
    counts = -(-ordered // context)
    documents = np.repeat(order, counts)
    first = np.cumsum(counts) - counts
    starts = (np.arange(len(documents)) - np.repeat(first, counts)) * context
    return documents, starts, np.minimum(starts + context, lengths[documents])


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: each piece, the longest first, into the fullest row that still has room for it.

    Pieces of one size are placed together: all rows with the same room are alike, so one step fills many.
    """
    bins = np.empty(len(sizes), dtype=np.int64)
    by_size = np.argsort(-sizes, kind="stable")
    descending = sizes[by_size]
    changes = [*(np.flatnonzero(np.diff(descending)) + 1).tolist(), len(sizes)]
    rooms: dict[int, list[int]] = {}
    with_room = 0
    opened = 0
    position = 0
    for last in changes:
        size = int(descending[position]) if position < last else 0
        while position < last:
            enough = with_room >> size
            if enough:
                room = size + (enough & -enough).bit_length() - 1
                rows = rooms[room]
            else:
                room = capacity
                fit = capacity // size
                rows = list(range(opened, opened + -(-(last - position) // fit)))
                opened += len(rows)
            each = room // size
            whole = min(len(rows), (last - position) // each)
            if whole:
                taken, per_row = rows[len(rows) - whole :], each
            else:
                taken, per_row = rows[-1:], last - position
            del rows[len(rows) - len(taken) :]
            placed = len(taken) * per_row
            bins[by_size[position : position + placed]] = np.repeat(np.array(taken), per_row)
            position += placed
            if rows:
                rooms[room] = rows
                with_room |= 1 << room
            else:
                rooms.pop(room, None)
                with_room &= ~(1 << room)
            left = room - per_row * size
            if left:
                rooms.setdefault(left, []).extend(taken)
                with_room |= 1 << left
    return bins, opened


def _concatenate(lengths: np.ndarray, order: np.ndarray, context: int) -> Packing:
    """Documents one after another in shuffled order, cut wherever a row is full."""
    ordered = lengths[order]
    document_ends = np.cumsum(ordered)
    document_starts = document_ends - ordered
    total = int(ordered.sum())
    cuts = np.unique(np.concatenate([document_starts[ordered > 0], np.arange(0, total, context), [total]]))
    starts, ends = cuts[:-1], cuts[1:]
    place = np.searchsorted(document_ends, starts, side="right")
    kept = ends - starts >= 2
    dropped = int((ends - starts)[~kept].sum())
    row_of = starts[kept] // context
    rows = np.flatnonzero(np.diff(row_of, prepend=-1))
    begin = document_starts[place[kept]]
    return Packing(
        context=context,
        documents=order[place[kept]],
        starts=starts[kept] - begin,
        ends=ends[kept] - begin,
        rows=np.append(rows, len(row_of)),
        dropped_tokens=dropped,
        cut_documents=int((np.bincount(place, minlength=max(1, len(order))) > 1).sum()),
    )
