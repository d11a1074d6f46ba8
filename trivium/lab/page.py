"""The report page: one HTML file that needs nothing else, a pure function of the JSON beside it."""

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from trivium.lab import (
    findings,
    section_curation,
    section_distance,
    section_synthesis,
    section_training,
    sections,
)
from trivium.lab.charts import render
from trivium.lab.compare_examples import all_answers
from trivium.lab.formatting import compact

SECTIONS = {
    "stages": "Stages",
    "curation": "Curation",
    "synthesis": "Synthetic data",
    "results": "Results",
    "training": "Training",
    "examples": "Example answers",
    "search": "Search",
    "behaviour": "Behaviour",
    "reasoning": "Reasoning",
    "instructions": "Instructions",
    "sycophancy": "Sycophancy",
    "calibration": "Calibration",
    "long_context": "Long context",
    "answers": "All answers",
}


def page(report: Mapping[str, Any]) -> str:
    """The whole page as text."""
    raw, numbers = report["collected"], report["numbers"]
    content = {name: show(raw, numbers) for name, show in SHOW.items()}
    answers = all_answers(raw)
    # In a script element only "</" and "<!--" could end the text early.
    data = compact(answers).replace("<", "\\u003c") if answers["tasks"] else ""
    return (
        render(
            "report.jinja",
            title=raw["title"],
            raw=raw,
            numbers=numbers,
            models=_models(raw, numbers),
            sections={name: heading for name, heading in SECTIONS.items() if content[name]},
            content=content,
            findings=findings,
            answers_data=Markup(data),
        )
        + "\n"
    )


def _models(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every model with what is shown to differ from the model before it."""
    found = []
    for model in raw["models"]:
        before = raw["before"].get(model["name"])
        text = f"the first of those compared ({model['kind']})."
        if before is not None:
            text = findings.stage_in_short(numbers["skills"], model["name"], before)
        found.append((model["name"], f"{text[0].upper()}{text[1:]}"))
    return found


def _behaviour(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    pairs, style = numbers["behaviour"]["pairs"], numbers["behaviour"]["manner"]
    measured = [pair for pair in pairs if pair["all"]]
    if not pairs and not style:
        return None
    return {
        "pairs": pairs,
        "measured": measured,
        "divergences": section_distance.divergences(measured) if measured else None,
        "by_place": section_distance.by_place(measured) if measured else None,
        "texts": section_distance.shaded_texts(raw["behaviour"]) if measured else [],
        "distances": section_distance.matrices(raw.get("distances")),
        "style": sections.answer_style(raw, numbers) if style else None,
    }


def _reasoning(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    depth = numbers["depth"]
    if not depth:
        return None
    return {
        "ways": sections.ways_asked(depth),
        "without_thoughts": sections.without_thoughts(raw, depth),
        "by_steps": sections.by_steps(depth),
        "steps": sections.reasoning_steps(depth),
        "tries": sections.tries(depth, raw["before"]),
    }


def _instructions(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    found = numbers["help"]
    return {**sections.helpfulness(found), "wins": sections.wins(numbers["wins"])} if found else None


def _calibration(raw: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any] | None:
    found = numbers["confidence"]
    return sections.calibration(found) if found and found["models"] else None


Show = Callable[[Mapping[str, Any], Mapping[str, Any]], Any]
SHOW: dict[str, Show] = {
    "stages": lambda raw, numbers: section_training.stages(raw, numbers) if raw["stages"] else None,
    "curation": lambda raw, numbers: section_curation.shown(raw),
    "synthesis": lambda raw, numbers: section_synthesis.shown(raw),
    "results": lambda raw, numbers: sections.skills(raw, numbers) if numbers["skills"] else None,
    "training": lambda raw, numbers: section_training.curves(raw) if raw["curves"] else None,
    "examples": lambda raw, numbers: sections.example_answers(raw),
    "search": lambda raw, numbers: sections.searches(raw),
    "behaviour": _behaviour,
    "reasoning": _reasoning,
    "instructions": _instructions,
    "sycophancy": lambda raw, numbers: numbers["sycophancy"] and sections.sycophancy(numbers["sycophancy"]),
    "calibration": _calibration,
    "long_context": lambda raw, numbers: sections.long_context(numbers["passkey"]),
    "answers": lambda raw, numbers: bool(all_answers(raw)["tasks"]),
}
"""What each section shows, from the collected answers and the numbers made of them; nothing leaves it out."""
