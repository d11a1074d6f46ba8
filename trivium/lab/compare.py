"""Compare models: collect what their stages left and what they answer, and write one page about it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import trivium
from trivium.evals.results import Results, as_json
from trivium.evals.settings import Settings, TaskSpec
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, write_text
from trivium.kit.fingerprint import fingerprint
from trivium.lab.asked import asked_of
from trivium.lab.behaviour import divergence, own_passages, passages
from trivium.lab.closeness_table import in_report
from trivium.lab.compare_examples import answer
from trivium.lab.compare_numbers import numbers
from trivium.lab.compare_stages import curves, stage_facts
from trivium.lab.formatting import compact, count_range, figure
from trivium.lab.gather import Member, Seen, compared_with, find_all, stages_above, world_sources
from trivium.lab.gather_answers import DEFAULT_LIMIT, answers, code, default_tasks
from trivium.lab.own_data import OWN_LIMIT, own_tasks
from trivium.lab.page import page
from trivium.lab.section_curation import curations
from trivium.lab.section_synthesis import syntheses
from trivium.model.folder import load_config

Say = Callable[[str], None]


def compare(
    names: Sequence[str],
    *,
    runs: Path,
    to: Path,
    on: Sequence[TaskSpec] = (),
    settings: Settings | None = None,
    title: str = "",
    stages: Sequence[Seen] = (),
    say: Say | None = None,
) -> dict[str, Any]:
    """Ask these models the same things and write `to` (a page) with a JSON of the same name beside it.

    With `stages`, those of a recipe whose own report it is, no other report says what is asked.
    """
    if to.suffix == ".json":
        raise TriviumError(
            f"{to} is where the numbers beside the page would go; name the page {to.stem}.html."
        )
    members = find_all(names, runs)
    if not on and members and not stages:
        on, settings = _as_the_report(members, runs, settings, say)
    seen = stages_above([*stages, *(member.seen for member in members if member.seen)])
    raw = collect(members, seen, runs / "store" / "answers", on, settings, title or " · ".join(names), say)
    return write(raw, to)


def _as_the_report(
    members: Sequence[Member], runs: Path, settings: Settings | None, say: Say | None
) -> tuple[Sequence[TaskSpec], Settings | None]:
    """What the report of the models' recipe asks, and how; nothing where they are of several recipes."""
    folders = [member.seen.folder for member in members if member.seen is not None]
    asked = asked_of(folders, runs) if len(folders) == len(members) else None
    if asked is None:
        if say is not None and folders:
            say("these models have no report in common: asked about the data that they learnt from")
        return [], settings
    if say is not None:
        say(f"asked as the report of {asked.recipe} asks")
    return asked.on, asked.asking if settings is None else settings


def write(raw: Mapping[str, Any], to: Path) -> dict[str, Any]:
    """Work out the numbers, and write the page and the JSON from which every figure of it follows."""
    report = {"collected": raw, "numbers": numbers(raw)}
    write_text(to.with_suffix(".json"), compact(report))
    write_text(to, page(report))
    return report


def collect(
    members: Sequence[Member],
    stages: Sequence[Seen],
    kept: Path,
    on: Sequence[TaskSpec],
    settings: Settings | None,
    title: str,
    say: Say | None,
) -> dict[str, Any]:
    """Everything the page rests on: stages, curves, every answer, and the divergences token by token."""
    asking = settings or Settings(limit=DEFAULT_LIMIT)
    sources = world_sources(stages)
    configs = {member.name: load_config(member.folder) for member in members}
    windows = [one.context for one in configs.values()]
    # what was not taught is not asked, where there is something of one's own to ask
    own = own_tasks(stages, min(asking.limit, OWN_LIMIT)) if members and not on else []
    tasks = list(on) or own
    if members and not on and (sources or not own):
        tasks = [*default_tasks(sources, windows, asking.limit), *own]
    before = compared_with(members)
    found: dict[str, Results] = {}
    texts = (passages(sources) if sources or not own else own_passages(own)) if before else []
    pairs: dict[str, dict[str, Any]] = {}
    by_name = {member.name: member for member in members}
    for member in members:
        found[member.name] = answers(member, tasks, asking, kept, say)
        if member.name in before:
            pairs[member.name] = divergence(member, by_name[before[member.name]], texts, kept)
        waiting = members[members.index(member) + 1 :]
        for held in members:
            # Weights stay in memory only as long as a later model is measured against them.
            if not any(before.get(later.name) == held.name for later in waiting):
                held.forget()
    tasks_asked = _tasks(found)
    drawn = {stage.name: curves(stage.metrics) for stage in stages}
    return {
        "title": title,
        "on": [one if isinstance(one, str) else dict(one) for one in tasks],
        "asking": asking.model_dump(mode="json"),
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "version": trivium.__version__,
        "stages": [stage_facts(stage, stages) for stage in stages],
        "curves": {name: lines for name, lines in drawn.items() if lines},
        "curation": curations(stages),
        "synthesis": syntheses(stages),
        "models": [
            {"name": member.name, "kind": member.seen.record["kind"] if member.seen else "imported",
             "window": configs[member.name].context, "vocabulary": configs[member.name].vocabulary,
             "fingerprint": member.fingerprint, "place": str(member.folder)}
            for member in members
        ],
        "before": before,
        "tasks": tasks_asked,
        "behaviour": list(pairs.values()),
        "distances": in_report(members) if before else None,
        "judged": judged(stages, tasks_asked, kept),
    }  # fmt: skip


