"""The page: one HTML file that needs nothing else, a pure function of the JSON beside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from trivium.lab import page_sentences as sentence
from trivium.lab.compare_examples import all_answers
from trivium.lab.page_answers import answers_section, distance_section
from trivium.lab.page_help import help_section
from trivium.lab.page_sections import (
    confidence_section,
    depth_section,
    flattery_section,
    manner_section,
    passkey_section,
    skills_section,
)
from trivium.lab.page_training import curves_section, road_section
from trivium.lab.writing import compact

HERE = Path(__file__).parent
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def page(report: Mapping[str, Any]) -> str:
    """The whole page as text."""
    raw, numbers = report["collected"], report["numbers"]
    sections = [
        ("road", "The road", road_section(raw, numbers)),
        ("skills", "Gained and lost", skills_section(raw, numbers)),
        ("training", "Training", curves_section(raw)),
        ("answers", "Side by side", answers_section(raw)),
        ("behaviour", "Behaviour", distance_section(raw, numbers) + manner_section(raw, numbers)),
        ("depth", "Reasoning", depth_section(raw, numbers)),
        ("help", "Helpfulness", help_section(raw, numbers)),
        ("flattery", "Flattery", flattery_section(raw, numbers)),
        ("confidence", "Confidence", confidence_section(raw, numbers)),
        ("passkey", "Long texts", passkey_section(raw, numbers)),
    ]
    answers = all_answers(raw)
    if answers["tasks"]:
        sections.append(("failures", "All answers", FAILURES))
    there = [(name, heading, body) for name, heading, body in sections if body]
    links = "".join(f'<li><a href="#{name}">{heading}</a></li>' for name, heading, _ in there)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-h"><h2 id="{name}-h">{heading}</h2>{inner}</section>'
        for name, heading, inner in there
    )
    script = ""
    if answers["tasks"]:
        # In a script element only "</" and "<!--" could end the text early.
        data = compact(answers).replace("<", "\\u003c")
        code = (HERE / "page.js").read_text(encoding="utf-8")
        script = f'<script id="told" type="application/json">{data}</script><script>{code}</script>'
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(raw['title'])} · Trivium</title><style>{style}</style></head><body>"
        f'<a class="skip" href="#{there[0][0] if there else "end"}">To the first figure</a>'
        f'<header class="wrap">{_head(raw, numbers)}</header>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main class="wrap">{body}</main><footer class="wrap" '
        f'id="end">{_foot(raw)}</footer>{script}</body></html>\n'
    )


def _head(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
    lines = []
    for model in raw["models"]:
        before = raw["before"].get(model["name"])
        words = f"the first of those compared ({model['kind']})."
        if before is not None:
            words = sentence.stage_in_short(numbers["skills"], model["name"], before)
        words = f"{words[0].upper()}{words[1:]}"
        lines.append(f"<li><b>{escape(model['name'])}</b><span>{escape(words)}</span></li>")
    models, stages = len(raw["models"]), len(raw["stages"])
    told = f"{stages} stage{'s' if stages != 1 else ''}" if stages else ""
    if models:
        asked = f"{models} model{'s' if models != 1 else ''} asked the same questions"
        told = f"{told}, {asked}" if told else asked
    else:
        lines = ["<li><b>Not asked</b><span>No model was asked anything: name the models under "
                 "<code>report: {compare: [...]}</code> in the recipe.</span></li>"]  # fmt: skip
    return (
        f'<h1>{escape(raw["title"])}</h1><p class="soft">{told} · {escape(raw["made"])} · Trivium '
        f"{escape(raw['version'])}</p>"
        "<p>What every stage of a model's education did to it. A figure comes with the one thing to see "
        "in it, and "
        "with intervals: were everything repeated with other questions, about 95 of 100 such intervals "
        "would hold "
        "the true value. “Better” and “worse” stand only where a paired test says so after correction for "
        "the number of comparisons. They hold for these very models: another training run may turn out "
        "otherwise, "
        f'which experiments over several seeds show.</p><ul class="short">{"".join(lines)}</ul>'
    )


def _foot(raw: Mapping[str, Any]) -> str:
    asked = "; ".join(
        f"{label}: {len(next(iter(task['models'].values()))['records'])} items"
        for label, task in raw["tasks"].items()
    )
    models = "; ".join(f"{model['name']}: {model['place']}" for model in raw["models"])
    lines = [
        f"<p>Asked: {escape(asked)}.</p>" if asked else "",
        f"<p>{escape(models)}.</p>" if models else "",
    ]
    return "".join(lines) + "<p>Every figure follows from the JSON file beside this page.</p>"


FAILURES = (
    '<p class="lead">Every question that is simply right or wrong, to be read one by one. Choose a model '
    "and what "
    "its answers shall be; the others' answers stand beside.</p>"
    "<noscript><p>This list needs JavaScript; the same answers lie in the JSON file beside this "
    "page.</p></noscript>"
    '<form id="filters" class="filters"><label>Task<select name="task"></select></label>'
    '<label>Model<select name="model"></select></label><label>Answers<select name="verdict">'
    '<option value="wrong">wrong</option><option value="right">right</option>'
    '<option value="lost">wrong, right before</option><option value="gained">right, wrong before</option>'
    '<option value="all">all</option></select></label>'
    '<label>Words<input name="words" type="search" autocomplete="off"></label></form>'
    '<p class="soft" id="count" role="status"></p><div id="found" class="found"></div>'
    '<p><button type="button" id="more" hidden>Show more</button></p>'
)
