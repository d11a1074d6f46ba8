"""Helpfulness: instructions a program checks, and who wins before a reward model."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from trivium.lab import page_sentences as sentence
from trivium.lab.page_figures import beside, counted, scroll, share_axis, table, tinted, whisker

Raw = Mapping[str, Any]


def help_section(raw: Raw, numbers: Raw) -> str:
    """Instructions by kind, and win rates."""
    found = numbers["help"]
    if not found:
        return ""
    kinds = list(dict.fromkeys(kind for cells in found["models"].values() for kind in cells))
    head = "".join(f'<th scope="col">{escape(model)}</th>' for model in found["models"])
    body = "".join(
        f'<tr><th scope="row">{escape(kind)}</th>'
        + "".join(tinted(cells.get(kind)) for cells in found["models"].values())
        + "</tr>"
        for kind in kinds
    )
    return (
        '<p class="lead">Instructions whose fulfilment a program checks, so that nobody has to judge. '
        "The fuller "
        "the colour, the more of them were followed; a kind has few questions, so its interval is wide.</p>"
        f'<p class="see">{escape(sentence.helpfulness(found))}</p><figure>{scroll("Instructions by kind")}'
        f'<table class="heat"><thead><tr><th scope="col">kind of instruction</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></figure>{_wins(numbers['wins'])}"
    )


def _wins(wins: list[Raw]) -> str:
    if not wins:
        return ""
    rows, listed = "", []
    scale = share_axis()
    for one in wins:
        rows += f"<h4>{escape(one['model'])} against {escape(one['before'])}</h4>"
        rows += (
            f'<span class="name">{escape(one["judge"])}</span>{whisker(one["rate"], scale, reference=0.5)}'
        )
        rows += beside(one["rate"], "share")
        between = f"{one['model']} against {one['before']}, judged by {one['judge']}"
        listed.append([between, counted(one["rate"], "share"), counted(one["longer"], "share")])
    return (
        '<h3>Before a reward model</h3><p class="lead">Of two answers to one instruction the reward '
        "model prefers the "
        "one it scores higher; a tie is half a win. It reads one answer at a time, so neither can gain "
        "by standing "
        "first: swapping the two only mirrors the rate. Half is what equals would reach. A reward model "
        "has tastes "
        "of its own; how often the preferred answer is the longer one is in the table.</p>"
        f'<p class="see">{escape(sentence.wins(wins))}</p><figure><div class="rows">{rows}</div>'
        + table(["who", "wins", "of the preferred, longer"], listed, "Win rates before a reward model")
        + "</figure>"
    )
