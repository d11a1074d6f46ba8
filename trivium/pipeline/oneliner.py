"""Recipes of one stage, made from a command: `trivium sft MODEL --data chats.jsonl --epochs 2`."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import expanded, whole_folder, write_text
from trivium.kit.numbers import number
from trivium.kit.settings import descriptions, plain_types
from trivium.model.lora import Kind
from trivium.model.named import find_stage, refuse_unknown
from trivium.recipe import foreign
from trivium.recipe.yaml_text import parse
from trivium.stages import kinds
from trivium.stages.parts.stage import Stage

SHORT = {
    "depth": "model.depth",
    "width": "model.width",
    "limit": "data.limit",
    "validation-share": "data.validation",
}
"""Short flags for settings that lie inside others."""
VOCABULARY = 4096


def settings_of(kind: type[Stage], words: Sequence[str], more: Sequence[str] = ()) -> dict[str, Any]:
    """The settings that `--key value` words give, foreign names understood."""
    known = {*more, *(field.alias or name for name, field in kind.model_fields.items())}
    settings: dict[str, Any] = {}
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            raise TriviumError(f"{word} is no flag; settings are written --key VALUE, as in --epochs 2.")
        name, equals, text = word.removeprefix("--").partition("=")
        if not equals:
            text = waiting.pop(0) if waiting and not waiting[0].startswith("--") else "true"
        name = name.replace("-", "_")
        key = SHORT.get(name.replace("_", "-"), name)
        value = _value(name, text)
        outer = key.partition(".")[0]
        if name == "adapter" and isinstance(value, str):
            # Beside `--adapter.rank 8` a method is one setting among others.
            method = {"base": "int4"} if value == "qlora" else {"kind": value}
            foreign.place(settings, "adapter", {**method, **(settings.get("adapter") or {})})
        elif outer in known and outer not in ("kind", "from"):
            if outer == "reward":
                value = value if isinstance(value, list) else str(value).split(",")
                value = [*settings.get("reward", []), *value]
            foreign.place(settings, key, value)
        elif not foreign.understood(name, value, known, settings):
            hint = foreign.answer(name, known)
            hint = f"; {hint}" if hint else nearest(name, [*known, *SHORT, *foreign.KEYS])
            raise TriviumError(
                f"--{name.replace('_', '-')} is not a setting of {_kind_of(kind)}{hint or '.'}"
            )
    foreign.sizes(settings, known)
    return settings


def _kind_of(kind: type[Stage]) -> str:
    return next(name for name, one in Stage.kinds.items() if one is kind)


def _value(name: str, text: str) -> Any:
    try:
        value = parse(text, "")[0]
    except TriviumError:
        value = text
    return number(value) if isinstance(value, str) else value


def recipe_of(
    verb: str,
    kind: str,
    model: str | None,
    data: Sequence[str],
    words: Sequence[str],
    runs: Path,
    name: str | None,
) -> tuple[str, str]:
    """The name and the text of the recipe that a command stands for."""
    stage = kinds()[kind]
    settings = settings_of(stage, words, ("vocabulary",) if kind == "pretrain" else ())
    portion = settings.pop("data", {})
    sources = {_place(one): dict(portion) for one in data}
    content: dict[str, Any] = {verb: {"kind": kind}}
    if kind == "pretrain":
        vocabulary = settings.pop("vocabulary", VOCABULARY)
        if model is None:
            texts = [
                {"path": place, **{k: v for k, v in portion.items() if k == "limit"}} for place in sources
            ]
            content = {"words": {"kind": "tokenizer", "data": texts, "vocabulary": vocabulary}, **content}
        content[verb] |= {"tokenizer": "words" if model is None else _model(model, runs)}
    elif model is None:
        raise TriviumError(
            f"trivium {verb} needs a MODEL to start from: a stage, a folder or an id on the hub."
        )
    else:
        content[verb] |= {"from": _model(model, runs)}
    if "teacher" in settings:
        settings["teacher"] = _model(str(settings["teacher"]), runs)
    content[verb] |= {"data": sources, **_absolute(settings)}
    title = name or f"{verb}-{_short(data[0])}"
    text = yaml.safe_dump({"name": title, "stages": content}, sort_keys=False, allow_unicode=True, width=100)
    return title, text


def written(title: str, text: str, runs: Path) -> Path:
    """The recipe's file, beside its results."""
    place = runs / title / "recipe.yaml"
    place.parent.mkdir(parents=True, exist_ok=True)
    write_text(place, text)
    return place


