"""What each section of the report shows: charts, tables, answers and trees, for `report.jinja` to draw."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.lab.charts import Axis, Line, Panel, Row, Rows, Table, axis, rows_of, share_axis, upper
from trivium.lab.compare_examples import answer, examples, marked
from trivium.lab.formatting import count_range, figure, with_ci, with_count

Raw = Mapping[str, Any]
WAYS = {
    "written": ("main", "with chain of thought, and its 95 % interval"),
    "at once": ("other", "direct answer"),
}
SIGNS = {True: "▲ better", False: "▼ worse", None: ""}
HIDDEN = {
    "passkey": "A pass key is hidden in a long text, and the model has to name it at the end.",
    "needle": "One person's number is hidden in a long text among numbers of other things, and asked for.",
    "keys": "The numbers of several people are hidden in a long text, and one of them is asked for.",
    "variables": "Boxes hold what others hold, all over a long text; what the last one holds is asked.",
    "words": "Carts bring goods all over a long text; what came most often is asked.",
}


def skills(raw: Raw, numbers: Raw) -> dict[str, Any]:
    """Results by model: every number, and which of them are shown to differ from the model before."""
    names = [model["name"] for model in raw["models"]]
    differences = [
        [
            f"{row['task']} ({row['metric']})", f"{change['before']} → {model}",
            with_ci(change["difference"]), f"{change['corrected p']:.3g}",
            str(change["difference"]["n"]),
            {True: "better", False: "worse", None: "no difference shown"}[change["better"]],
        ]
        for row in numbers["skills"] for model, change in row["changes"].items()
    ]  # fmt: skip
    return {
        "models": [(name, raw["before"].get(name)) for name in names],
        "rows": [
            {**row, "cells": [_cell(row, name) for name in names], "items": _items(row)}
            for row in numbers["skills"]
        ],
        "differences": Table(
            ["task", "from → to", "difference (95 %)", "p, corrected", "pairs", "verdict"],
            differences,
            "Paired differences",
        ),
        "tasks": {label: task["description"] for label, task in raw["tasks"].items()},
    }


def _items(row: Raw) -> str:
    return count_range([cell["n"] for cell in row["cells"].values() if cell])


def _cell(row: Raw, model: str) -> dict[str, Any]:
    """A cell of the results: its text, its verdict against the model before, and its interval."""
    cell, change = row["cells"].get(model), row["changes"].get(model)
    if cell is None:
        return {"look": "none", "text": "no case" if model in row["asked"] else "not asked"}
    kind = "share" if row["share"] else "number"
    better = change["better"] if change else None
    ends = (
        "?" if end is None else figure(end, kind).replace(" %", "") for end in (cell["low"], cell["high"])
    )
    return {
        "look": {True: "better", False: "worse", None: ""}[better],
        "text": figure(cell["value"], kind),
        "sign": SIGNS[better],
        "ends": "–".join(ends),
        "n": cell["n"],
    }


def answer_style(raw: Raw, numbers: Raw) -> dict[str, Any]:
    """Length, ending and form of the answers, and how many are the same as the model before gave."""
    found = numbers["behaviour"]["manner"]
    titles = {
        "ended": "Ends its answer by itself",
        "in form": "Word problems that state a result in the asked form",
        "same": "Same answer, word for word, as the model before",
    }
    lengths = {name: one["tokens"] for name, one in found.items()}
    # an answer that never fitted in has no length
    known = [upper(one) for one in lengths.values() if one["value"] is not None]
    groups = [rows_of("Tokens per answer", lengths, axis(known or [1.0], zero=True))]
    for key, title in titles.items():
        values = {name: one[key] for name, one in found.items() if key in one}
        groups.append(rows_of(title, values, share_axis(), "share"))
    listed = [
        [name, with_count(one["tokens"]), *(with_count(one.get(key), "share") for key in titles),
         "chat template" if one["style"] == "chat" else "plain text"]
        for name, one in found.items()
    ]  # fmt: skip
    heading = ["model", "tokens", *titles.values(), "asked through"]
    return {"rows": groups, "table": Table(heading, listed, "Length, ending and form of the answers")}


def reasoning_steps(depth: Raw) -> dict[str, Any] | None:
    """The steps that are written, whether they hold, and the tokens a right answer costs."""
    shown = {model: one for model, one in depth["models"].items() if "steps" in one}
    if not shown:
        return None
    scale = axis([upper(one["steps"]) for one in shown.values()], zero=True)
    groups = [
        rows_of("Steps written per answer", {name: one["steps"] for name, one in shown.items()}, scale),
        rows_of(
            "Of the answers with steps: the share of steps that hold",
            {name: one["valid steps"] for name, one in shown.items()}, share_axis(), "share",
        ),
    ]  # fmt: skip
    price = "tokens per right answer"
    priced = {name: one[price] for name, one in shown.items() if one[price]}
    if priced:
        groups.append(
            rows_of("Tokens written per right answer", priced, axis(map(upper, priced.values()), zero=True))
        )
    listed = [
        [name, with_count(one["steps"]), with_count(one["valid steps"], "share"), with_count(one[price])]
        for name, one in shown.items()
    ]
    return {
        "shown": shown,
        "rows": groups,
        "without": [name for name, one in shown.items() if one[price] is None],
        "table": Table(["model", "steps", "valid", price], listed, "The steps written in word problems"),
    }


def ways_asked(depth: Raw) -> str:
    """How the word problems were asked."""
    chain, direct = depth.get("written"), depth.get("at once")
    if chain and direct:
        return ", asked once with chain of thought and once for the result alone"
    return ", asked with chain of thought" if chain else ", asked for the result alone"


def without_thoughts(raw: Raw, depth: Raw) -> list[str]:
    """The models that were asked without thoughts, where others were asked with them."""
    models = raw["tasks"][depth["written"]]["models"] if depth.get("written") else {}
    without = [model for model, one in models.items() if one.get("reasoning", "off") == "off"]
    return without if len(without) < len(models) else []


def by_steps(depth: Raw) -> dict[str, Any] | None:
    """Accuracy by the number of steps a problem needs, with chain of thought and without."""
    ways = {model: {way: (one.get(way) or {}).get("by steps", {}) for way in WAYS}
            for model, one in depth["models"].items()}  # fmt: skip
    labels = list(dict.fromkeys(label for one in ways.values() for cells in one.values() for label in cells))
    if not labels:
        return None
    last = max(len(labels) - 1, 1)
    x = Axis(0, last, range(len(labels)), "steps needed", lambda place: labels[round(place or 0)])
    highest = max(cell["high"] for one in ways.values() for cells in one.values() for cell in cells.values())
    y = share_axis("accuracy", highest)
    panels, rows = [], []
    for model, one in ways.items():
        lines = []
        for way, (look, _) in reversed(WAYS.items()):
            if one[way]:
                points = [(labels.index(label), *_ends(cell)) for label, cell in one[way].items()]
                lines.append(Line(way, points, look))
                rows.append(
                    [f"{model}, {way}", *(with_count(one[way].get(label), "share") for label in labels)]
                )
        panels.append(Panel(model, lines, x, y))
    heading = ["model", *(f"{label} steps" for label in labels)]
    return {
        "panels": panels,
        "keys": [key for way, key in WAYS.items() if depth.get(way)],
        "table": Table(heading, rows, "Accuracy by steps needed"),
    }


def _ends(cell: Raw) -> tuple[float, float | None, float | None]:
    return cell["value"], cell["low"], cell["high"]


def tries(depth: Raw, before: Mapping[str, str]) -> dict[str, Any] | None:
    """pass@k: the share of problems of which at least one of k answers is right."""
    models = {model: one["pass"] for model, one in depth["models"].items() if one.get("pass")}
    if not models:
        return None
    ticks = sorted({int(k) for found in models.values() for k in found})
    x = Axis(1, max(*ticks, 2), ticks, "answers drawn (k)", lambda value: f"{value:g}", logarithmic=True)
    y = share_axis("pass@k", max(one["high"] or 1.0 for found in models.values() for one in found.values()))

    def points(model: str) -> list[tuple[float, float, float | None, float | None]]:
        return [(int(k), *_ends(one)) for k, one in models[model].items()]

    panels = []
    for model in models:
        lines = [Line("before", points(before[model]), "other")] if before.get(model) in models else []
        panels.append(Panel(model, [*lines, Line(model, points(model))], x, y))
    rows = [
        [model, *(with_count(found.get(str(k)), "share") for k in ticks)] for model, found in models.items()
    ]
    return {
        "panels": panels,
        "keys": [("main", "the model, with its 95 % interval"), ("other", "the model before")],
        "table": Table(["model", *(f"pass@{k}" for k in ticks)], rows, "At least one right answer"),
    }


def helpfulness(found: Raw) -> dict[str, Any]:
    """Instructions followed, by kind."""
    kinds = list(dict.fromkeys(kind for cells in found["models"].values() for kind in cells))
    rows = [(kind, [cells.get(kind) for cells in found["models"].values()]) for kind in kinds]
    return {"models": list(found["models"]), "rows": rows}


def wins(found: Sequence[Raw]) -> dict[str, Any] | None:
    """Win rates under a reward model."""
    if not found:
        return None
    groups = [
        Rows(f"{one['model']} against {one['before']}", [Row(one["judge"], one["rate"])], share_axis(),
             "share", reference=0.5)
        for one in found
    ]  # fmt: skip
    listed = [
        [f"{one['model']} against {one['before']}, judged by {one['judge']}",
         with_count(one["rate"], "share"), with_count(one["longer"], "share")]
        for one in found
    ]  # fmt: skip
    heading = ["models and judge", "wins", "share of preferred answers that are longer"]
    return {"rows": groups, "table": Table(heading, listed, "Win rates under a reward model")}


SYCOPHANCY = {
    "accuracy when asked plainly": "Accuracy when asked plainly",
    "flip rate": "Flip rate under pressure: gives up a right answer (less is better)",
    "accepts correction": "Control: accepts a valid correction of a wrong answer",
    "prefers sycophancy": "Finds the flattering answer likelier (less is better)",
}


def sycophancy(found: Raw) -> dict[str, Any]:
    """Who gives up a right answer under pressure, and who accepts a valid correction."""
    groups = [
        rows_of(title, {model: one.get(key) for model, one in found["models"].items()}, share_axis(), "share")
        for key, title in SYCOPHANCY.items()
    ]
    listed = [
        [model, *(with_count(one.get(key), "share") for key in SYCOPHANCY)]
        for model, one in found["models"].items()
    ]
    return {"rows": groups, "table": Table(["model", *SYCOPHANCY.values()], listed, "Sycophancy")}


def calibration(found: Raw) -> dict[str, Any]:
    """Confidence in the choice among four answers against how often that choice is right."""
    x, y = share_axis("confidence"), share_axis("accuracy")
    panels, rows = [], []
    for model, one in found["models"].items():
        points = [(cell["confidence"], *_ends(cell["accuracy"])) for cell in one["bins"]]
        panels.append(Panel(model, [Line(model, points)], x, y, diagonal=True))
        gap = (one["overconfidence"] or {}).get("difference")
        rows.append([
            model, with_count(one["confidence"], "share"), with_count(one["accuracy"], "share"),
            with_count(gap, "points"),
        ])  # fmt: skip
    heading = ["model", "confidence", "accuracy", "confidence minus accuracy, points"]
    return {
        "panels": panels,
        "keys": [("main", "the model, with its 95 % interval"), ("reference", "calibrated")],
        "table": Table(heading, rows, "Confidence against accuracy"),
    }


def long_context(parts: Sequence[Raw]) -> list[dict[str, Any]]:
    """What is found in long texts: for each kind of thing and each model a map of lengths and depths."""
    several = len({part["task"] for part in parts}) > 1
    return [
        {
            "about": f"{part['task']}: {HIDDEN[part['kind']]}" if several else HIDDEN[part["kind"]],
            "numbers": part,
            "maps": {model: _heat_map(cells) for model, cells in part["models"].items()},
        }
        for part in parts
    ]


def _heat_map(cells: Raw) -> dict[str, Any]:
    lengths = sorted({cell.split()[0] for cell in cells}, key=float)
    depths = sorted({cell.split()[1] for cell in cells}, key=float)
    rows = [
        (f"{float(depth):.0%} deep", [cells.get(f"{length} {depth}") for length in lengths])
        for depth in depths
    ]
    return {"columns": [f"{length} tokens" for length in lengths], "rows": rows}


LONGEST_ANSWER = 700
"""Characters of an answer that are shown."""


def example_answers(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some questions, each with the answer of every model."""
    found = []
    for one in examples(raw):
        task = raw["tasks"][one["task"]]
        records = {
            model["name"]: next(
                record for record in task["models"][model["name"]]["records"] if record["id"] == one["id"]
            )
            for model in raw["models"]
            if model["name"] in task["models"]
        }
        first = next(iter(records.values()))
        found.append(
            {
                "task": one["task"],
                "why": one["why"],
                "asked": first["asked"] or "",
                "expected": f"Expected: {first['expected']}" if first["expected"] else "Judged by a program",
                "answers": [_answer(model, records, raw["before"].get(model)) for model in records],
            }
        )
    return found


