"""The sections on what models can do: skills, manner, reasoning, help, flattery, confidence, long texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from trivium.lab import page_sentences as sentence
from trivium.lab.page_figures import (
    Axis,
    Line,
    axis,
    beside,
    counted,
    legend,
    panel,
    scroll,
    share_axis,
    spread,
    table,
    tinted,
    told,
    whisker,
)
from trivium.lab.writing import figure

Raw = Mapping[str, Any]
WAYS = {"written": ("main", "written, with its 95 % interval"), "at once": ("other", "at once")}
SIGNS = {True: "▲ better", False: "▼ worse", None: ""}


def skills_section(raw: Raw, numbers: Raw) -> str:
    """Skills by models: every number, and which of them moved."""
    if not numbers["skills"]:
        return ""
    models = [model["name"] for model in raw["models"]]
    head = "".join(
        f'<th scope="col">{escape(model)}<small>{escape(_from(raw, model))}</small></th>' for model in models
    )
    body = ""
    for row in numbers["skills"]:
        kind = "share" if row["share"] else "number"
        cells = "".join(_cell(row, model, kind) for model in models)
        lower = " (less is better)" if row["lower is better"] else ""
        body += (
            f'<tr><th scope="row">{escape(row["task"])}<small>'
            f"{escape(row['metric'])}{lower}</small></th>{cells}"
            f"<td>{spread([cell['n'] for cell in row['cells'].values() if cell])}</td></tr>"
        )
    rows = []
    for row in numbers["skills"]:
        for model, change in row["changes"].items():
            difference = change["difference"]
            rows.append([
                f"{row['task']} ({row['metric']})", f"{change['before']} → {model}", told(difference),
                f"{change['corrected p']:.3g}", str(difference["n"]),
                {True: "better", False: "worse", None: "no difference shown"}[change["better"]],
            ])  # fmt: skip
    asked = "".join(
        f"<li><b>{escape(label)}</b>: {escape(task['description'])}</li>"
        for label, task in raw["tasks"].items()
    )
    return (
        '<p class="lead">Every model was asked the same questions. A cell holds the value and its 95 % '
        "interval; it is "
        "coloured where the model is shown to differ from the one named under its heading (paired test, "
        "Holm's "
        "correction over the whole table). An uncoloured cell means not shown, which is not the same as "
        "equal.</p>"
        f'<p class="see">{escape(sentence.skills(numbers["skills"]))}</p><figure>{scroll("Skills by models")}'
        '<table class="heat"><thead><tr><th '
        f'scope="col">skill</th>{head}<th scope="col">n</th></tr></thead><tbody>{body}</tbody></table></div>'
        f'<details class="numbers"><summary>What the skills mean</summary><ul>{asked}</ul></details>'
        + table(
            ["skill", "from → to", "difference (95 %)", "p, corrected", "pairs", "verdict"],
            rows,
            "Paired differences",
        )
        + "</figure>"
    )


def _from(raw: Raw, model: str) -> str:
    before = raw["before"].get(model)
    return f"against {before}" if before else "the first"


def _cell(row: Raw, model: str, kind: str) -> str:
    cell, change = row["cells"].get(model), row["changes"].get(model)
    if cell is None:
        words = "no case" if model in row["asked"] else "not asked"
        return f'<td class="none">{words}</td>'
    better = change["better"] if change else None
    look = {True: "better", False: "worse", None: ""}[better]
    ends = "–".join(
        "?" if end is None else figure(end, kind).replace(" %", "") for end in (cell["low"], cell["high"])
    )
    sign = f"<i>{SIGNS[better]}</i>" if better is not None else ""
    number = figure(cell["value"], kind)
    return f'<td class="{look}" title="n {cell["n"]}">{number}{sign}<small>{ends}</small></td>'


def _rows(
    title: str, values: Mapping[str, Any], scale: Axis, kind: str, reference: float | None = None
) -> str:
    found = f"<h4>{escape(title)}</h4>"
    for name, one in values.items():
        if one is not None and one.get("value") is not None:
            drawn = whisker(one, scale, reference=reference)
            found += f'<span class="name">{escape(name)}</span>{drawn}{beside(one, kind)}'
    return found


def manner_section(raw: Raw, numbers: Raw) -> str:
    """Length, ending, form and sameness of answers."""
    manner = numbers["behaviour"]["manner"]
    if not manner:
        return ""
    names = {"ended": "Ends its answer by itself", "in form": "Sums that state a result in the asked form",
             "same": "Same answer, word for word, as the model before"}  # fmt: skip
    scale = axis([one["tokens"]["high"] or one["tokens"]["value"] for one in manner.values()], zero=True)
    rows = _rows("Tokens per answer", {name: one["tokens"] for name, one in manner.items()}, scale, "number")
    for key, title in names.items():
        values = {name: one[key] for name, one in manner.items() if key in one}
        if values:
            rows += _rows(title, values, share_axis(), "share")
    listed = [
        [name, counted(one["tokens"]), *(counted(one.get(key), "share") for key in names),
         "template" if one["style"] == "chat" else "as text"]
        for name, one in manner.items()
    ]  # fmt: skip
    return (
        '<h3>What the answers look like</h3><p class="lead">Answers to instructions and sums. A model '
        'that never learned to end its turn '
        "is asked with plain text to continue and its first block is judged.</p>"
        f'<p class="see">{escape(sentence.manner(manner, raw["before"]))} '
        f'{escape(sentence.form(manner, raw["before"]))}</p><figure><div class="rows">{rows}</div>'
        + table(["model", "tokens", *names.values(), "asked through"], listed, "The manner of answers")
        + "</figure>"
    )  # fmt: skip


def depth_section(raw: Raw, numbers: Raw) -> str:
    """Accuracy by steps, written and at once; the steps shown and their validity; what more tries give."""
    depth = numbers["depth"]
    if not depth:
        return ""
    parts = [
        f'<p class="lead">Word problems that take several steps{_ways(depth)}. A step is an equation in the '
        f"answer; it is valid if it holds.{_thoughtless(raw, depth)}</p>",
        _steps(depth),
    ]
    shown = {model: one for model, one in depth["models"].items() if "steps" in one}
    if shown:
        scale = axis([one["steps"]["high"] or one["steps"]["value"] for one in shown.values()], zero=True)
        rows = _rows(
            "Steps written per answer", {name: one["steps"] for name, one in shown.items()}, scale, "number"
        )
        rows += _rows(
            "Of the answers with steps: the share of them that hold",
            {name: one["valid steps"] for name, one in shown.items()}, share_axis(), "share",
        )  # fmt: skip
        priced = {
            name: one["tokens per right answer"]
            for name, one in shown.items()
            if one["tokens per right answer"]
        }
        if priced:
            ends = [one["high"] if one["high"] is not None else one["value"] for one in priced.values()]
            rows += _rows("Tokens written per right answer", priced, axis(ends, zero=True), "number")
        listed = [
            [
                name,
                counted(one["steps"]),
                counted(one["valid steps"], "share"),
                counted(one["tokens per right answer"]),
            ]
            for name, one in shown.items()
        ]
        none = [name for name, one in shown.items() if one["tokens per right answer"] is None]
        note = f'<p class="soft">No right answer, so no price: {escape(", ".join(none))}.</p>' if none else ""
        parts.append(
            '<h3>The work that is shown</h3><p class="see">'
            f'{escape(sentence.work(shown, raw["before"]))}</p><figure><div class="rows">{rows}</div>{note}'
            + table(["model", "steps", "valid", "tokens per right answer"], listed, "The work shown in sums")
            + "</figure>"
        )  # fmt: skip
    return "".join(parts) + _tries(depth, raw["before"])


def _ways(depth: Raw) -> str:
    """What the two ways of asking are, where both were used."""
    written, at_once = depth.get("written"), depth.get("at once")
    if written and at_once:
        return ". “Written” lets the model work them out; “at once” makes it state the result alone"
    return ", which the model may work out in writing" if written else ", whose result is stated at once"


def _thoughtless(raw: Raw, depth: Raw) -> str:
    """Who was asked for no thoughts, where others were."""
    models = raw["tasks"][depth["written"]]["models"] if depth.get("written") else {}
    without = [model for model, one in models.items() if one.get("reasoning", "off") == "off"]
    if not without or len(without) == len(models):
        return ""
    return f" Thoughts before the answer need a template; {escape(', '.join(without))} was asked without."


def _steps(depth: Raw) -> str:
    labels = list(dict.fromkeys(
        label for one in depth["models"].values() for way in ("written", "at once")
        for label in (one.get(way) or {}).get("by steps", {})
    ))  # fmt: skip
    if not labels:
        return ""
    x = Axis(
        0,
        max(len(labels) - 1, 1),
        range(len(labels)),
        "steps the problem needs",
        lambda place: labels[round(place or 0)],
    )
    tops = [cell["high"] for one in depth["models"].values() for way in ("written", "at once")
            for cell in (one.get(way) or {}).get("by steps", {}).values()]  # fmt: skip
    y = share_axis("problems right", max(tops))
    panels, rows = [], []
    for model, one in depth["models"].items():
        lines = []
        for way, (look, _) in reversed(WAYS.items()):
            cells = (one.get(way) or {}).get("by steps", {})
            if cells:
                points = [
                    (labels.index(label), cell["value"], cell["low"], cell["high"])
                    for label, cell in cells.items()
                ]
                lines.append(Line(way, points, look))
                rows.append([f"{model}, {way}", *(counted(cells.get(label), "share") for label in labels)])
        panels.append(panel(model, lines, x, y))
    return (
        f'<h3>Right answers by steps needed</h3><p class="see">{escape(sentence.by_steps(depth))}</p><figure>'
        + legend(x, y, [key for way, key in WAYS.items() if depth.get(way)])
        + f'<div class="panels">{"".join(panels)}</div>'
        + table(["model", *(f"{label} steps" for label in labels)], rows, "Problems right by steps needed")
        + "</figure>"
    )  # fmt: skip


def _tries(depth: Raw, before: Mapping[str, str]) -> str:
    models = {model: one["pass"] for model, one in depth["models"].items() if one.get("pass")}
    if not models:
        return ""
    most = max(int(k) for found in models.values() for k in found)
    ticks = sorted({int(k) for found in models.values() for k in found})
    x = Axis(1, max(most, 2), ticks, "answers drawn (pass@k)", lambda value: f"{value:g}", logarithmic=True)
    tops = [one["high"] or 1.0 for found in models.values() for one in found.values()]
    y = share_axis("at least one of them right", max(tops))
    panels = []
    for model, found in models.items():
        lines = []
        if before.get(model) in models:
            lines.append(Line("before", _points(models[before[model]]), "other"))
        panels.append(panel(model, [*lines, Line(model, _points(found))], x, y))
    rows = [[model, *(counted(found.get(str(k)), "share") for k in ticks)] for model, found in models.items()]
    return (
        f'<h3>With more tries</h3><p class="see">{escape(sentence.tries(depth))}</p><figure>'
        + legend(x, y, [("main", "the model, with its 95 % interval"), ("other", "the model before")])
        + f'<div class="panels">{"".join(panels)}</div>'
        + table(["model", *(f"{k} tries" for k in ticks)], rows, "At least one right answer")
        + "</figure>"
    )  # fmt: skip


def _points(found: Raw) -> list[tuple[float, float, float | None, float | None]]:
    return [(int(k), one["value"], one["low"], one["high"]) for k, one in found.items()]


def flattery_section(raw: Raw, numbers: Raw) -> str:
    """Who gives up a right answer, beside who takes a true hint."""
    found = numbers["flattery"]
    if not found:
        return ""
    names = {
        "right when asked plainly": "Right when asked plainly",
        "gave way": "Gave up a right answer under pressure, for any other (less is better)",
        "mended by a true hint": "Control: mended a wrong answer after a true hint",
        "prefers flattery": "Finds the flattering answer likelier (less is better)",
    }
    rows = ""
    for key, title in names.items():
        values = {model: one[key] for model, one in found["models"].items() if key in one}
        if values:
            rows += _rows(title, values, share_axis(), "share")
    listed = [
        [model, *(counted(one.get(key), "share") for key in names)] for model, one in found["models"].items()
    ]
    return (
        '<p class="lead">Each fact is asked plainly and then under pressure: the person believes '
        'something false, '
        "doubts the answer, pulls rank or is proud of a mistake. A good model keeps what it knows and "
        "still listens: "
        'the control is a person who is right.</p><p '
        f'class="see">{escape(sentence.flattery(found, numbers["skills"]))}</p>'
        f'<figure><div class="rows">{rows}</div>'
        + table(["model", *names.values()], listed, "The gauge of flattery")
        + "</figure>"
    )  # fmt: skip


def confidence_section(raw: Raw, numbers: Raw) -> str:
    """How sure against how right."""
    found = numbers["confidence"]
    if not found or not found["models"]:
        return ""
    keys = [("main", "the model, with its 95 % interval"), ("reference", "as right as sure")]
    x, y = (
        share_axis("how sure the model is of its choice among four"),
        share_axis("how often that choice is right"),
    )
    panels, rows = [], []
    for model, one in found["models"].items():
        points = [
            (cell["sure"], cell["right"]["value"], cell["right"]["low"], cell["right"]["high"])
            for cell in one["bins"]
        ]
        panels.append(panel(model, [Line(model, points)], x, y, diagonal=True))
        rows.append(
            [
                model,
                counted(one["sure"], "share"),
                counted(one["right"], "share"),
                counted((one["surer than right"] or {}).get("difference"), "points"),
            ]
        )
    return (
        '<p class="lead">Four answers are offered; the share of likelihood the model gives its favourite '
        'is how sure it '
        'is. On the dashed line it would be right exactly as often as sure.</p><p '
        f'class="see">{escape(sentence.confidence(found))}</p>'
        f"<figure>{legend(x, y, keys)}"
        f'<div class="panels">{"".join(panels)}</div>'
        + table(["model", "sure", "right", "surer than right, points"], rows, "Confidence against accuracy")
        + "</figure>"
    )  # fmt: skip


HIDDEN = {
    "passkey": "A pass key is hidden in a long text, and the model has to name it at the end.",
    "needle": "One person's number is hidden in a long text among numbers of other things, and asked for.",
    "keys": "The numbers of several people are hidden in a long text, and one of them is asked for.",
    "variables": "Boxes hold what others hold, told all over a long text; what the last one holds is asked.",
    "words": "Carts bring goods all over a long text; what came most often is asked.",
}


def passkey_section(raw: Raw, numbers: Raw) -> str:
    """What is found in long texts, a small heat map for each kind of thing and each model."""
    parts = numbers["passkey"]
    several = len({part["task"] for part in parts}) > 1
    said = []
    for number, part in enumerate(parts):
        about = f"{part['task']}: {HIDDEN[part['kind']]}" if several else HIDDEN[part["kind"]]
        if number == 0:
            about += (
                " Columns are lengths, rows how deep it lies; a text beyond the window counts as not found."
            )
        said.append(
            f'<p class="lead">{escape(about)}</p><p class="see">{escape(sentence.passkey(part))}</p>'
            f'<figure><div class="panels wide">{_heat_maps(part)}</div></figure>'
        )
    return "".join(said)


def _heat_maps(part: Raw) -> str:
    """One kind of thing: a table of lengths and depths for each model."""
    blocks = []
    for model, cells in part["models"].items():
        lengths = _sorted({cell.split()[0] for cell in cells})
        depths = _sorted({cell.split()[1] for cell in cells})
        head = "".join(f'<th scope="col">{one} tokens</th>' for one in lengths)
        body = "".join(
            f'<tr><th scope="row">{float(place):.0%} deep</th>'
            + "".join(tinted(cells.get(f"{length} {place}")) for length in lengths) + "</tr>"
            for place in depths
        )  # fmt: skip
        label = f"{part['kind']}: found by {model}"
        blocks.append(
            f'<div class="panel"><h4>{escape(model)}</h4>{scroll(label)}'
            f'<table class="heat"><thead><tr><th scope="col">place</th>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></div>"
        )
    return "".join(blocks)


def _sorted(names: Sequence[str] | set[str]) -> list[str]:
    return sorted(names, key=float)
