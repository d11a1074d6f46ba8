"""What pydantic complains about, in one sentence: file, line, key, what is wrong and how to fix it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from trivium.kit.errors import nearest
from trivium.kit.settings import plain_types
from trivium.recipe.foreign import answer
from trivium.recipe.read import Written
from trivium.stages.parts.stage import Stage

_KINDS = {
    "finetune": "sft", "fine_tune": "sft", "pretraining": "pretrain", "dpo": "preference", "grpo": "rlvr",
    "rl": "rlvr", "kto": "preference", "eval": "evaluate", "lora": "sft",
}  # fmt: skip
"""What others call a kind of stage."""
_BRANCHES = {"str", "int", "float", "bool", "constrained-str", "constrained-int", "constrained-float"}
# How pydantic speaks of what was given, and words of its own that tell a person nothing.
_SUBJECT = re.compile(r"^\w+ should")
_OURS = re.compile(r" or (instance of \w+|object to extract fields from)| after validation")

_MAPPING = "should be a valid mapping, as in `{key: value}`"
_PLAIN = {
    "list_type": "should be a list, as in `[one, two]`",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
    "int_parsing": "should be a whole number",
    "float_parsing": "should be a number",
}
_NAMES = "may hold letters, digits, `_` and `-`, and begins with a letter or a digit"


def sentence(error: ValidationError, model: type[BaseModel], written: Written) -> str:
    """The deepest complaint in words; an unknown key goes before a wrong value."""
    details = max(error.errors(), key=lambda one: (len(one["loc"]), one["type"] == "extra_forbidden"))
    keys, known = _walk(details["loc"], model)
    place = written.place(keys)
    kind, context = details["type"], details.get("ctx") or {}
    kinds = list(Stage.kinds)
    if kind == "extra_forbidden":
        meant = answer(keys[-1], known)
        return f"{place} is not a setting{f'; {meant}.' if meant else _instead(keys[-1], known)}"
    if kind == "missing":
        return f"{place} is missing; write it."
    if kind == "union_tag_not_found":
        return f"{place} has no `kind`; write one of {', '.join(kinds)}."
    if kind == "union_tag_invalid":
        tag = str(context.get("tag"))
        if tag in _KINDS:
            return f"{place}: there is no kind of stage `{tag}`; write `{_KINDS[tag]}`."
        return f"{place}: there is no kind of stage `{tag}`{_instead(tag, kinds)}"
    if kind == "value_error":
        return f"{place}: {context.get('error', details['msg'])}"
    value = repr(details["input"])
    value = value if len(value) <= 60 else f"{value[:57]}..."
    if str(context.get("pattern", "")).startswith("^[A-Z"):
        return f"{place} cannot be {value}: it {_NAMES}."
    message = _SUBJECT.sub("should", details["msg"]).rstrip(".")
    return f"{place} cannot be {value}: it {_PLAIN.get(kind) or _OURS.sub('', message)}."


def _instead(word: str, known: Iterable[str]) -> str:
    """What to write instead: the nearest known word, or all of them when none is near."""
    return nearest(word, known) or f"; known are {', '.join(sorted(known))}."


def _walk(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[list[str], list[str]]:
    """The keys a person wrote on the way to an error, and the keys known at its place."""
    current: list[Any] = [model]
    keys: list[str] = []
    known: list[str] = []
    for part in location:
        models = [one for one in current if isinstance(one, type) and issubclass(one, BaseModel)]
        fields = {field.alias or name: field for one in models for name, field in one.model_fields.items()}
        containers = [one for one in current if get_origin(one) in (dict, list, tuple, Mapping)]
        branch = [one for one in models if part == one.__name__ or part in _tags(one)]
        if part in fields and not (branch and len(models) > 1):
            current, known = plain_types(fields[str(part)].annotation), list(fields)
        elif branch:
            # Pydantic put the name of a union's branch here; it is no key that a person wrote.
            current = branch
            continue
        elif part == "[key]" or part in _BRANCHES or "[" in str(part):
            continue
        else:
            current = [option for one in containers for option in plain_types(get_args(one)[-1])]
            known = list(fields)
        keys.append(str(part))
    return keys, known


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    return get_args(model.model_fields["kind"].annotation) if issubclass(model, Stage) else ()
