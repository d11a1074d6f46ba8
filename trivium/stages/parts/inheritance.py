"""What a model was trained on, found again from the folder it lies in: the parent's own mixture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.data.ingredients import Ingredient
from trivium.data.overlap import TokenisedData
from trivium.data.settings import MixtureSource, mixture_of
from trivium.data.shards import Shards
from trivium.kit.errors import TriviumError
from trivium.kit.files import read_json, read_object
from trivium.kit.seals import compared, read_record
from trivium.stages.parts.stage import HANDOVER, Stage


@dataclass(frozen=True)
class Learnt:
    """The sources a stage trained on: the share each had, and where each lies."""

    mixture: dict[str, MixtureSource]
    places: dict[str, Path]


NEW_LAYERS = "new_layers.json"
"""What a training stage leaves beside its model, next to `HANDOVER` and `MOMENTS`."""


def layers_grown(model: Path) -> tuple[int, ...] | None:
    """The layers that a grow stage added to the model in this folder; None where none made it."""
    place = model.parent / NEW_LAYERS
    return tuple(read_json(place)) if place.is_file() else None


def trains_on(kind: str) -> str | None:
    """What a kind of stage says that it trains on; None for a kind that is not known here."""
    return getattr(Stage.kinds.get(kind), "trains_on", None)


def learnt_by(stage: str, start: str, model: Path, *, examples: bool = False) -> Learnt:
    """The mixture behind the model in this folder, with the shares it really had.

    With `examples` it may be one of conversations, and of prompts with completions.
    """
    home = _made_in(model)
    if home is None:
        raise TriviumError(
            f"{stage}: `replay` is a bare share, and nothing is known of what {start} learnt from; "
            "say `replay: {share: 0.3, data: ...}`."
        )
    record = read_record(home)
    settings = record["settings"]
    if record["kind"] == "merge":
        # Ingredients of a soup share an ancestor and, but for what they were made to differ in, their data.
        return learnt_by(
            stage, settings["of"][0], _product(home, record, settings["of"][0]), examples=examples
        )
    shares = _shares(model, record)
    if trains_on(record["kind"]) not in ("documents", *(["examples"] * examples)) or not shares:
        raise TriviumError(
            f"{stage}: `replay` is a bare share, but {start} is a {record['kind']} stage that left no "
            "mixture behind that can be seen again here; say `replay: {share: 0.3, data: ...}`."
        )
    known = _written(stage, settings, home, record, examples)
    mixture = {
        name: known.mixture[name].model_copy(update={"weight": share, "easy_first": None})
        for name, share in shares.items()
        if share > 0
    }
    return Learnt(mixture, {name: known.places[name] for name in mixture})


def _shares(model: Path, record: Mapping[str, Any]) -> dict[str, float]:
    """The share of each source in what this model learnt, which a kept checkpoint has of its own."""
    handed = model.parent / HANDOVER
    own = read_object(compared(handed)).get("shares") if handed.is_file() else None
    # Stages trained by older versions left the shares of their whole course alone.
    whole = (record.get("summary") or {}).get("data") or {}
    return own or {name: facts["share"] for name, facts in whole.items() if "share" in facts}


def consumed_by(model: Path) -> dict[str, float]:
    """The passes that a model and its ancestors made over each source, by the source's origin."""
    if (model.parent / HANDOVER).is_file():
        return dict(read_object(compared(model.parent / HANDOVER)).get("consumed", {}))
    home = _made_in(model)
    if home is None:
        return {}
    record = read_record(home)
    settings = record["settings"]
    found: dict[str, float] = {}
    for start in _starts(settings):
        for origin, passes in consumed_by(_product(home, record, start)).items():
            found[origin] = max(passes, found.get(origin, 0.0))
    return found


def _written(
    stage: str, settings: Mapping[str, Any], home: Path, record: Mapping[str, Any], examples: bool
) -> Learnt:
    """The sources that the stage's own settings name, and those it inherited for its replay."""
    replay = settings.get("replay") or {}
    named = {**settings["data"], **(replay.get("data") or {})}
    written = mixture_of(named)
    places = {name: _product(home, record, source.path) for name, source in written.items()}
    mixture = {name: source.model_copy(update={"of": None, "path": name}) for name, source in written.items()}
    if replay and not replay.get("data"):
        start = settings["from"]
        older = learnt_by(stage, start, _product(home, record, start), examples=examples)
        return Learnt({**older.mixture, **mixture}, {**older.places, **places})
    return Learnt(mixture, places)