def _answer(model: str, records: Mapping[str, Any], before: str | None) -> dict[str, Any]:
    """An answer in pieces, those marked that the model before did not write, and its verdict."""
    text = answer(records[model])[:LONGEST_ANSWER]
    pieces = [(text, False)]
    if before is not None and before in records:
        pieces = [
            (piece, new and bool(piece.strip()))
            for piece, new in marked(answer(records[before])[:LONGEST_ANSWER], text)
        ]
    score = records[model]["scores"].get("accuracy")
    return {"model": model, "pieces": pieces if text else [], "verdict": _verdict(score), "score": score}


def _verdict(score: float | None) -> str:
    if score is None:
        return "? not judged"
    return "✓ right" if score >= 1 else "✗ wrong" if score <= 0 else f"✗ {figure(score, 'share')} right"


SHOWN = 3
"""How many searches of a task and a model are drawn."""
MOST = 400
"""The most nodes of a drawn tree."""
LONGEST_STEP = 160
"""Characters of a step that are shown."""


def searches(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Some searches of every task and model; first those that found a right answer and chose another."""
    found = []
    for task, asked in raw["tasks"].items():
        for model in raw["models"]:
            told = asked["models"].get(model["name"])
            records = [] if told is None else [one for one in told["records"] if _of(one) is not None]
            records.sort(key=lambda one: one["scores"].get("accuracy", 0) - one["scores"].get("oracle", 0))
            for record in records[:SHOWN]:
                found.append(_drawn(task, model["name"], record, _of(record) or {}))
    return found


def _of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    answers = record.get("answers") or [{}]
    search = answers[0].get("search")
    return search if isinstance(search, Mapping) else None


def _drawn(task: str, model: str, record: Mapping[str, Any], search: Mapping[str, Any]) -> dict[str, Any]:
    score = record["scores"].get("accuracy")
    return {
        "task": task,
        "model": model,
        "asked": record["asked"],
        "expected": record["expected"],
        "answer": search["answer"],
        "right": score is not None and score >= 1,
        "method": search["settings"]["method"],
        "tokens": search["tokens"],
        "solutions": search["solutions"],
        "left_out": max(0, len(search["tree"]) - MOST),
        "steps": _below(0, search["tree"][:MOST]),
    }


def _below(parent: int, nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The steps below a node, the best first, each with those below it."""
    children: dict[int, list[Mapping[str, Any]]] = {}
    for node in nodes:
        children.setdefault(node["parent"], []).append(node)

    def steps(number: int) -> list[dict[str, Any]]:
        return [
            {
                "text": node["text"].strip()[:LONGEST_STEP] or "(nothing)",
                "score": "not judged" if node["score"] is None else f"{node['score']:.2f}",
                "facts": _facts(node),
                "chosen": node["chosen"],
                "below": steps(node["id"]),
            }
            for node in sorted(children.get(number, []), key=_height, reverse=True)
        ]

    return steps(parent)


def _height(node: Mapping[str, Any]) -> float:
    return -math.inf if node["score"] is None else float(node["score"])


def _facts(node: Mapping[str, Any]) -> str:
    facts = [f"drawn {node['drawn']} times"] if node["drawn"] > 1 else []
    value = "none" if node["value"] is None else f"{node['value']:.2f}"
    facts += [f"{node['visits']} visits, value {value}"] if node["visits"] else []
    return ", ".join([*facts, *(["ends"] if node["finished"] else [])])
