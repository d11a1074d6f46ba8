"""What a report asks about a person's own data: texts, conversations, pairs and problems of the stages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.data.split import unseen
from trivium.evals.bits import texts_of
from trivium.evals.own import exchanges
from trivium.evals.published import question_of, rows_of
from trivium.evals.settings import Settings
from trivium.grade.scorer import scorer_names
from trivium.kit.errors import TriviumError
from trivium.lab.gather import Seen

OWN_LIMIT = 24
"""Items of a task that was not asked for: a report shall not take longer than a small run."""
TASKS = {
    "corpus": "bits", "pretrain": "bits", "midtrain": "bits", "sft": "replies", "preference": "pairs",
    "rlvr": "own",
}  # fmt: skip
SHARE = 0.01


def own_tasks(stages: Sequence[Seen], limit: int = OWN_LIMIT) -> list[dict[str, Any]]:
    """A task for each source of a person's own, in the order in which the stages read them."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in stages:
        settings = stage.record.get("settings") or {}
        # Preferences of answers that the model itself gives read problems.
        task = "own" if settings.get("online") else TASKS.get(str(stage.record.get("kind")))
        extra = _scoring(settings) if task == "own" else {}
        if task is None or extra is None:
            continue
        for written, place, share in _sources(stage):
            name = f"{task if task != 'bits' else 'text'} of {Path(written).name}"
            if task == "bits":
                asked = {"sources": [place], "held_out": share}
            elif task == "own":
                asked = {"data": place, **extra}
            else:
                asked = {"data": place, "held_out": share}
            found.setdefault((task, place), {"task": task, "name": name, "limit": limit, **asked})
    return [one for one in found.values() if _can_be_asked(one)]


def _can_be_asked(spec: Mapping[str, Any]) -> bool:
    """Whether a source has what its task asks about (it was not asked for by name)."""
    settings = Settings(limit=spec["limit"])
    try:
        if spec["task"] == "bits":
            return all(
                any(True for _ in texts_of(one, settings, spec["held_out"])) for one in spec["sources"]
            )
        if spec["task"] == "replies":
            return any(True for _ in exchanges(unseen(spec["data"], spec["held_out"], spec["limit"])))
        if spec["task"] == "own":
            return bool([question_of(name, row) for name, row in rows_of(spec["data"], settings)])
    except TriviumError:
        return False
    return True


def _sources(stage: Seen) -> Iterator[tuple[str, str, float]]:
    """Each file or folder a stage read as it was written, where it lies, and the share it held out of it."""
    settings, outside = stage.record.get("settings") or {}, stage.record.get("outside") or {}
    whole = settings.get("validation")
    share = whole if isinstance(whole, float) else SHARE
    data = settings.get("data")
    if isinstance(data, str):
        listed: list[tuple[str, Mapping[str, Any]]] = [(data, {})]
    elif isinstance(data, Mapping):
        listed = [(str(name), one if isinstance(one, Mapping) else {}) for name, one in data.items()]
    else:
        listed = [(str(one.get("path")), one) for one in data or [] if isinstance(one, Mapping)]
    for written, options in listed:
        place = outside.get(written)
        plain = not options.get("columns") and not options.get("split") and not options.get("subset")
        if place is not None and plain and Path(place).exists():
            own = options.get("validation")
            yield written, str(place), own if isinstance(own, float) else share


def _scoring(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scorer of a stage's first reward; None where that is a function or a model of the person's."""
    rewards = settings.get("reward") or []
    first = rewards[0] if isinstance(rewards, list) and rewards else rewards
    name = first.get("name") if isinstance(first, Mapping) else first
    return {"scorer": name} if isinstance(name, str) and name in scorer_names() else None
