"""The same questions to everybody side by side, and where in a text two models part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trivium.lab import page_sentences as sentence
from trivium.lab.compare_examples import IN_ALL, answer, examples, marked
from trivium.lab.page_figures import Axis, Line, axis, beside, counted, legend, panel, table, whisker
from trivium.lab.writing import figure

FULL_TINT = 3.0
LONGEST = 700


def answers_section(raw: Mapping[str, Any]) -> str:
    """Some questions with everybody's answers."""
    chosen = examples(raw)
    if not chosen:
        return ""
    order = [model["name"] for model in raw["models"]]
    blocks = []
    for one in chosen:
        task = raw["tasks"][one["task"]]
        records = {
            model: next(record for record in task["models"][model]["records"] if record["id"] == one["id"])
            for model in order if model in task["models"]
        }  # fmt: skip
        first = next(iter(records.values()))
        cards = "".join(_card(model, records, raw["before"].get(model)) for model in records)
        expected = f"Expected: {first['expected']}" if first["expected"] else "Judged by a program"
        blocks.append(
            f'<div class="example"><p class="soft">{escape(one["task"])} · {escape(one["why"])}</p>'
            f'<p class="asked">{escape(first["asked"] or "")}</p><p class="soft '
            f'expected">{escape(expected)}</p>'
            f'<div class="said">{cards}</div></div>'
        )
    return (
        '<p class="lead">Questions that became right, that became wrong and that nobody has right, by turns '
        f"as far as there are such, and at most {IN_ALL}. They are picked for being different and are no "
        "fair sample; the table above counts all. Marked is what differs from the answer of the model "
        "before.</p>" + "".join(blocks)
    )


def _card(model: str, records: Mapping[str, Any], before: str | None) -> str:
    text = answer(records[model])[:LONGEST]
    words = escape(text) or '<span class="soft">(nothing)</span>'
    if before is not None and before in records:
        words = "".join(
            f"<mark>{escape(piece)}</mark>" if new and piece.strip() else escape(piece)
            for piece, new in marked(answer(records[before])[:LONGEST], text)
        ) or words  # fmt: skip
    score = records[model]["scores"].get("right")
    if score is None:
        verdict = '<span class="soft">? not judged</span>'
    else:
        verdict = f'<span class="{"right" if score >= 1 else "wrong"}">{_verdict(score)}</span>'
    return f'<div><span class="who"><span>{escape(model)}</span>{verdict}</span><pre>{words}</pre></div>'


def _verdict(score: float) -> str:
    return "✓ right" if score >= 1 else "✗ wrong" if score <= 0 else f"✗ {figure(score, 'share')} right"


def distance_section(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    """How far next-token distributions moved, where in the text, and some texts shaded by it."""
    pairs = numbers["behaviour"]["pairs"]
    measured = [pair for pair in pairs if pair["all"]]
    if not pairs:
        return ""
    lead = (
        '<h3>How far the model moved</h3><p class="lead">Both models read the same unseen texts with '
        "right answers, and "
        "at every token their whole distributions over the next one are compared. KL is how many nats a "
        "text of the "
        "model costs more under the one before (0: the same); Jensen–Shannon is its symmetric sister, at "
        "most 0.69."
        f'</p><p class="see">{escape(sentence.divergence(pairs))}</p>'
    )
    if not measured:
        return lead
    kinds = list(dict.fromkeys(kind for pair in measured for kind in pair["kinds"]))
    top = [pair["kinds"][kind]["kl"] for pair in measured for kind in pair["kinds"]]
    scale = axis([one["high"] if one["high"] is not None else one["value"] for one in top], zero=True)
    rows = ""
    for pair in measured:
        rows += f"<h4>{escape(pair['model'])} from {escape(pair['before'])}</h4>"
        for kind in kinds:
            one = pair["kinds"][kind]["kl"]
            rows += f'<span class="name">{escape(kind)}</span>{whisker(one, scale)}'
            rows += beside(one)
    listed = [
        [f"{pair['model']} from {pair['before']}, {kind}",
         *(counted(found[name]) for name in ("kl", "reverse", "js", "entropy before", "entropy"))]
        for pair in measured for kind, found in pair["kinds"].items()
    ]  # fmt: skip
    heading = [
        "models and texts",
        "KL",
        "KL the other way",
        "Jensen–Shannon",
        "entropy before",
        "entropy after",
    ]
    return (
        f'{lead}<p class="see">{escape(sentence.entropy(measured))}</p><figure><div class="rows">{rows}</div>'
        f"{table(heading, listed, 'Nats per token, with 95 % intervals over texts')}</figure>"
        + _places(measured, kinds) + _strips(raw["behaviour"])
    )  # fmt: skip


def _places(pairs: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> str:
    x = Axis(1, 5, (1, 5), "fifths of the text", lambda place: "first" if place == 1 else "last fifth")
    panels, rows = [], []
    for pair in pairs:
        highs = [
            one["high"] if one["high"] is not None else one["value"]
            for fifths in pair["fifths"].values()
            for one in fifths
        ]
        y = axis([*highs, 0.0], "KL in nats per token, on a scale of its own for each model", zero=True)
        for kind in kinds:
            fifths = pair["fifths"][kind]
            points = [(place, one["value"], one["low"], one["high"]) for place, one in enumerate(fifths, 1)]
            panels.append(panel(f"{pair['model']}, {kind}", [Line(kind, points)], x, y))
            rows.append([f"{pair['model']} from {pair['before']}, {kind}", *map(counted, fifths)])
    return (
        f'<h3>Where in the text they part</h3><p class="see">{escape(sentence.places(pairs))}</p><figure>'
        f"{legend(x, y, [('main', 'KL from the model before; shaded its 95 % interval')])}"
        f'<div class="panels">{"".join(panels)}</div>'
        + table(["models and texts", "first fifth", "second", "third", "fourth", "last"], rows, "KL by place")
        + "</figure>"
    )


def _strips(pairs: Sequence[Mapping[str, Any]]) -> str:
    """The first text of each kind under the pair that moved, every token shaded by its divergence."""
    blocks = []
    for pair in pairs:
        shown: set[str] = set()
        for text in pair["texts"]:
            if text["kind"] in shown or not text["kl"]:
                continue
            shown.add(text["kind"])
            words = "".join(
                f'<span style="--k:{min(value / FULL_TINT, 1):.2f}" title="{value:.2f} '
                f'nats">{escape(token)}</span>'
                for token, value in zip(text["tokens"], text["kl"])
            )
            before = f'<span class="before">{escape(text["before"])}</span> ' if text["before"] else ""
            blocks.append(
                f"<h4>{escape(pair['model'])} from {escape(pair['before'])}, {escape(text['kind'])}</h4>"
                f'<p class="strip">{before}{words}</p>'
            )
    if not blocks:
        return ""
    return (
        '<details class="numbers"><summary>Some of these texts, token by token</summary><p '
        'class="soft">The darker a '
        f"token, the more the two models disagreed before it was read; full colour is {FULL_TINT:g} nats "
        "or more."
        f"</p>{''.join(blocks)}</details>"
    )