def _made_in(model: Path) -> Path | None:
    """The folder of the stage that made a model, if one did."""
    places = (model, *model.parents[:3])
    return next((folder for folder in places if (folder / "stage.yaml").is_file()), None)


def _starts(settings: Mapping[str, Any]) -> list[str]:
    """The models that a stage began from: those it merged, or the one it trained, or none."""
    return settings.get("of") or [settings[key] for key in ("from",) if key in settings]


def _product(home: Path, record: Mapping[str, Any], name: str) -> Path:
    """Where a thing that the stage names lies: a stage's folder in the store, or a place outside."""
    if name not in record["parents"]:
        return Path(record["outside"][name])
    entry, _, checkpoint = record["parents"][name].partition("@")
    if checkpoint:
        return kept_model(home.parent / entry, checkpoint)
    inside = (home.parent / entry / product for product in ("data", "model"))
    return next((folder for folder in inside if folder.is_dir()), home.parent / entry)


def kept_model(entry: Path, checkpoint: str) -> Path:
    """The model that a stage kept at `tokens=2000000`, or at `step=1200`."""
    unit, _, amount = checkpoint.partition("=")
    kept = {
        folder: read_object(compared(folder / "kept.json")) for folder in sorted((entry / "kept").glob("*/"))
    }
    for folder, facts in kept.items():
        # The first that reached the place: optimiser steps seldom end on a round number of tokens.
        if [unit, int(amount)] in facts["at"] or (unit == "step" and facts["step"] == int(amount)):
            return folder / "model"
    have = ", ".join(f"{unit}={facts[unit]}" for facts in kept.values()) or "none"
    raise TriviumError(
        f"{read_record(entry)['stage']} kept no checkpoint at {checkpoint} (it kept: {have});"
        f" name that place in its `checkpoint: {{at: [...]}}` and run it again."
    )


def held_out_by(stage: str, models: Mapping[str, Path]) -> tuple[dict[str, MixtureSource], dict[str, Path]]:
    """What all of these models held out of what each learnt from, and where it lies."""
    mixture: dict[str, MixtureSource] = {}
    places: dict[str, Path] = {}
    for start, model in models.items():
        try:
            learnt = learnt_by(stage, start, model)
        except TriviumError:
            raise TriviumError(
                f"{stage}: nothing is known of the texts that {start} held out; name the text to measure on "
                "as `data`."
            ) from None
        for name, source in learnt.mixture.items():
            if places.setdefault(name, learnt.places[name]) == learnt.places[name]:
                # What is held out at a small share is held out at a larger one, too.
                least = min(source.validation, mixture.get(name, source).validation)
                mixture[name] = source.model_copy(update={"validation": least})
    return mixture, places


def trained_on(models: Sequence[Path], beside: Sequence[Ingredient] = ()) -> list[TokenisedData]:
    """What models and their ancestors learnt from as documents, as far as it is known, and what is beside."""
    found = {one.shards.folder: one for model in models for one in _trained_on(model)}
    return [*found.values(), *(TokenisedData(one.shards) for one in beside)]


def _trained_on(model: Path) -> list[TokenisedData]:
    home = _made_in(model)
    if home is None:
        return []
    record = read_record(home)
    settings, order = record["settings"], [*record["parents"], *record["outside"]]
    named: list[str] = []
    if trains_on(record["kind"]) == "documents":
        mixture = settings["data"] | ((settings.get("replay") or {}).get("data") or {})
        named = [source.path for source in mixture_of(mixture).values()]
    found = []
    for name in named:
        number = str(order.index(name))
        # As this stage tokenised it, which is as it was written unless a vocabulary came between.
        own = [home / made / number for made in ("tokenised", "retokenised")]
        place = next((folder for folder in own if folder.is_dir()), _product(home, record, name))
        if (place / "manifest.json").is_file():
            # They are compared with and not learnt from, so a damaged one does no harm.
            found.append(TokenisedData(Shards(place, verify=False), home / "model"))
    for start in _starts(settings):
        found += _trained_on(_product(home, record, start))
    return found
