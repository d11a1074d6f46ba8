"""The road of stages with what each took, and the curves of their training."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from trivium.kit.numbers import short
from trivium.kit.progress import duration
from trivium.lab import page_sentences as sentence
from trivium.lab.page_figures import Axis, Line, axis, legend, panel, scroll, table, told
from trivium.lab.writing import figure

NAMED = {
    "loss": "loss (nats per token)",
    "bits_per_byte": "bits per byte, unseen",
    "validation_loss": "loss on unseen text",
    "reward": "reward",
    "pass@1": "right with one try",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "tokens per answer",
    "kl": "KL from the reference",
    "rewards/accuracies": "pairs ranked right",
    "rewards/margins": "margin between answers",
    "accuracy": "pairs ranked right",
}
MEASURED = "What the stages measured themselves when they were done, with 95 % intervals"
HANDED = "What each stage took over from its parent and changed"
SHOWN = {
    "reward": ("reward", "completions/mean_length", "entropy"),
    "rewards/accuracies": ("rewards/accuracies", "rewards/margins", "loss"),
    "accuracy": ("accuracy", "loss"),
    "loss": ("loss", "bits_per_byte"),
}


def road_section(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """The stages as a tree, each with tokens, arithmetic, time and its share."""
    if not raw["stages"]:
        return ""
    stages = {stage["name"]: stage for stage in raw["stages"]}
    costs = {row["stage"]: row for row in numbers["cost"]}
    rows = []
    for name, lead in _tree(stages):
        stage, cost = stages[name], costs[name]
        others = [one for one in stage["parents"] if one != _above(stage)]
        on = ", ".join([*others, *stage["outside"]])
        share = cost["seconds share"]
        rows.append(
            f'<tr><th scope="row"><span class="tree" aria-hidden="true">{lead}</span>{escape(name)}</th>'
            f"<td>{escape(stage['kind'])}</td><td>{_short(stage['tokens'])}</td><td>{_short(stage['flops'])}</td>"
            f"<td>{duration(stage['seconds']) if stage['seconds'] is not None else '–'}</td>"
            f'<td>{figure(share, "share")}<svg class="bar" aria-hidden="true" focusable="false"><rect '
            'class="rail" '
            f'width="100%" height="100%" rx="2"/><rect width="{100 * share:.2f}%" height="100%" '
            'rx="2"/></svg></td>'
            f'<td class="on">{escape(on)}</td></tr>'
        )
    head = "".join(
        f'<th scope="col">{one}</th>'
        for one in (
            "stage",
            "kind",
            "tokens",
            "operations",
            "time",
            "share of the time",
            "beside its parent, it read",
        )
    )
    changes = [
        [stage["name"], str(row["change"]), _told(row["before"]), _told(row["after"])]
        for stage in raw["stages"] for row in stage["changes"]
    ]  # fmt: skip
    handed = ""
    if changes:
        handed = table(["stage", "what", "before", "after"], changes, HANDED, HANDED)
    return (
        '<p class="lead">A stage starts from the one it hangs below. Operations are the multiplications and '
        "additions in the matrix products of all models that took part, counted while the stage ran; the "
        "masked half of attention is computed, so it counts.</p>"
        f'<p class="see">{escape(sentence.cost(numbers["cost"]))}</p>'
        f'{scroll("The stages and what they cost")}<table class="road"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{handed}"
    )


def _short(value: float | None) -> str:
    return "–" if value is None else short(value)


def _told(value: Any) -> str:
    return figure(value) if isinstance(value, int | float) else str(value)


def _above(stage: Mapping[str, Any]) -> str | None:
    """The stage another hangs below: the one its model comes from, else the last it stands on."""
    found: str | None = stage["from"] or (stage["parents"][-1] if stage["parents"] else None)
    return found


def _tree(stages: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The names in the order of a tree, each with the branches drawn before it."""
    children: dict[str | None, list[str]] = {}
    for name, stage in stages.items():
        above = _above(stage)
        children.setdefault(above if above in stages else None, []).append(name)
    found: list[tuple[str, str]] = []

    def add(name: str, lead: str, branch: str) -> None:
        found.append((name, lead + branch))
        below = children.get(name, [])
        inner = lead + {"": "", "├ ": "│ ", "└ ": "  "}[branch]
        for child in below:
            add(child, inner, "└ " if child == below[-1] else "├ ")

    for root in children.get(None, []):
        add(root, "", "")
    return found


def curves_section(raw: Mapping[str, Any]) -> str:
    """For each stage that trained, what it learned by and how it went on unseen text."""
    panels, rows = [], []
    for name, curves in raw["curves"].items():
        series = _chosen(curves)
        for key in series:
            points = curves[key]
            steps = Axis(points[0][0], points[-1][0], (points[0][0], points[-1][0]), "step")
            line = Line(key, [(step, value, None, None) for step, value in points], dots=len(points) <= 12)
            panels.append(
                panel(f"{name}: {NAMED.get(key, key)}", [line], steps, axis([value for _, value in points]))
            )
        for key, points in curves.items():
            values = [value for _, value in points]
            rows.append([f"{name}: {key}", *map(figure, (values[0], min(values), max(values), values[-1]))])
    measured = [
        [f"{stage['name']}: {name}", told(one), str(one.get("n", ""))]
        for stage in raw["stages"]
        for name, one in stage["measured"].items()
    ]
    if not panels:
        return ""
    labels = legend(Axis(0, 1, (), "optimiser steps"), Axis(0, 1, (), "what the panel's title names"), [])
    return (
        '<p class="lead">How the numbers that were trained, or watched, went from step to step. A loss '
        "says how "
        "surprised the model is by the next token; each stage reads other texts, so losses of two stages "
        "cannot be "
        f'compared.</p><p class="see">{escape(_went(raw["curves"]))}</p>{labels}'
        f'<div class="panels">{"".join(panels)}</div>'
        + table(["curve", "first", "least", "most", "last"], rows, "Where the curves begin and end")
        + (table(["stage", "value", "n"], measured, MEASURED, MEASURED) if measured else "")
    )


def _chosen(curves: Mapping[str, Any]) -> list[str]:
    """What a stage learned by comes first: rewards, pairs, or text."""
    for sign, first in SHOWN.items():
        if sign in curves:
            return [key for key in first if key in curves]
    return []


def _went(curves: Mapping[str, Any]) -> str:
    said = []
    for name, found in curves.items():
        key = next(
            (
                one
                for one in ("bits_per_byte", "reward", "rewards/accuracies", "accuracy", "loss")
                if one in found
            ),
            None,
        )
        if key is not None and len(found[key]) > 1:
            first, last = found[key][0][1], found[key][-1][1]
            said.append(f"{name}: {NAMED.get(key, key)} {figure(first)} → {figure(last)}")
    return (
        f"From the first to the last value logged, {'; '.join(said)}. Single values of one run, "
        "without intervals."
    )