def copied(model: Path, to: Path) -> None:
    """A copy of a finished model's folder, which appears whole and replaces only a model."""
    if to.is_dir() and any(to.iterdir()) and not (to / "config.json").is_file():
        raise TriviumError(f"{to} holds other things than a model; name another folder with --to.")
    with whole_folder(to) as beside:
        shutil.copytree(model, beside, dirs_exist_ok=True)


def complaint(text: str, verb: str) -> str:
    """A complaint about the recipe of a command, in the words that were typed: its MODEL and its flags."""

    def typed(found: re.Match[str]) -> str:
        key = "reward" if found[1] == "reward_files" else found[1]
        return "MODEL" if key in ("from", "tokenizer") else f"--{key.replace('_', '-')}"

    text = re.sub(r"; its stages are [^;]*$", "; check the path.", text)
    text = re.sub(rf"^recipe\.yaml(?::\d+)?: stages\.{re.escape(verb)}\.([\w.]+)", typed, text)
    return text.replace("is neither a stage of this recipe nor a path that exists", "is no path that exists")


def _absolute(settings: Any) -> Any:
    """Settings whose files, also `rewards.py:function`, are named as from another folder."""
    if isinstance(settings, dict):
        return {_absolute(key): _absolute(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_absolute(one) for one in settings]
    if not isinstance(settings, str):
        return settings
    file, colon, function = settings.rpartition(":")
    if file.endswith(".py"):
        return _place(file) + colon + function
    return _place(settings) if settings.startswith(("./", "../", "~/")) else settings


def _place(data: str) -> str:
    """Data as a recipe in another folder names it."""
    if data.startswith("world:"):
        return data
    path = expanded(data)
    pattern = any(sign in data for sign in "*?[")
    # What reads `owner/name` may lie on the hub; all else is a place here.
    if path.exists() or pattern or data.startswith((".", "/", "~")) or ("/" not in data and path.suffix):
        return str(path.absolute())
    return data


def _model(name: str, runs: Path) -> str:
    stage = find_stage(name, runs)
    if stage is not None:
        return str(stage.absolute())
    path = expanded(name)
    if path.exists():
        return str(path.absolute())
    refuse_unknown(name, runs)
    return name


def _short(data: str) -> str:
    """A name for a recipe from the data it learns from."""
    stem = Path(data.partition("?")[0].removeprefix("world:").rstrip("/")).name.partition(".")[0]
    return "".join(sign if sign.isalnum() or sign in "-_" else "-" for sign in stem) or "data"


def described(kind: type[Stage]) -> Mapping[str, str]:
    """Every setting of a kind as a flag, with what it means."""
    found, meant = {}, descriptions(kind)
    for name, field in kind.model_fields.items():
        key = field.alias or name
        if key not in ("kind", "from", "data"):
            found[f"--{key.replace('_', '-')}"] = meant.get(name, "").replace("\n", " ") + _values(key, field)
    return found


def _values(key: str, field: FieldInfo) -> str:
    """The words a setting takes and its default, in brackets."""
    words = [
        str(word)
        for one in plain_types(field.annotation)
        if get_origin(one) is Literal
        for word in get_args(one)
    ]
    words = [*get_args(Kind), "qlora"] if key == "adapter" else words
    default = field.default
    plain = isinstance(default, (str, int, float)) and not isinstance(default, bool)
    said = [", ".join(words)] if words else []
    said += [f"default {default}"] if plain and default != "" else []
    return f" [{'; '.join(said)}]" if said else ""
