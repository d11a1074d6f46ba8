"""Small things every part of the page is written with: JSON in few bytes, numbers for people."""

from __future__ import annotations

import json
import math
from typing import Any

from trivium.kit.numbers import short


def compact(content: Any) -> str:
    """JSON without spaces; what is not finite has no place in it."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def figure(value: float | None, kind: str = "number") -> str:
    """A number as a person reads it: a share in per cent, a large number with its letter."""
    if value is None or not math.isfinite(value):
        return "–"
    if kind == "share":
        return f"{100 * value:.0f} %"
    if kind == "points":
        return f"{100 * value:+.0f}".replace("-", "−")
    if 0 < abs(value) < 0.0005:
        return "<0.001" if value > 0 else "−<0.001"
    if abs(value) >= 1000:
        return short(value)
    return f"{value:.3g}".replace("-", "−")


def listed(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
