"""What a model was trained on, found again from the folder it lies in: the parent's own mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json
from trivium.stages.mixtures import Portion
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Learnt:
    """The sources a stage trained on: the share each had, and where each lies."""

    mixture: dict[str, Portion]
    places: dict[str, Path]


DOCUMENTS = ("pretrain", "midtrain")
HANDOVER = "training.json"
"""What a training stage leaves beside its model."""


def learnt_by(stage: str, start: str, model: Path, kinds: Sequence[str] = DOCUMENTS) -> Learnt:
    """The mixture behind the model in this folder, with the shares it really had."""
    home = _made_in(model)
    if home is None:
        raise TriviumError(
            f"{stage}: `replay` is a bare share, and nothing is known of what {start} learnt from; "
            "say `replay: {share: 0.3, data: ...}`."
        )
    record = _record(home)
    settings = record["settings"]
    if record["kind"] == "merge":
        # Ingredients of a soup share an ancestor and, but for what they were made to differ in, their data.
        return learnt_by(stage, settings["of"][0], _product(home, record, settings["of"][0]), kinds)
    shares = (record.get("summary") or {}).get("data")
    if record["kind"] not in kinds or not shares:
        raise TriviumError(
            f"{stage}: `replay` is a bare share, but {start} is a {record['kind']} stage that left no "
            "mixture behind that can be seen again here; say `replay: {share: 0.3, data: ...}`."
        )
    known = _written(stage, settings, home, record, kinds)
    mixture = {
        name: known.mixture[name].model_copy(update={"weight": facts["share"], "easy_first": None})
        for name, facts in shares.items()
        if facts["share"] > 0
    }
    return Learnt(mixture, {name: known.places[name] for name in mixture})


def consumed_by(model: Path) -> dict[str, float]:
    """The passes that a model and its ancestors made over each source, by the source's origin."""
    if (model.parent / HANDOVER).is_file():
        return dict(read_json(model.parent / HANDOVER).get("consumed", {}))
    home = _made_in(model)
    if home is None:
        return {}
    record = _record(home)
    settings = record["settings"]
    found: dict[str, float] = {}
    for start in _starts(settings):
        for origin, passes in consumed_by(_product(home, record, start)).items():
            found[origin] = max(passes, found.get(origin, 0.0))
    return found


def _written(
    stage: str, settings: Mapping[str, Any], home: Path, record: Mapping[str, Any], kinds: Sequence[str]
) -> Learnt:
    """The sources that the stage's own settings name, and those it inherited for its replay."""
    replay = settings.get("replay") or {}
    named = {**settings["data"], **(replay.get("data") or {})}
    written = {name: Portion.model_validate(portion) for name, portion in named.items()}
    places = {name: _product(home, record, portion.of or name) for name, portion in written.items()}
    mixture = {name: portion.model_copy(update={"of": None}) for name, portion in written.items()}
    if replay and not replay.get("data"):
        start = settings["from"]
        older = learnt_by(stage, start, _product(home, record, start), kinds)
        return Learnt({**older.mixture, **mixture}, {**older.places, **places})
    return Learnt(mixture, places)


def _made_in(model: Path) -> Path | None:
    """The folder of the stage that made a model, if one did."""
    return next((folder for folder in model.parents[:3] if (folder / "stage.yaml").is_file()), None)


def _record(home: Path) -> dict[str, Any]:
    """What a stage wrote of itself."""
    record: dict[str, Any] = yaml.safe_load((home / "stage.yaml").read_text(encoding="utf-8"))
    return record


def _starts(settings: Mapping[str, Any]) -> list[str]:
    """The models that a stage began from: those it merged, or the one it trained, or none."""
    return settings.get("of") or [settings[key] for key in ("from",) if key in settings]


def _product(home: Path, record: Mapping[str, Any], name: str) -> Path:
    """Where a thing that the stage names lies: a stage's folder in the store, or a place outside."""
    if name not in record["parents"]:
        return Path(record["outside"][name])
    entry = home.parent / record["parents"][name].partition("@")[0]
    return next((entry / inside for inside in ("data", "model") if (entry / inside).is_dir()), entry)


def held_out_by(stage: str, models: Mapping[str, Path]) -> tuple[dict[str, Portion], dict[str, Path]]:
    """What all of these models held out of what each learnt from, and where it lies."""
    mixture: dict[str, Portion] = {}
    places: dict[str, Path] = {}
    for start, model in models.items():
        try:
            learnt = learnt_by(stage, start, model)
        except TriviumError:
            raise TriviumError(
                f"{stage}: nothing is known of the texts that {start} held out; name the text to measure on "
                "as `data`."
            ) from None
        for name, portion in learnt.mixture.items():
            if places.setdefault(name, learnt.places[name]) == learnt.places[name]:
                # What is held out at a small share is held out at a larger one, too.
                least = min(portion.validation, mixture.get(name, portion).validation)
                mixture[name] = portion.model_copy(update={"validation": least})
    return mixture, places


def trained_shards(models: Sequence[Path], tokenizer: Tokenizer) -> list[Shards]:
    """What models and their ancestors learnt from, as far as it is known and spelt by this tokenizer."""
    folders = dict.fromkeys(folder for model in models for folder in _trained_on(model))
    spelt = [one for one in folders if read_json(one / "manifest.json")["tokenizer"] == tokenizer.fingerprint]
    # They are compared with and not learnt from, so a damaged one does no harm.
    return [Shards(folder, verify=False) for folder in spelt]


def _trained_on(model: Path) -> list[Path]:
    home = _made_in(model)
    if home is None:
        return []
    record = _record(home)
    settings, order = record["settings"], [*record["parents"], *record["outside"]]
    named: list[str] = []
    if record["kind"] in DOCUMENTS:
        mixture = settings["data"] | ((settings.get("replay") or {}).get("data") or {})
        named = [portion.get("of") or name for name, portion in mixture.items()]
    found = []
    for name in named:
        own = home / "tokenised" / str(order.index(name))
        place = own if own.is_dir() else _product(home, record, name)
        found += [place] if (place / "manifest.json").is_file() else []
    for start in _starts(settings):
        found += _trained_on(_product(home, record, start) / "model")
    return found
