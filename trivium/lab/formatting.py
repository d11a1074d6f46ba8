"""Numbers, intervals and lists as a person reads them, for every page and table of the lab."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.kit.numbers import short

Interval = Mapping[str, Any]
"""`value`, `low`, `high` (None where nothing bounds it) and `n`."""


def compact(content: Any) -> str:
    """JSON without spaces; a number that is not finite is an error."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def figure(value: float | None, kind: str = "number") -> str:
    """A number as text: a `share` in per cent, a difference in `points`, a large `number` with its letter.

    A small number is "<0.001", but for a `setting` such as a learning rate, where 2e-05 and 1e-06 differ.
    """
    if value is None or not math.isfinite(value):
        return "–"
    if kind == "share":
        return f"{100 * value:.0f} %"
    if kind == "points":
        return f"{100 * value:+.0f}".replace("-", "−")
    if 0 < abs(value) < 0.0005 and kind != "setting":
        return "<0.001" if value > 0 else "−<0.001"
    if abs(value) >= 1000:
        return short(value)
    return f"{value:.3g}".replace("-", "−")


def with_ci(interval: Interval | None, kind: str = "number") -> str:
    """A value with its interval."""
    if interval is None or interval.get("value") is None:
        return "–"
    if interval["low"] is None and interval["high"] is None:
        return f"{figure(interval['value'], kind)} (interval unknown)"
    low, high = ("?" if end is None else figure(end, kind) for end in (interval["low"], interval["high"]))
    if kind == "share":
        return f"{figure(interval['value'], kind)} ({low.removesuffix(' %')}–{high})"
    return f"{figure(interval['value'], kind)} ({low} to {high})"


def with_count(interval: Interval | None, kind: str = "number") -> str:
    """A value with its interval and the number of items behind it."""
    text = with_ci(interval, kind)
    return text if interval is None or text == "–" else f"{text}, n {interval['n']}"


def count_range(counts: Sequence[int]) -> str:
    """One count, or the smallest and the largest."""
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"


def listed(names: list[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def plural(count: int, noun: str) -> str:
    """`1 model`, `3 models`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def ends(interval: Interval) -> str:
    """An interval in words; one seed leaves it open, and so does what nothing bounds."""
    if interval["low"] is None:
        return "open: one seed" if interval["n"] == 1 else "open: nothing bounds it"
    return f"{figure(interval['low'])} to {figure(interval['high'])}"
