"""Early fusion: a picture as tokens of the vocabulary, so that a model that writes tokens can write pictures.

Vector quantisation (Linde, Buzo and Gray 1980), with its codes among a language model's tokens (Chameleon,
2024): a picture is cut into patches x, and each is named by the nearest code c, argmin_k |x - c_k|^2. A code
is the mean of what it names (k-means). No encoder and no decoder is trained: a code is a small picture, so
what the model writes can be seen as it is, at the price of blocks where a VQ-VAE would be smooth.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

BEGINS, ENDS = "<|picture|>", "<|/picture|>"
MARKS = 2
"""The tokens around a picture's codes."""
ROUNDS = 12
MOST_PATCHES = 20_000
"""How many different patches a codebook is learnt from."""
_BLOCK = 4096
_GREY = 128


@dataclass(frozen=True)
class Codebook:
    """The codes of a model's vocabulary, and what each looks like."""

    patch: int
    """The side of a code in pixels."""
    first: int
    """The id of the first code; the marks that begin and end a picture have the two ids before it."""
    pixels: str
    """What the codes look like, uint8 [codes, patch, patch, 3], in base64."""

    def __post_init__(self) -> None:
        if self.patch < 1 or self.first < MARKS:
            raise ValueError(f"a codebook has patches of {self.patch} pixels and begins at {self.first}")
        if len(base64.b64decode(self.pixels)) % (3 * self.patch**2):
            raise ValueError(f"the pixels of a codebook are no whole patches of {self.patch}")

    def ids(self, picture: np.ndarray) -> list[int]:
        """The tokens of a picture, uint8 [side, side, 3], with a mark before and behind."""
        nearest, _ = _nearest(_patches(picture[None], self.patch), self._table())
        return [self.first - 2, *(int(code) + self.first for code in nearest), self.first - 1]

    def pictures(self, tokens: Sequence[int], side: int) -> list[np.ndarray]:
        """The pictures among tokens, uint8 [side, side, 3] each, grey where codes are missing."""
        found: list[list[int]] = []
        inside = False
        table = self._table()
        for token in tokens:
            if token == self.first - 2:
                inside = True
                found.append([])
            elif inside and 0 <= token - self.first < len(table):
                found[-1].append(token - self.first)
            else:
                inside = False
        return [self._painted(codes, side, table) for codes in found]

    def _painted(self, codes: list[int], side: int, table: np.ndarray) -> np.ndarray:
        across, patch = side // self.patch, self.patch
        rows = np.full((across**2, 3 * patch**2), _GREY, dtype=np.uint8)
        known = codes[: across**2]
        rows[: len(known)] = table[known]
        tiles = rows.reshape(across, across, patch, patch, 3).transpose(0, 2, 1, 3, 4)
        return tiles.reshape(across * patch, across * patch, 3)

    def _table(self) -> np.ndarray:
        return _decoded(self.pixels, self.patch)


def names_of(codes: int) -> list[str]:
    """How the vocabulary writes the marks and the codes, in the order of their ids."""
    return [BEGINS, ENDS, *(f"<|picture:{code}|>" for code in range(codes))]


def learnt_codes(pictures: np.ndarray, codes: int, patch: int, seed: int) -> np.ndarray:
    """Codes for pictures, uint8 [pictures, side, side, 3]: uint8 [codes, 3 * patch^2].

    There are fewer where there are no more patches. Every patch counts once however often it comes, or the
    background would take most codes.
    """
    every = np.unique(_patches(pictures, patch), axis=0).astype(np.float32)
    chance = np.random.default_rng(seed)
    if len(every) > MOST_PATCHES:
        every = every[np.sort(chance.choice(len(every), MOST_PATCHES, replace=False))]
    if len(every) <= codes:
        return every.astype(np.uint8)
    centres = every[np.sort(chance.choice(len(every), codes, replace=False))]
    for _ in range(ROUNDS):
        nearest, distance = _nearest(every, centres)
        counts = np.bincount(nearest, minlength=codes)
        sums = np.stack([np.bincount(nearest, column, codes) for column in every.T], axis=1)
        centres = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        # A code that names nothing goes to the patches that are named worst.
        empty = np.flatnonzero(counts == 0)
        centres[empty] = every[np.argsort(-distance, kind="stable")[: len(empty)]]
    return centres.round().astype(np.uint8)


def _patches(pictures: np.ndarray, patch: int) -> np.ndarray:
    """Pictures [pictures, side, side, 3] in patches, row by row: [all patches, 3 * patch^2]."""
    count, side = pictures.shape[:2]
    across = side // patch
    cut = pictures.reshape(count, across, patch, across, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(count * across**2, 3 * patch**2)


def _nearest(patches: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest row of the table to each patch, and how far it is, squared: [patches] each."""
    table = table.astype(np.float32)
    lengths = (table**2).sum(1)
    found, away = [], []
    for start in range(0, len(patches), _BLOCK):
        block = patches[start : start + _BLOCK].astype(np.float32)
        apart = lengths - 2 * block @ table.T
        chosen = apart.argmin(1)
        found.append(chosen)
        away.append(apart[np.arange(len(block)), chosen] + (block**2).sum(1))
    return np.concatenate(found), np.concatenate(away)


@lru_cache(maxsize=8)
def _decoded(pixels: str, patch: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(pixels), dtype=np.uint8).reshape(-1, 3 * patch**2)
