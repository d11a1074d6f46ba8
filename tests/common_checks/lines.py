"""The table's form: which setting of which kinds, how it is moved, and what has to change by it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from every_field import Setting, every_setting
from tiny_run import Seen

from trivium.learn.settings import Training
from trivium.stages import kinds

SHAPE = {"depth": 1, "width": 32, "head_width": 16, "heads": 2, "inner_width": 32}
BASES: dict[str, dict[str, Any]] = {
    "anneals": {
        "from": "base", "candidates": {"one": "corpus"}, "measure": "others", "batch": 128, "steps": 2,
    },
    "compare": {
        "from": "base", "against": "second", "data": "problems.jsonl", "judge": ["mine.py:spread"],
        "max_new_tokens": 6,
    },
    "corpus": {"data": "texts.jsonl", "tokenizer": "words"},
    "distill": {
        "from": "base", "teacher": "second", "data": "answers.jsonl", "batch": 128, "steps": 2, "context": 64,
    },
    "evaluate": {"from": "base", "on": ["instructions"], "asking": {"limit": 2, "max_new_tokens": 2}},
    "forecast": {"of": [["forked"], ["base", "second"], ["wide"]], "take": "loss"},
    "grow": {"from": "base", "layers": 2},
    "label_steps": {
        "from": "base", "data": "problems.jsonl", "scorer": "mine.py:spread", "threshold": 4, "rollouts": 2,
        "num_generations": 2, "max_new_tokens": 24, "separator": " ", "temperature": 0.5,
    },
    "merge": {"of": ["base", "forked"], "data": {"texts.jsonl": {"validation": 0.3}}},
    "midtrain": {"from": "base", "data": "corpus", "batch": 128, "steps": 2},
    "multimodal": {
        "from": "base", "data": "pictures.jsonl", "batch": 128, "steps": 2, "context": 64,
        "picture": {"patch": 4, "tokens": 4, "layers": 1, "width": 32}, "steps_frozen": 0.0,
    },
    "ppo": {
        "from": "base", "data": "problems.jsonl", "reward": ["mine.py:spread"],
        "prompts_per_step": 4, "epochs_per_rollout": 1,
        "steps": 2, "max_new_tokens": 6, "sycophancy": 0,
    },
    "preference": {
        "from": "base", "data": "pairs.jsonl", "pairs": 4, "steps": 2, "context": 64, "sycophancy": 0,
    },
    "pretrain": {"data": "corpus", "model": SHAPE, "context": 64, "batch": 128, "steps": 2},
    "quantize": {"from": "base", "data": {"texts.jsonl": {"validation": 0.3}}, "context": 64},
    "reward": {"from": "base", "data": "pairs.jsonl", "pairs": 4, "steps": 2, "context": 64},
    "rlvr": {
        "from": "base", "data": "problems.jsonl", "reward": ["mine.py:spread"],
        "prompts_per_step": 2, "num_generations": 3,
        "steps": 2, "max_new_tokens": 6,
    },
    "sft": {"from": "base", "data": "answers.jsonl", "batch": 128, "steps": 2, "context": 64},
    "curate": {"data": "texts.jsonl", "steps": [{"deduplicate": "exact"}]},
    "shrink": {
        "from": "deep", "layers": 2, "layers_by": "influence", "context": 64,
        "data": {"texts.jsonl": {"validation": 0.3}},
    },
    "quality_classifier": {"data": "texts.jsonl", "label": "ease", "held_out": 0.5},
    "synthesize": {
        "from": "base", "data": "problems.jsonl", "form": "completion",
        "steps": [{"answer": {"max_new_tokens": 6, "cut": True}}],
    },
    "text_to_sql": {"database": "shop.sql", "data": "questions.jsonl", "held_out": 0.25},
    "tokenizer": {"data": "texts.jsonl", "vocabulary": 272},
}  # fmt: skip
"""For every kind, a stage of it that ends in a tenth of a second."""

TRAINS = tuple(name for name, stage in sorted(kinds().items()) if issubclass(stage, Training))
DOCUMENTS = ("anneals", "distill", "midtrain", "multimodal", "pretrain", "sft")
"""Kinds that pack documents into rows, so that their steps are counted in tokens."""
PAIRS = ("preference", "reward")
ROLLOUTS = ("ppo", "rlvr")
ANSWERS = ("sft", "multimodal")
"""Kinds that learn from conversations as examples."""
INHERITS = tuple(name for name in TRAINS if name != "pretrain")

Check = Callable[[Seen, Seen], None]


@dataclass(frozen=True)
class Line:
    """One setting of one kind, moved one way."""

    kind: str
    path: str
    value: Any
    changes: Mapping[str, Any] = field(default_factory=dict)
    """What is laid over the base to move the setting: {path: value}."""
    both: Mapping[str, Any] = field(default_factory=dict)
    """What is laid over the base before and after."""
    check: Check | None = None
    refused: str | None = None
    """Words of the refusal, where moving it is one."""
    fault: str | None = None
    """What goes wrong on purpose: `gradient` is never finite."""
    trained: bool = True
    """Whether it is trained; else the trainer is made and left."""

    def __str__(self) -> str:
        # Ports differ between the processes that collect the same tests.
        shown = re.sub(r"(127\.0\.0\.1):\d+", r"\1", str(self.value).replace(" ", ""))
        return f"{self.kind}.{self.path}={shown if len(shown) < 40 else shown[:37] + '...'}"

    def settings(self, *, moved: bool) -> dict[str, Any]:
        """The stage's settings before or after the move."""
        found = copy.deepcopy(BASES[self.kind])
        for path, value in {**self.both, **(self.changes if moved else {})}.items():
            put(found, path, value)
        return found


