"""What the models answer, asked once: answers are kept by who was asked, what, how, and by which code."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import trivium
from trivium.evals.evaluate import evaluate
from trivium.evals.results import Results, TaskResult, answers_path
from trivium.evals.settings import Settings, TaskSpec
from trivium.evals.task import outside, planned
from trivium.kit.files import checksum
from trivium.kit.fingerprint import fingerprint
from trivium.lab.gather import Member
from trivium.recipe.outside import Checksums, content_fingerprint, locate
from trivium.world.catalogue import SOURCES

DEFAULT_LIMIT = 100
_ASKING = ("evals", "generate", "grade", "model", "tokens", "world")


def default_tasks(
    sources: Mapping[str, Mapping[str, str]], windows: Sequence[int], limit: int = DEFAULT_LIMIT
) -> list[dict[str, Any]]:
    """A small set: sums and instructions always, the rest where its subject was in the data."""
    every = {name: one for found in sources.values() for name, one in found.items()}
    # What takes several answers an item, or long texts, is asked less often.
    fewer = max(limit * 3 // 5, 2)
    chosen: list[dict[str, Any]] = []
    read = [name for name in ("prose", "facts", "sums", "craft", "tongue") if name in sources]
    if read:
        chosen.append({"task": "bits", "sources": "+".join(read), "limit": max(limit // 4, 24)})
    if "facts" in sources:
        chosen.append({"task": "facts", **fitting("facts", every)})
    if "craft" in sources:
        chosen.append({"task": "craft", **fitting("craft", every)})
    if "tongue" in sources:
        chosen.append({"task": "tongue", "limit": fewer, **fitting("tongue", every)})
    chosen.append({"task": "instructions", **fitting("chat", every)})
    chosen.append({"task": "sums", "samples": 4})
    direct = {"name": "sums (direct answer)", "chain_of_thought": False, "reasoning": "off"}
    chosen.append({"task": "sums", **direct})
    if "ledger" in sources:
        chosen.append({"task": "sql", "limit": fewer, **fitting("ledger", every)})
    if "facts" in sources and ("chat" in sources or "taste" in sources):
        chosen.append({"task": "sycophancy", "limit": fewer, **fitting("taste", every)})
    if "chronicle" in sources:
        longest = max(windows)
        lengths = sorted({max(64, longest // 8), longest // 4, longest // 2, longest - 16})
        chosen.append({
            "task": "passkey", "kinds": "passkey", "depths": "0+0.5+1", "limit": fewer,
            "lengths": "+".join(str(one) for one in lengths if one >= 64),
        })  # fmt: skip
    return chosen


def fitting(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that a source of the world knows."""
    known = {field.name for field in dataclasses.fields(SOURCES[source].options)}
    return {name: value for name, value in options.items() if name in known}


def answers(
    member: Member,
    tasks: Sequence[TaskSpec],
    settings: Settings,
    kept: Path,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Everything one model was asked; what was asked before is read, the rest is asked now."""
    wanted = [planned(spec, settings) for spec in tasks]
    places = [
        kept / f"{member.fingerprint}-{_question(one.task.name, one.settings.model_dump(), one.options)}.json"
        for one in wanted
    ]
    missing = [place for place, at in enumerate(places) if not (at.is_file() and answers_path(at).is_file())]
    asked = Results(member.name, {})
    if missing:
        if say is not None:
            say(f"asking {member.name}: {', '.join(wanted[place].label for place in missing)}")
        specs = [tasks[place] for place in missing]
        asked = evaluate(member.model, member.tokenizer, specs, settings, name=member.name)
    found: dict[str, TaskResult] = {}
    for label, place in zip((one.label for one in wanted), places):
        if label in asked.tasks:
            Results(member.fingerprint, {label: asked.tasks[label]}).save(place)
        (found[label],) = Results.load(place).tasks.values()
    return Results(member.name, found)


def _question(name: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    here = Path.cwd()
    files = {
        one: content_fingerprint(one, here, Checksums())
        for _, one in outside({**options, "search": settings.get("search")})
        if locate(one, here)
    }
    return fingerprint([name, dict(settings), dict(options), files, code()])


@cache
def code() -> str:
    """What the answers depend on beside the model: the code that asks, answers and judges."""
    root = Path(trivium.__file__).parent
    files = sorted(path for room in _ASKING for path in (root / room).rglob("*.py"))
    return fingerprint({path.relative_to(root).as_posix(): checksum(path) for path in files})