def _tasks(found: Mapping[str, Results]) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for model, results in found.items():
        for label, one in results.tasks.items():
            task = tasks.setdefault(
                label,
                {"task": one.name, "description": one.description, "headline": list(one.headline),
                 "settings": dict(one.settings), "models": {}},
            )  # fmt: skip
            first = next(iter(task["models"].values()), None)
            records = [_plain(asdict(record), bool(one.settings.get("samples"))) for record in one.records]
            if first is not None:
                for record, other in zip(records, first["records"]):
                    if record["asked"] == other["asked"]:
                        record["asked"] = None
            task["models"][model] = {
                "style": one.style, "reasoning": one.settings.get("reasoning", "off"),
                "seconds": round(one.seconds, 3), "records": records,
                "whole": {name: as_json(interval) for name, interval in one.whole.items()},
            }  # fmt: skip
    return tasks


def _plain(record: dict[str, Any], sampled: bool) -> dict[str, Any]:
    """A record for the JSON; of answers drawn beside the likeliest only the scores are kept."""
    answers = list(record["answers"])
    if sampled:
        answers = answers[:1] + [{"scores": one["scores"]} for one in answers[1:]]
    return {**record, "answers": answers}


def summary_table(report: Mapping[str, Any]) -> list[list[str]]:
    """The headline numbers as rows for a terminal; + and - where better or worse than before is shown."""
    models = [model["name"] for model in report["collected"]["models"]]
    rows = [["skill", *models, "n"]]
    for row in report["numbers"]["skills"]:
        cells = []
        for model in models:
            cell, change = row["cells"].get(model), row["changes"].get(model)
            if cell is None:
                cells.append("")
                continue
            mark = {True: " +", False: " -", None: ""}[change["better"] if change else None]
            kind = "share" if row["share"] else "number"
            ends = ["?" if cell[end] is None else figure(cell[end], kind) for end in ("low", "high")]
            interval = (
                "" if ends == ["?", "?"] else f" ({ends[0].removesuffix(' %')}–{ends[1].removesuffix(' %')})"
            )
            cells.append(f"{figure(cell['value'], kind)}{interval}{mark}")
        asked = count_range([cell["n"] for cell in row["cells"].values() if cell])
        rows.append([f"{row['task']}: {row['metric']}", *cells, asked])
    return rows


DIGITS = 5


def judged(stages: Sequence[Seen], tasks: Mapping[str, Any], kept: Path) -> list[dict[str, Any]]:
    """For every reward stage, its score of each answer to an instruction; empty where there is none."""
    label = next((name for name, task in tasks.items() if task["task"] == "instructions"), None)
    if label is None:
        return []
    answers_of = {model: asked["records"] for model, asked in tasks[label]["models"].items()}
    first = next(iter(answers_of.values()))
    return [
        {
            "judge": stage.name,
            "task": label,
            "scores": {model: _scores(stage, found, first, kept) for model, found in answers_of.items()},
        }
        for stage in stages
        if stage.record["produces"] == "reward"
    ]


def _scores(
    stage: Seen, records: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]], kept: Path
) -> list[float | None]:
    asked = [_question(one["asked"] or other["asked"] or "") for one, other in zip(records, first)]
    told = [answer(one) for one in records]
    key = fingerprint([stage.folder.name, asked, told, code()])
    place = kept / f"judged-{key}.json"
    if not place.is_file():
        from trivium.grade.learned import LearnedScorer

        assert stage.weights is not None, "a reward stage that is done has weights"
        given = LearnedScorer(stage.weights).many(asked, told)
        values = [None if one.value is None else round(one.value, DIGITS) for one in given]
        write_text(place, compact(values))
    scores: list[float | None] = read_json(place)
    return scores


def _question(asked: str) -> str:
    """The person's words alone, however the model was asked."""
    text = asked.removeprefix("user: ").removeprefix("Question: ")
    return text.removesuffix("Answer:").strip()
