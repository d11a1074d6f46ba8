"""A scorer that knows nothing: the control that every claim of learning from rewards has to beat."""

import hashlib
from dataclasses import dataclass
from typing import Any

from trivium.grade.scorer import Score


@dataclass(frozen=True)
class RandomScorer:
    """One for a given share of all answers, chosen by nothing but a hash of the words."""

    name: str = "random"
    share: float = 0.5
    seed: int = 0

    def __call__(self, completion: str, **columns: Any) -> Score:
        words = repr((self.seed, columns.get("prompt"), completion)).encode()
        drawn = int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "big") / 2**64
        return Score(float(drawn < self.share), f"a coin fell on {drawn:.3f}", "ok")
