"""Seeded choices that are the same on every machine and count the bits they cost."""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TypeVar

from trivium.world.document import Split

T = TypeVar("T")
_LOG2 = (0.0, *(math.log2(n) for n in range(1, 4097)))


def stable_number(*key: object) -> int:
    """A 64-bit number that depends on the key alone, in every process."""
    text = "\x1f".join(map(str, key))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def stable_share(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return stable_number(*key) / 2**64


def split_of(*key: object, validation: float = 0.1, test: float = 0.1) -> Split:
    """The split to which a key belongs for ever."""
    share = stable_share("split", *key)
    if share < test:
        return "test"
    return "validation" if share < test + validation else "train"


class Chance:
    """A stream of choices for one document; `bits` is minus the log2 of the probability of those made."""

    __slots__ = ("bits", "random")

    def __init__(self, *key: object):
        # Only random() is used: Python promises its sequence across versions, not that of choice.
        self.random = random.Random(stable_number(*key)).random
        self.bits = 0.0

    def below(self, count: int) -> int:
        """A whole number from 0 up to, and without, `count`."""
        self.bits += _LOG2[count] if count <= 4096 else math.log2(count)
        return int(self.random() * count)

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def happens(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        if probability <= 0 or probability >= 1:
            return probability >= 1
        came = self.random() < probability
        self.bits -= math.log2(probability if came else 1 - probability)
        return came

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different options, in the order drawn."""
        left = list(options)
        drawn = []
        for _ in range(count):
            place = self.below(len(left))
            left[place], left[-1] = left[-1], left[place]
            drawn.append(left.pop())
        return drawn

    def shuffled(self, options: Sequence[T]) -> list[T]:
        return self.sample(options, len(options))
