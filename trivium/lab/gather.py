"""Who is compared: models found by path, stage name or hub id, with what their stages left behind."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import checksum, expanded
from trivium.kit.fingerprint import fingerprint
from trivium.kit.metrics import read_metrics
from trivium.kit.seals import COMPLETE, read_record, read_seal
from trivium.model.folder import load_model
from trivium.model.hub import WANTED
from trivium.model.named import find_model, find_stage, model_of
from trivium.model.transformer import Transformer
from trivium.stages.parts.stage import FOLDERS
from trivium.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Seen:
    """A stage that is done: its folder in the store and what it wrote there."""

    name: str
    folder: Path

    @cached_property
    def record(self) -> dict[str, Any]:
        return read_record(self.folder)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def weights(self) -> Path | None:
        """The Hugging Face folder it made, of a model that writes or of one that judges."""
        produces = self.record["produces"]
        folder = self.folder / FOLDERS.get(produces, produces)
        return folder if (folder / "config.json").is_file() else None

    @property
    def model(self) -> Path | None:
        """The Hugging Face folder of the model it made, if that is what it makes."""
        return self.weights if self.record["produces"] == "model" else None

    @property
    def parents(self) -> dict[str, Path]:
        """The folders of the stages it stands on, by the name under which the settings mention them."""
        named = (self.record.get("parents") or {}).items()
        return {written: self.folder.parent / entry.partition("@")[0] for written, entry in named}

    @property
    def start(self) -> Path | None:
        """The folder of the stage whose model it started from."""
        written = (self.record.get("settings") or {}).get("from")
        return self.parents.get(written) if isinstance(written, str) else None


class Member:
    """One model of a comparison; its weights are read only where nothing is known of it yet."""

    def __init__(self, name: str, folder: Path, seen: Seen | None = None) -> None:
        self.name, self.folder, self.seen = name, folder, seen

    @cached_property
    def fingerprint(self) -> str:
        """Which weights and tokenizer these are, wherever they lie."""
        if self.seen is not None and (self.seen.folder / COMPLETE).is_file():
            sums = read_seal(self.seen.folder)["files"]
            return fingerprint({path: one for path, one in sums.items() if path.startswith("model/")})
        files = sorted({path for pattern in WANTED for path in self.folder.glob(pattern)})
        return fingerprint({f"model/{path.name}": checksum(path) for path in files})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.folder)

    @cached_property
    def model(self) -> Transformer:
        place = machine.device()
        model = load_model(self.folder, dtype=machine.compute_dtype(place), device=place)
        return model.requires_grad_(False).eval()

    def forget(self) -> None:
        """Let go of the weights."""
        self.__dict__.pop("model", None)


def find(name: str, runs: Path) -> Member:
    """The model of a folder, of `stage` or `recipe/stage` under `runs`, or of an id on the hub."""
    stage = find_stage(name, runs)
    if stage is None:
        place = find_model(name, runs)
        return Member(_short(name) if expanded(name).is_dir() else name, place.resolve())
    folder = model_of(stage, name)
    seen = Seen(_short(name), stage)
    return Member(seen.name, folder, seen)


def find_all(names: Sequence[str], runs: Path) -> list[Member]:
    """Each of these models, under names that tell them apart."""
    members = [find(name, runs) for name in names]
    short = [member.name for member in members]
    for member, name in zip(members, names):
        if short.count(member.name) > 1:
            member.name = name
    if len({member.name for member in members}) < len(members):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise TriviumError(f"{twice} is named twice; name each model once.")
    return members


def stages_above(stages: Iterable[Seen]) -> list[Seen]:
    """These stages and everything they stand on, each after its parents."""
    found: dict[Path, Seen] = {}

    def visit(stage: Seen) -> None:
        # One stage may come twice: by the path it was asked for, and by the one a link led to.
        stage = Seen(stage.name, stage.folder.resolve())
        if stage.folder in found:
            return
        for parent in stage.parents.values():
            if (parent / "stage.yaml").is_file():
                visit(Seen(_recorded_name(parent), parent))
        found[stage.folder] = stage

    for stage in stages:
        visit(stage)
    names = [stage.name for stage in found.values()]
    # Two recipes may each have a `base`; then the entry in the store tells them apart.
    return [
        stage if names.count(stage.name) == 1 else Seen(folder.name, folder)
        for folder, stage in found.items()
    ]


def compared_with(members: Sequence[Member]) -> dict[str, str]:
    """For each model the one it is measured against: the nearest it grew from, else the one listed before."""
    by_folder = {member.seen.folder: member.name for member in members if member.seen}
    found: dict[str, str] = {}
    for place, member in enumerate(members):
        start = member.seen.start if member.seen else None
        while start is not None and start not in by_folder and (start / "stage.yaml").is_file():
            start = Seen("", start).start
        if start in by_folder:
            found[member.name] = by_folder[start]
        elif place and not (member.seen and "from" not in (member.seen.record.get("settings") or {})):
            found[member.name] = members[place - 1].name
    return found


def world_sources(stages: Iterable[Seen]) -> dict[str, dict[str, str]]:
    """The sources of the embedded world these stages learnt from, with the options that shape its truth."""
    found: dict[str, dict[str, str]] = {}
    for stage in stages:
        for written in stage.record.get("outside") or {}:
            if written.startswith("world:"):
                name, _, words = written.removeprefix("world:").partition("?")
                options = dict(word.partition("=")[::2] for word in words.split("&") if word)
                kept = {key: value for key, value in options.items() if key in ("people", "country")}
                found[name] = {**found.get(name, {}), **kept}
    return found


def _short(name: str) -> str:
    """The last part of a path that says something."""
    parts = [part for part in Path(name).resolve().parts if part != "model"]
    return Path(name).name if Path(name).name not in ("", ".", "model") else parts[-1]


def _recorded_name(folder: Path) -> str:
    named: Mapping[str, Any] = read_record(folder)
    return str(named.get("stage", folder.name))
