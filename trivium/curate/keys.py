"""Keys of all documents: one array a shard on disk, joined where a decision needs them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def hash64(content: bytes) -> int:
    """A number of 64 bits that is the same for the same bytes alone."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def load(shard: Path, name: str) -> np.ndarray:
    """One shard's array, mapped and not read."""
    return np.load(shard / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def joined(shards: Sequence[Path], name: str) -> np.ndarray:
    """The arrays of all shards end to end."""
    return np.concatenate([load(shard, name) for shard in shards])


def sizes(shards: Sequence[Path]) -> list[int]:
    """How many documents each shard has."""
    return [int(load(shard, "documents")[0]) for shard in shards]


def split_by_shard(shards: Sequence[Path], to: Path, **arrays: np.ndarray) -> None:
    """Write arrays of all documents as one file a shard: `00000.<name>.npy`."""
    start = 0
    for number, size in enumerate(sizes(shards)):
        for name, array in arrays.items():
            np.save(to / f"{number:05d}.{name}.npy", array[start : start + size], allow_pickle=False)
        start += size


class Rows:
    """Rows of an array that lies in many files, read where they are asked for."""

    def __init__(self, shards: Sequence[Path], name: str) -> None:
        self._files = [load(shard, name) for shard in shards]
        self._starts = np.concatenate([[0], np.cumsum([len(one) for one in self._files])])

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        file = np.searchsorted(self._starts, places, side="right") - 1
        found = np.empty((len(places), *self._files[0].shape[1:]), dtype=self._files[0].dtype)
        for number in np.unique(file):
            mine = file == number
            found[mine] = self._files[number][places[mine] - self._starts[number]]
        return found
