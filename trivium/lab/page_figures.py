"""Drawings for the page: inline SVG that stretches while its text does not, and tables of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from trivium.lab.writing import figure

Interval = Mapping[str, Any]
Format = Callable[[float | None], str]


@dataclass(frozen=True)
class Line:
    """One line of a panel: points (x, y, low, high), and how it is drawn: `main`, `other` or `faint`."""

    name: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    look: str = "main"
    dots: bool = True


@dataclass(frozen=True)
class Axis:
    """The range of an axis, the places that are named on it, and how."""

    low: float
    high: float
    ticks: Sequence[float]
    name: str = ""
    write: Format = figure
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, in per cent from the low end."""
        low, high, here = self.low, self.high, value
        if self.logarithmic:
            low, high, here = math.log(low), math.log(high), math.log(value)
        return 100 * min(max((here - low) / ((high - low) or 1), 0.0), 1.0)


def axis(values: Sequence[float], name: str = "", write: Format = figure, *, zero: bool = False) -> Axis:
    """An axis that holds these values, with three or four round ticks."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = _round_step((high - low) / 3)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [place * step for place in range(first, last + 1)]
    return Axis(min(low, ticks[0]), max(high, ticks[-1]), ticks, name, write)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)


def share_axis(name: str = "", most: float = 1.0) -> Axis:
    """From none to all, or to a part that holds the most there is."""
    top = next(end for end in (0.2, 0.5, 1.0) if most <= end or end == 1.0)
    return Axis(0.0, top, (0.0, top / 2, top), name, lambda value: figure(value, "share"))


def whisker(interval: Interval, axis: Axis, *, reference: float | None = None) -> str:
    """A value with its interval as a dot on a bar, one row high."""
    low = axis.low if interval["low"] is None else interval["low"]
    high = axis.high if interval["high"] is None else interval["high"]
    parts = [
        '<svg class="whisker" aria-hidden="true" focusable="false"><line class="rail" x1="0" x2="100%" '
        'y1="50%" y2="50%"/>'
    ]
    if reference is not None:
        place = _cent(axis.place(reference))
        parts.append(f'<line class="reference" x1="{place}" x2="{place}" y1="0" y2="100%"/>')
    left, right, middle = (_cent(axis.place(one)) for one in (low, high, interval["value"]))
    parts.append(f'<line class="range" x1="{left}" x2="{right}" y1="50%" y2="50%"/>')
    return "".join([*parts, f'<circle class="value" cx="{middle}" cy="50%" r="4.5"/></svg>'])


def panel(title: str, lines: Sequence[Line], x: Axis, y: Axis, *, diagonal: bool = False) -> str:
    """A small chart of some lines with intervals; what it shows stands in the table beside it."""
    inner: list[str] = []
    marks: list[str] = []
    if diagonal:
        inner.append('<line class="reference" x1="0" y1="100" x2="100" y2="0"/>')
    for line in lines:
        placed = [(x.place(a), 100 - y.place(b)) for a, b, *_ in line.points]
        bands = [
            (x.place(a), low, high) for a, _, low, high in line.points if low is not None and high is not None
        ]
        if len(bands) > 1 and line.look == "main":
            upper = [f"{a:.2f},{100 - y.place(high):.2f}" for a, _, high in bands]
            lower = [f"{a:.2f},{100 - y.place(low):.2f}" for a, low, _ in reversed(bands)]
            inner.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
        elif bands and line.look == "main":
            (a, low, high), *_ = bands
            inner.append(
                f'<line class="band-line" x1="{a:.2f}" x2="{a:.2f}" y1="{100 - y.place(low):.2f}" '
                f'y2="{100 - y.place(high):.2f}"/>'
            )
        path = " ".join(f"{a:.2f},{b:.2f}" for a, b in placed)
        inner.append(f'<polyline class="{line.look}" points="{path}"/>')
        if line.dots:
            marks += [
                f'<circle class="{line.look}" cx="{_cent(a)}" cy="{_cent(b)}" r="3"/>' for a, b in placed
            ]
    grid = "".join(
        f'<line class="grid" x1="0" x2="100" y1="{100 - y.place(tick):.2f}" y2="{100 - y.place(tick):.2f}"/>'
        for tick in y.ticks
    )
    rows = "".join(
        f'<span style="bottom:{_cent(y.place(tick))}">{escape(y.write(tick))}</span>' for tick in y.ticks
    )
    columns = "".join(
        f'<span style="left:{_cent(x.place(tick))}" '
        f'class="{_edge(x.place(tick))}">{escape(x.write(tick))}</span>'
        for tick in x.ticks
    )
    return (
        f'<div class="panel"><h4>{escape(title)}</h4><div class="plot" aria-hidden="true">'
        f'<div class="y">{rows}</div><svg focusable="false"><svg viewBox="0 0 100 100" '
        f'preserveAspectRatio="none">{grid}{"".join(inner)}</svg>{"".join(marks)}</svg>'
        f'<div class="x">{columns}</div></div></div>'
    )


def _edge(place: float) -> str:
    return "first" if place < 8 else "last" if place > 92 else ""


def _cent(value: float) -> str:
    return f"{value:.2f}%"


def legend(x: Axis, y: Axis, lines: Sequence[tuple[str, str]]) -> str:
    """What the axes and the lines of all panels mean."""
    keys = "".join(
        f'<span class="key"><svg aria-hidden="true" focusable="false"><line class="{look}" x1="0" '
        'x2="100%" y1="50%" '
        f'y2="50%"/></svg>{escape(name)}</span>'
        for look, name in lines
    )
    axes = f"Upwards: {escape(y.name)}. To the right: {escape(x.name)}."
    return f'<p class="legend">{keys}<span>{axes}</span></p>'


def table(
    heading: Sequence[str], rows: Sequence[Sequence[str]], caption: str, summary: str = "The numbers"
) -> str:
    """The numbers of a figure as a table that unfolds."""
    head = "".join(f'<th scope="col">{escape(one)}</th>' for one in heading)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(one)}</td>" for one in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<details class="numbers"><summary>{escape(summary)}</summary>{scroll(caption)}<table><caption>'
        f"{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def tinted(cell: Interval | None) -> str:
    """A cell of a table of shares: the fuller the colour, the larger the share."""
    if cell is None:
        return '<td class="none">–</td>'
    tint = f"background:color-mix(in oklab, var(--accent) {round(45 * cell['value'])}%, var(--card))"
    low = figure(cell["low"], "share").removesuffix(" %")
    ends = f"{low}–{figure(cell['high'], 'share')} of {cell['n']}"
    return f'<td style="{tint}">{figure(cell["value"], "share")}<small>{ends}</small></td>'


def scroll(label: str) -> str:
    """Opens a box in which something wide can be moved by hand or by key."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label, quote=True)}">'


def told(interval: Interval | None, kind: str = "number") -> str:
    """A value with its interval in words."""
    if interval is None or interval.get("value") is None:
        return "–"
    low, high = ("?" if one is None else figure(one, kind) for one in (interval["low"], interval["high"]))
    if kind == "share":
        return f"{figure(interval['value'], kind)} ({low.removesuffix(' %')}–{high})"
    return f"{figure(interval['value'], kind)} ({low} to {high})"


def counted(interval: Interval | None, kind: str = "number") -> str:
    """A value with its interval and what it rests on, for a table."""
    words = told(interval, kind)
    return words if interval is None or words == "–" else f"{words}, n {interval['n']}"


def beside(interval: Interval, kind: str = "number") -> str:
    """A value with its interval beside its drawing; what it rests on shows under the pointer."""
    return f'<span class="told" title="n {interval["n"]}">{escape(told(interval, kind))}</span>'


def spread(counts: Sequence[int]) -> str:
    """How many items the numbers of a row rest on: one count, or the least and the most."""
    low, high = min(counts, default=0), max(counts, default=0)
    return str(low) if low == high else f"{low}–{high}"