LINES: list[Line] = []


def moves(
    path: str,
    *values: Any,
    kinds: Collection[str],
    both: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
    refused: str | None = None,
    fault: str | None = None,
    trained: bool = True,
    moved: bool = True,
) -> Callable[[Any], Any]:
    """A check of a setting for these kinds and values; `beside` moves along, or in its place if not `moved`.

    The check is called with the run before, the run after, and the value if it takes one.
    """

    def put_down(check: Any) -> Any:
        for kind in kinds:
            for value in values:
                LINES.append(
                    Line(
                        kind, path, value, {**({path: value} if moved else {}), **(beside or {})}, both or {},
                        _bound(check, value), refused, fault, trained,
                    )
                )  # fmt: skip
        return check

    return put_down


def refuses(path: str, value: Any, words: str, *, kinds: Collection[str], **more: Any) -> None:
    """Moving the setting is refused with these words by these kinds."""
    moves(path, value, kinds=kinds, refused=words, **more)(None)


def _bound(check: Any, value: Any) -> Check | None:
    if check is None or check.__code__.co_argcount == 2:
        return check
    return lambda before, after: check(before, after, value)


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Lay one value over settings, below mappings that stand there already."""
    *above, last = path.split(".")
    for key in above:
        inner = settings.get(key)
        if not isinstance(inner, dict):
            settings[key] = inner = {}
        settings = inner
    if value is None:
        settings.pop(last, None)
    elif isinstance(value, Mapping) and isinstance(settings.get(last), dict) and last not in WHOLE:
        settings[last] = {**settings[last], **copy.deepcopy(dict(value))}
    else:
        settings[last] = copy.deepcopy(value)


WHOLE = ("data", "candidates", "measure", "watch", "test")
"""Settings whose mappings name sources, and so take the place of what stood there."""


def repeated() -> set[int]:
    """The places of lines that move a setting which another line moves too, of this kind or another.

    Of the lines of one setting, the first that is not refused is none of them.
    """
    owners = {(one.kind, one.path): one.owner for one in every_setting()}
    seen: set[str] = set()
    found = set()
    for place, line in sorted(enumerate(LINES), key=lambda one: one[1].refused is not None):
        owner = owners.get((line.kind, line.path), f"{line.kind}.{line.path}")
        found |= {place} if owner in seen else set()
        seen.add(owner)
    return found


def without_a_line() -> list[Setting]:
    """The settings of Trivium's kinds that no line moves."""
    moved = {(line.kind, line.path) for line in LINES}
    return [
        one
        for one in every_setting()
        # What only holds other settings is moved with each of them.
        if (one.kind, one.path) not in moved
        and not any(kind == one.kind and path.startswith(f"{one.path}.") for kind, path in moved)
    ]


def choices_never_made() -> dict[str, set[Any]]:
    """For every setting with a fixed list of values, those that no line of any kind moves it to."""
    made: dict[str, set[Any]] = {}
    offered: dict[str, set[Any]] = {}
    owners = {(one.kind, one.path): one for one in every_setting()}
    for one in owners.values():
        if one.choices:
            offered.setdefault(one.owner, set()).update(one.choices)
            made.setdefault(one.owner, set()).update([] if isinstance(one.default, list) else [one.default])
    for line in LINES:
        owner = owners.get((line.kind, line.path))
        if owner is not None and owner.choices:
            given = line.value if isinstance(line.value, (list, tuple)) else [line.value]
            # A name with settings of its own is none of the list.
            made[owner.owner].update(one for one in given if not isinstance(one, dict))
    return {owner: offered[owner] - made[owner] for owner in offered if offered[owner] - made[owner]}


def of_nothing() -> list[Line]:
    """Lines for settings that no kind has."""
    known = {(one.kind, one.path) for one in every_setting()}
    return [line for line in LINES if (line.kind, line.path) not in known]
