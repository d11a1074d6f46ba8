"""A shuffle without a table: where row i goes is computed from the seed alone, alike on any machine."""

import hashlib

import numpy as np

_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def round_keys(*names: object) -> np.ndarray:
    """Keys that depend on every name given, and on nothing else."""
    digest = hashlib.blake2b(repr(names).encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def shuffled(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Send each index below `size` to another one; all indices together make a permutation.

    A Feistel network over the next power of four, walked until it lands inside. NumPy's own shuffles may
    change between versions, and a table for 24 million rows would have to be built before the first step.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = np.asarray(indices, dtype=np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            mixed = (right ^ key) * _MIX[0]
            mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX[1]
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)
