"""Data that was written: rows through every step, what they cost, how different they are, some to read."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trivium.kit.files import read_object
from trivium.kit.numbers import short
from trivium.lab.charts import Table
from trivium.lab.formatting import figure
from trivium.lab.gather import Seen
from trivium.synthesize.synthesis import REPORT

_LONGEST = 2000


def syntheses(stages: Sequence[Seen]) -> list[dict[str, Any]]:
    """What the stages that wrote data left behind."""
    return [
        {"stage": stage.name, **read_object(stage.folder / REPORT)}
        for stage in stages
        if (stage.folder / REPORT).is_file()
    ]


def shown(raw: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A part of the section for each stage; nothing where none wrote data."""
    return [_part(one) for one in raw.get("synthesis", [])] or None


def _part(one: Mapping[str, Any]) -> dict[str, Any]:
    steps = [
        [step["step"], f"{step['in']:,}", f"{step['out']:,}", *_facts(step["facts"])] for step in one["steps"]
    ]
    reasons = [
        [f"{step['step']}: {reason}", f"{count:,}"]
        for step in one["steps"] for reason, count in step["reasons"].items()
    ]  # fmt: skip
    diversity, cost = one["diversity"], one["cost"]
    covered = diversity["coverage"]
    numbers = [
        *([f"distinct runs of {size} words", figure(share, "share")] for size, share in
          diversity["distinct"].items()),
        ["similarity to the most similar other row", figure(diversity["self_similarity"]["nearest"])],
        [f"cells of {' × '.join(covered['columns']) or 'the seed'} with a row",
         f"{covered['filled']:,} of {covered['cells']:,}"],
        ["evenness over the cells", figure(covered["evenness"])],
        ["tokens", short(cost["tokens"])], ["requests", f"{cost['requests']:,}"],
        *([["money", f"{cost['money']:.2f}"]] if cost["money"] else []),
    ]  # fmt: skip
    return {
        "stage": one["stage"], "rows": one["rows"], "seeds": one["seeds"], "dropped": one["dropped"],
        "steps": Table(["step", "rows in", "out", "found"], steps, "The steps", "The steps"),
        "reasons": Table(["step: reason", "rows"], reasons, "Rows by reason", "Rows by reason"),
        "numbers": Table(["measure", "value"], numbers, "Cost and diversity", "Cost and diversity"),
        "examples": [
            _examples("rows that were kept, at random", one["examples"]),
            _examples("rows that were left out, at random", one["examples_dropped"]),
        ],
    }  # fmt: skip


def _facts(facts: Mapping[str, Any]) -> list[str]:
    """What a step found out, in few words."""
    parts = []
    if "accuracy" in facts:
        parts.append(f"the judge is right in {figure(facts['accuracy']['value'], 'share')}")
        parts += [
            f"{name.replace('_', ' ')} {facts[name]:+.2f}"
            for name in ("position_bias", "length_bias") if facts.get(name) is not None
        ]  # fmt: skip
    if facts.get("new_by_round"):
        first, last = facts["new_by_round"][0], facts["new_by_round"][-1]
        parts.append(f"new: {figure(first, 'share')} in the first round, {figure(last, 'share')} in the last")
    return [", ".join(parts)]


def _examples(title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    cases = []
    for row in rows:
        content = {name: value for name, value in row.items() if name not in ("id", "step", "reason")}
        text = json.dumps(content, indent=1, ensure_ascii=False)
        cases.append({"id": row["id"], "reason": row.get("reason", ""), "text": text[:_LONGEST]})
    return {"rule": title, "count": len(cases), "cases": cases}
