"""How far a model's next-token distributions lie from those of the model before, and where in a text."""

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.lab.charts import Axis, Line, Panel, Table, axis, rows_of, upper
from trivium.lab.closeness_table import drawn
from trivium.lab.formatting import with_count

FULL_TINT = 3.0
"""Nats from which on a token is shaded in full."""
Pairs = Sequence[Mapping[str, Any]]


def divergences(pairs: Pairs) -> dict[str, Any]:
    """KL of every pair of models on every kind of text."""
    scale = axis([upper(one["kl"]) for pair in pairs for one in pair["kinds"].values()], zero=True)
    groups = [
        rows_of(_between(pair), {kind: one["kl"] for kind, one in pair["kinds"].items()}, scale)
        for pair in pairs
    ]
    columns = {
        "kl": "KL", "reverse": "KL, reversed", "js": "Jensen–Shannon", "entropy before": "entropy before",
        "entropy": "entropy after",
    }  # fmt: skip
    listed = [
        [f"{_between(pair)}, {kind}", *(with_count(found[name]) for name in columns)]
        for pair in pairs
        for kind, found in pair["kinds"].items()
    ]
    caption = "Nats per token, with 95 % intervals over texts"
    return {"rows": groups, "table": Table(["models and texts", *columns.values()], listed, caption)}


def by_place(pairs: Pairs) -> dict[str, Any]:
    """KL by fifths of the text, on a scale of its own for each pair of models."""
    x = Axis(1, 5, (1, 5), "fifths of the text", lambda place: "first" if place == 1 else "last")
    panels, rows = [], []
    for pair in pairs:
        highest = [upper(one) for fifths in pair["fifths"].values() for one in fifths]
        y = axis([*highest, 0.0], "KL, nats per token", zero=True)
        for kind, fifths in pair["fifths"].items():
            # texts of a few tokens have none in some of the fifths
            points = [
                (place, one["value"], one["low"], one["high"])
                for place, one in enumerate(fifths, 1)
                if one["value"] is not None
            ]
            if points:
                panels.append(Panel(f"{pair['model']}, {kind}", [Line(kind, points)], x, y))
            rows.append([f"{_between(pair)}, {kind}", *map(with_count, fifths)])
    heading = ["models and texts", "first fifth", "second", "third", "fourth", "last"]
    return {
        "panels": panels,
        "keys": [("main", "KL from the model before; shaded its 95 % interval")],
        "table": Table(heading, rows, "KL by place in the text"),
    }


def shaded_texts(pairs: Pairs) -> list[dict[str, Any]]:
    """The first text of each kind under every pair of models, each token with its divergence."""
    found = []
    for pair in pairs:
        seen: set[str] = set()
        for text in pair["texts"]:
            if text["kind"] in seen or not text["kl"]:
                continue
            seen.add(text["kind"])
            tokens = [
                (token, value, min(value / FULL_TINT, 1)) for token, value in zip(text["tokens"], text["kl"])
            ]
            title = f"{_between(pair)}, {text['kind']}"
            found.append({"title": title, "before": text["before"], "tokens": tokens})
    return found


def _between(pair: Mapping[str, Any]) -> str:
    return f"{pair['model']} from {pair['before']}"


def matrices(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Distance and angle of every two models as heat maps, and their tree."""
    if found is None:
        return None
    maps = {}
    for name in ("distance", "angle"):
        most = max((abs(one) for row in found[name] for one in row if one is not None), default=0.0) or 1.0
        maps[name] = [
            (model, [_tinted(one, most) for one in row]) for model, row in zip(found["models"], found[name])
        ]
    tree = "\n".join(drawn(found["tree"]))
    return {"models": found["models"], "base": found["base"], "maps": maps, "tree": tree}


def _tinted(value: float | None, most: float) -> tuple[str | None, int]:
    """A number's text, and how deep its cell is coloured, in per cent."""
    return (None, 0) if value is None else (f"{value:.2f}", round(45 * abs(value) / most))
