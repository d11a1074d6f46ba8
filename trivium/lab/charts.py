"""The one kit for pages: axes and lines in per cent of a drawing, and the templates that draw them.

Drawings are inline SVG that stretches while its text, which is HTML, does not. What a chart shows also stands
in a table beside it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.lab import formatting
from trivium.lab.formatting import Interval, figure

TEMPLATES = Path(__file__).parent / "templates"
Format = Callable[[float | None], str]


@dataclass(frozen=True)
class Axis:
    """The range of an axis, its ticks, its label, and how a tick is written."""

    low: float
    high: float
    ticks: Sequence[float]
    label: str = ""
    write: Format = figure
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, in per cent from the low end."""
        low, high, here = self.low, self.high, value
        if self.logarithmic:
            low, high, here = math.log(low), math.log(high), math.log(value)
        return 100 * min(max((here - low) / ((high - low) or 1), 0.0), 1.0)


def axis(values: Iterable[float], label: str = "", write: Format = figure, *, zero: bool = False) -> Axis:
    """An axis that holds these values, with three to six round ticks that read differently."""
    values = list(values)
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 3)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [place * step for place in range(first, last + 1)]
    if len(set(map(write, ticks))) < len(ticks):
        # Values far from zero and close together: as many decimals as the step has.
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        write = lambda value: "" if value is None else f"{value:,.{decimals}f}".replace("-", "−")
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), ticks, label, write)


def log_axis(values: Iterable[float], label: str = "", write: Format = figure) -> Axis:
    """A logarithmic axis that holds these values, all above zero, with ticks at 1, 2 and 5 of each power."""
    values = list(values)
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [factor * 10.0**power for power in powers for factor in factors]
        first = max((one for one in ticks if one <= low), default=low)
        last = min((one for one in ticks if one >= high), default=high)
        inside = [one for one in ticks if first <= one <= last]
        if len(inside) <= 6:
            break
    ends = (first, last) if first < last else (first / 2, last * 2)
    return Axis(ends[0], ends[1], inside, label, write, logarithmic=True)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def share_axis(label: str = "", most: float = 1.0) -> Axis:
    """From none to all, or to the next round share above the largest value."""
    top = next(end for end in (0.2, 0.5, 1.0) if most <= end or end == 1.0)
    return Axis(0.0, top, (0.0, top / 2, top), label, lambda value: figure(value, "share"))


def upper(interval: Interval) -> float:
    """The upper end of an interval, or its value where nothing bounds it; 0 where there is no value."""
    if interval["value"] is None:
        return 0.0
    return float(interval["value"] if interval["high"] is None else interval["high"])


@dataclass(frozen=True)
class Line:
    """One line of a panel: points (x, y, low, high), drawn as `main`, `other` or `faint`."""

    name: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    look: str = "main"
    dots: bool = True

    def path(self, x: Axis, y: Axis) -> str:
        """The points of a polyline in per cent."""
        return " ".join(f"{x.place(a):.2f},{100 - y.place(b):.2f}" for a, b, *_ in self.points)

    def outside(self, x: Axis, y: Axis) -> list[tuple[float, bool]]:
        """Where along the chart the line leaves its scale, one mark per stretch, and whether upwards."""
        marks: list[tuple[float, bool]] = []
        before: bool | None = None
        for a, b, *_ in self.points:
            above = True if b > y.high else False if b < y.low else None
            if above is not None and above is not before:
                marks.append((x.place(a), above))
            before = above
        return marks

    def band(self, x: Axis, y: Axis) -> str | None:
        """The points of the polygon between the interval's ends; None where there are none."""
        ends = [(x.place(a), low, high) for a, _, low, high in self.points if None not in (low, high)]
        if self.look != "main" or not ends:
            return None
        above = [f"{a:.2f},{100 - y.place(high or 0.0):.2f}" for a, _, high in ends]
        below = [f"{a:.2f},{100 - y.place(low or 0.0):.2f}" for a, low, _ in reversed(ends)]
        return " ".join(above + below)


@dataclass(frozen=True)
class Panel:
    """A small chart of some lines with intervals; `diagonal` draws where y equals x."""

    title: str
    lines: Sequence[Line]
    x: Axis
    y: Axis
    diagonal: bool = False
    latest: str = ""
    """The last value, beside the title."""
    note: str = ""
    """What a reader has to know, such as values outside the scale."""


@dataclass(frozen=True)
class Row:
    """A value with its interval on a scale, and single measurements as dots."""

    name: str
    interval: Interval
    dots: Sequence[float] = ()


@dataclass(frozen=True)
class Rows:
    """Rows under one heading that share a scale."""

    title: str
    rows: Sequence[Row]
    axis: Axis
    kind: str = "number"
    reference: float | None = None


def rows_of(
    title: str,
    values: Mapping[str, Interval | None],
    scale: Axis,
    kind: str = "number",
    reference: float | None = None,
) -> Rows:
    """Rows for the values that are known."""
    known = {name: one for name, one in values.items() if one is not None and one.get("value") is not None}
    return Rows(title, [Row(name, one) for name, one in known.items()], scale, kind, reference)


@dataclass(frozen=True)
class Table:
    """Numbers under a heading; the first cell of a row names it."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    summary: str = "Numbers"


def _across(value: float) -> str:
    return f"{value:.2f}%"


@cache
def environment() -> jinja2.Environment:
    """The templates of all pages; what is put into them is escaped."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "figure": figure,
        "with_ci": formatting.with_ci,
        "with_count": formatting.with_count,
        "across": _across,
        "short": lambda value: "–" if value is None else short(value),
        "duration": lambda value: "–" if value is None else duration(value),
    }
    made.globals["plural"] = formatting.plural
    # Files of the package, put into the page as they are.
    made.globals["file"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return made


def render(template: str, **content: Any) -> str:
    """A page from a template and what it shows."""
    return environment().get_template(template).render(content)
