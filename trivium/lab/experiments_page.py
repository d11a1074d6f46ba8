"""An experiment's page: made of the JSON beside it alone, opened from disk, without a script."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.lab.experiments_numbers import figure, interval

ROW = 44
_CLASSES = {"supported": "yes", "not shown": "open", "control did not fail": "no"}


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    style = files("trivium.lab").joinpath("experiments.css").read_text(encoding="utf-8")
    many = len(found["seeds"])
    parts = [
        f"<h1>{escape(found['question'] or found['recipe'])}</h1>",
        f"<p class=quiet>Experiment <code>{escape(found['recipe'])}</code>: {len(found['arms'])} arms, "
        f"each with {'the same seed' if many == 1 else f'the same {many} seeds'}.</p>",
        "<h2>What was claimed, and what was found</h2>",
        *(_claim(claim, many) for claim in found["claims"]),
        "<h2>Every number</h2>",
        "<p class=quiet>A dot is a seed; the bar is the 95 % interval of the mean over seeds, never narrower "
        "than the questions asked allow. Claims compare arms seed by seed, "
        "which is sharper than comparing bars.</p>",
        *(_measure(label, measure, found) for label, measure in found["measures"].items()),
        "<h2>What it cost</h2>",
        _costs(found),
    ]
    title = escape(f"{found['recipe']}: an experiment")
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport "
        f'content="width=device-width, initial-scale=1"><title>{title}</title>\n<style>\n{style}</style>\n'
        "<main>\n" + "\n".join(parts) + "\n</main></html>\n"
    )


def sentence(claim: Mapping[str, Any], many: int) -> str:
    """What a verdict rests on; it never says more than the intervals do."""
    arm, control = claim["arm"], claim["control"]
    against = f" minus {claim['against']}" if claim["against"] else ""
    on = claim["on"]
    bound = (
        f"above {figure(claim['above'])}" if claim["above"] is not None else f"below {figure(claim['below'])}"
    )
    effect = f"‘{on}’ of {arm}{against} is {_told(claim['effect'])}; the claim needs it {bound}"
    if claim["against"] == control:
        beside = f"The control is {control} itself, and {arm} has to differ from it"
    else:
        beside = f"The control must not do that: {control}{against} is {_told(claim['control_effect'])}"
        beside += f", and {arm} minus {control} is {_told(claim['over_control'])}"
    return f"{effect}. {beside}. {_why(claim, many)}"


def _why(claim: Mapping[str, Any], many: int) -> str:
    bound, sign = (claim["above"], 1) if claim["above"] is not None else (claim["below"], -1)
    if claim["verdict"] == "control did not fail":
        return "The control does it too, so what is said to matter is not what matters."
    if claim["verdict"] == "supported":
        return f"Chance seldom does this (p = {figure(claim['corrected_p'])}, corrected for all claims)."
    if sign * (claim["effect"]["value"] - bound) <= 0:
        return "That is on the other side, so the claim is not shown."
    if many == 1:
        return "One seed says nothing about other seeds, so the claim is not shown."
    if claim["effect"]["low"] is None or claim["over_control"]["low"] is None:
        return (
            "Nothing bounds what chance does here: seeds agree to the last digit, or a number's own interval "
            "is open. So the claim is not shown."
        )
    return "Chance could do this, so the claim is not shown."


def _told(found: Mapping[str, Any]) -> str:
    return f"{figure(found['value'])} ({interval(found)})"


def _claim(claim: Mapping[str, Any], many: int) -> str:
    return (
        f'<section class="claim {_CLASSES[claim["verdict"]]}"><h3>{escape(claim["says"])}</h3>'
        f"<p><strong>{claim['verdict'].capitalize()}.</strong> {escape(sentence(claim, many))}</p></section>"
    )


def _measure(label: str, measure: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    since = f", minus that of <code>{escape(measure['since'])}</code>" if measure["since"] else ""
    head = "".join(f"<th>seed {seed}</th>" for seed in found["seeds"])
    rows = "".join(
        f"<tr><th scope=row>{escape(arm)}</th><td>{figure(one['interval']['value'])}</td>"
        f"<td>{interval(one['interval'])}</td>"
        f"{''.join(f'<td>{figure(value)}</td>' for value in one['values'])}</tr>"
        for arm, one in measure["arms"].items()
    )
    return (
        f"<figure><figcaption><h3>{escape(label)}</h3><p class=quiet>"
        f"<code>{escape(measure['take'])}</code> of <code>{escape(measure['stage'])}</code>{since}</p>"
        f"</figcaption>{_dots(label, measure['arms'])}<div class=scroll><table><tr><th>arm</th><th>mean</th>"
        f"<th>95 % interval</th>{head}</tr>{rows}</table></div></figure>"
    )


def _dots(label: str, arms: Mapping[str, Any]) -> str:
    """Seeds as dots, intervals as bars, a row an arm; places are shares of the width, for any screen."""
    values = [value for one in arms.values() for value in one["values"]]
    low, high = min(values), max(values)
    room = (high - low) * 0.35 or abs(high) * 0.1 or 1.0
    low, high = max(low - room, 0.0) if low >= 0 else low - room, high + room

    def across(value: float) -> str:
        return f"{2 + 96 * (min(max(value, low), high) - low) / (high - low):.2f}%"

    parts = []
    for place, (arm, one) in enumerate(arms.items()):
        y = place * ROW + 30
        inside = one["interval"]
        parts.append(f'<text y="{y - 13}">{escape(arm)}</text>')
        if inside["low"] is not None:
            ends = f'x1="{across(inside["low"])}" x2="{across(inside["high"])}"'
            parts.append(f'<line class=bar {ends} y1="{y}" y2="{y}"/>')
        parts += [f'<circle cx="{across(value)}" cy="{y}" r="4"/>' for value in one["values"]]
        mean = across(inside["value"])
        parts.append(f'<line class=mean x1="{mean}" x2="{mean}" y1="{y - 8}" y2="{y + 8}"/>')
    foot = len(arms) * ROW
    parts.append(f'<line class=axis x1="0" x2="100%" y1="{foot}" y2="{foot}"/>')
    parts += [
        f'<text class=tick x="{across(mark)}" y="{foot + 16}" text-anchor=middle>{figure(mark)}</text>'
        for mark in _marks(low, high)
    ]
    return (
        f'<svg width="100%" height="{foot + 24}" role=img '
        f'aria-label="{escape(label)} of every arm, a dot a seed">{"".join(parts)}</svg>'
    )


def _marks(low: float, high: float) -> list[float]:
    """Round numbers to read a scale by, three to six of them and none at its very ends."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    first = math.ceil((low + 0.04 * (high - low)) / step)
    last = math.floor((high - 0.04 * (high - low)) / step)
    return [round(place * step, 12) for place in range(first, last + 1)]


def _costs(found: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(arm)}</th><td>{short(one['tokens'])}</td>"
        f"<td>{duration(one['seconds'])}</td></tr>"
        for arm, one in found["arms"].items()
    )
    return (
        "<p class=quiet>Of one seed, the stages it shares with other arms included.</p>"
        "<div class=scroll><table>"
        f"<tr><th>arm</th><th>tokens learnt from</th><th>time</th></tr>{rows}</table></div>"
    )
