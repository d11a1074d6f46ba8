"""What the tasks of a recipe ask, as examinations that training data can be searched for."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any
from urllib.parse import urlencode

from trivium import world
from trivium.curate.examination import Examination, Examined
from trivium.evals.bits import SOURCES
from trivium.evals.settings import Settings, TaskSpec
from trivium.evals.task import ALSO_CALLED, Planned, listed, of_the_world, planned

_QUESTIONS = {
    "facts": "facts",
    "craft": "craft",
    "tongue": "tongue",
    "sums": "sums",
    "first_error": "sums",
    "sql": "ledger",
    "instructions": "chat",
    "ending": "chat",
    "sycophancy": "taste",
    "forgetting": "facts",
}
"""The source of the world whose questions a task asks; `calibration` names its own."""
_NOWHERE = ("passkey", "conversation", "pictures", "sounds")
"""Tasks whose questions are made for the model at hand, or are nothing without their picture or sound."""


def examined(specs: Sequence[TaskSpec], asking: Settings) -> Examined:
    """The questions and texts of these tasks, and the tasks whose questions are not known here."""
    found: list[Examination] = []
    unknown: list[str] = []
    for spec in specs:
        plan = planned(spec, asking)
        name = ALSO_CALLED.get(plan.task.name, plan.task.name)
        if name.startswith("lm_eval:") or (name == "pairs" and plan.options.get("held_out")):
            # Of pairs a tokenizer decides which are held out.
            unknown.append(plan.label)
        elif name not in _NOWHERE:
            found += _of_task(name, plan)
    return Examined(found, tuple(unknown))


def _of_task(name: str, plan: Planned) -> list[Examination]:
    options, share = dict(plan.options), float(plan.options.get("held_out", 0.0))
    if "data" in options:
        return [Examination(path=str(options["data"]), held_out=share)]
    if name in ("bits", "positions"):
        default: Sequence[str] = SOURCES if name == "bits" else ()
        named = listed(options.get("sources", options.get("source"))) or default
        return [
            _world(one, {"split": "test"}, plan.settings, texts=True)
            if of_the_world(one)
            else Examination(path=one, held_out=share)
            for one in map(str, named)
        ]
    if name == "format":
        country = {"country": options.get("country", 0)}
        sums = _world("sums", country, plan.settings)
        return [sums, _world("chat", {"kind": "json", **options, **country}, plan.settings)]
    source = _QUESTIONS.get(name) or str(options.pop("source", "facts"))
    known = {field.name for field in fields(world.options(source, {}))} | {"split", "start"}
    found = [_world(source, {one: options[one] for one in options if one in known}, plan.settings)]
    if name == "forgetting":
        found.append(_world("prose", {"split": "test"}, plan.settings, texts=True))
    return found


def _world(
    source: str, options: Mapping[str, Any], settings: Settings, *, texts: bool = False
) -> Examination:
    """A source of the world, asked for as many questions as the task asks at most, drawn by the same seed."""
    name, _, written = source.removeprefix("world:").partition("?")
    drawn = urlencode({"seed": settings.seed, "limit": settings.limit, **options})
    # What a source is written with comes last and counts.
    return Examination(path=f"world:{name}?{drawn}{'&' + written if written else ''}", texts=texts)
