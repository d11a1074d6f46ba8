"""Rotary positions and every way to stretch them over a longer context."""

import math
from typing import Any

import torch
from torch import Tensor

from trivium.kit.errors import TriviumError

REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
OPTIONAL = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("attention_factor", "factor"),
    "llama3": (),
}
EVERYWHERE = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
GROWS_WITH_LENGTH = ("dynamic", "longrope")


def checked_rope(rope: dict[str, Any], context: int, head_width: int, where: str) -> dict[str, Any]:
    """The rope parameters with their defaults filled in, or a sentence about what is wrong with them."""
    rope = dict(rope)
    kind = rope.pop("type", None)
    kind = rope.setdefault("rope_type", kind or "default")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise TriviumError(f"{where}: rope_type {kind!r} is not one of {', '.join(REQUIRED)}.")
    rope.setdefault("rope_theta", 10000.0)
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise TriviumError(
            f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} is not supported."
        )
    rope.pop("partial_rotary_factor", None)
    missing = [key for key in REQUIRED[kind] if rope.get(key) is None]
    if missing:
        raise TriviumError(f"{where}: rope_type {kind!r} needs {missing[0]!r}.")
    unknown = [key for key in rope if key not in REQUIRED[kind] + OPTIONAL[kind] + EVERYWHERE]
    if unknown:
        raise TriviumError(f"{where}: rope_type {kind!r} has no parameter {unknown[0]!r}: remove it.")
    if kind in ("yarn", "longrope", "llama3"):
        rope.setdefault("original_max_position_embeddings", context)
    _refuse_odd_values(rope, head_width, where)
    return rope


def _refuse_odd_values(rope: dict[str, Any], head_width: int, where: str) -> None:
    """Name a parameter under which no angle can be computed."""
    for key, value in rope.items():
        if key in ("rope_type", "truncate") or (value is None and key in OPTIONAL[rope["rope_type"]]):
            continue
        if key in ("short_factor", "long_factor"):
            if not isinstance(value, list) or not all(map(_is_positive, value)):
                raise TriviumError(f"{where}: {key} is no list of numbers above 0.")
            if len(value) != head_width // 2:
                raise TriviumError(f"{where}: {key} has {len(value)} numbers; {head_width // 2} are needed.")
            continue
        least = {"rope_theta": 1, "original_max_position_embeddings": 1}.get(key, 0)
        if not _is_positive(value) or value <= least:
            raise TriviumError(f"{where}: {key} is {value!r}; it has to be a number above {least}.")
    if rope["rope_type"] == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        raise TriviumError(f"{where}: high_freq_factor has to be above low_freq_factor.")
    if rope["rope_type"] == "dynamic" and head_width < 4:
        raise TriviumError(f"{where}: rope_type 'dynamic' needs heads at least 4 wide, not {head_width}.")


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1e30


def ntk_base(base: float, factor: float, head_width: int) -> float:
    """The base under which the slowest pair turns `factor` times slower and the fastest as before."""
    return base * factor ** (head_width / (head_width - 2))


def yarn_range(rope: dict[str, Any], head_width: int) -> tuple[float, float]:
    """The pairs between which YaRN blends from untouched to interpolated (a ramp in the pair's index)."""
    original = rope["original_max_position_embeddings"]

    def pair_that_turns(turns: float) -> float:
        return head_width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

    low = pair_that_turns(rope.get("beta_fast") or 32)
    high = pair_that_turns(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, head_width - 1)


def attention_factor(rope: dict[str, Any], context: int) -> float:
    """What cosine and sine are multiplied by, so that scores grow by its square."""
    kind = rope["rope_type"]
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if kind == "yarn":

        def growth(strength: float) -> float:
            return 0.1 * strength * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0

        if rope.get("mscale") and rope.get("mscale_all_dim"):
            return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
        return growth(1.0)
    if kind == "longrope":
        original = rope["original_max_position_embeddings"]
        factor = rope.get("factor") or context / original
        return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0


def inverse_frequencies(rope: dict[str, Any], head_width: int, context: int, length: int) -> Tensor:
    """How far each pair turns from one position to the next, in a sequence of `length` tokens."""
    kind, base = rope["rope_type"], rope["rope_theta"]
    if kind == "dynamic":
        stretch = rope["factor"] * max(length, context) / context - (rope["factor"] - 1)
        base = ntk_base(base, stretch, head_width)
    exponents = torch.arange(0, head_width, 2, device="cpu").float() / head_width
    if kind == "longrope":
        beyond = length > rope["original_max_position_embeddings"]
        factors = torch.tensor(rope["long_factor" if beyond else "short_factor"], device="cpu").float()
        return 1.0 / (factors * base**exponents)
    frequencies = 1.0 / base**exponents
    if kind == "linear":
        return frequencies / rope["factor"]
    if kind == "yarn":
        low, high = yarn_range(rope, head_width)
        ramp = (torch.arange(head_width // 2, device="cpu").float() - low) / max(high - low, 0.001)
        interpolated = ramp.clamp(0, 1)
        return frequencies / rope["factor"] * interpolated + frequencies * (1 - interpolated)
    if kind == "llama3":
        original = rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - kept) * frequencies / rope["factor"] + kept * frequencies
    return frequencies


class Rotary:
    """Cosines and sines for the positions of a batch."""

    def __init__(self, rope: dict[str, Any], head_width: int, context: int) -> None:
        self.rope = checked_rope(rope, context, head_width, "the model's rope")
        self.head_width = head_width
        self.context = context
        self.factor = attention_factor(self.rope, context)
        self.grows = self.rope["rope_type"] in GROWS_WITH_LENGTH
        self.frequencies: dict[tuple[int, str], Tensor] = {}

    def inverse(self, length: int, device: torch.device) -> Tensor:
        """The inverse frequencies for sequences of this length, kept for the next batch."""
        if self.rope["rope_type"] == "dynamic":
            length = max(length, self.context)
        elif self.rope["rope_type"] == "longrope":
            original = self.rope["original_max_position_embeddings"]
            length = original + 1 if length > original else original
        else:
            length = 0
        key = (length, str(device))
        if key not in self.frequencies:
            if len(self.frequencies) > 64:
                self.frequencies.clear()
            values = inverse_frequencies(self.rope, self.head_width, self.context, length)
            self.frequencies[key] = values.to(device)
        return self.frequencies[key]

    def angles(self, positions: Tensor, longest: int | Tensor) -> Tensor:
        """The angle of every pair at every position: [N, head width / 2]."""
        if not self.grows or isinstance(longest, int):
            inverse = self.inverse(longest if isinstance(longest, int) else 0, positions.device)
            return positions.float()[:, None] * inverse
        lengths, which = torch.unique(longest, return_inverse=True)
        rows = torch.stack([self.inverse(int(length), positions.device) for length in lengths])
        return positions.float()[:, None] * rows[which]

    def __call__(self, positions: Tensor, longest: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine, [N, 1, head width / 2], scaled by the attention factor."""
        angles = self.angles(positions, longest)[:, None, :]
        cosine, sine = angles.cos(), angles.sin()
        if self.factor != 1.0:
            cosine, sine = cosine * self.factor, sine * self.factor
        return cosine.to(dtype), sine.to(dtype)
