"""A bundle: one folder from which another person makes a result again and compares it, bit for bit.

recipe.yaml      the stage and all it stands on, every setting spelled out
texts/, mine.py  what the recipe reads beside itself, data and functions that score, as it names them
data/, kinds/    what it reads from elsewhere, and kinds of stages from a file
records/         `stage.yaml` of every stage as it was made
bundle.json      the checksum of every file here, and of everything that each stage made; sealed
"""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trivium import __version__
from trivium.kit.errors import DamagedError, TriviumError
from trivium.kit.files import bare_name, checksum, whole_folder, write_text
from trivium.kit.listing import is_pattern
from trivium.kit.seals import RECORD, read_seal, read_sealed, write_sealed
from trivium.pipeline.run import Run, prepare, run
from trivium.pipeline.store import Entry, Store, find
from trivium.recipe.graph import with_names
from trivium.recipe.outside import files_behind, is_elsewhere
from trivium.stages import stage_of
from trivium.stages.parts.stage import PART, Stage

MANIFEST, RECIPE = "bundle.json", "recipe.yaml"
OWN = (MANIFEST, RECIPE, "kinds", "records", "runs")
SCORING = "reward_files"
"""What stages count the files of scoring functions as (`stages.parts.judges.file_references`)."""


def write_bundle(runs: str | Path, stage: str, to: Path) -> list[str]:
    """Write the bundle of a finished stage; the names of the stages in it."""
    if to.exists():
        raise TriviumError(f"{to} is there already; name a folder that is not.")
    entries = _line(runs, stage)
    names = _names(entries)
    outside = [one for _, record in entries.values() for one in (record["outside"] or {}).items()]
    # Stages of other recipes may name other files alike: those of one recipe keep their names.
    base = next((found for one in outside if (found := _base(one[0], str(one[1]))) is not None), None)
    with whole_folder(to) as folder:
        recipe = str(next(iter(entries.values()))[1]["recipe"])
        content: dict[str, Any] = {"name": recipe, "stages": {}}
        for entry, record in entries.values():
            # What is a part of another stage is made by that stage's own settings.
            if PART not in str(record["stage"]):
                content["stages"][names[entry.folder.name]] = _stage(record, names, folder, base)
            (folder / "records").mkdir(exist_ok=True)
            shutil.copyfile(entry.folder / RECORD, folder / "records" / f"{names[entry.folder.name]}.yaml")
        write_text(folder / RECIPE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100))
        stages = {names[entry.folder.name]: _result(entry, record) for entry, record in entries.values()}
        _check(prepare(folder / RECIPE, folder / "runs"), stages)
        shutil.rmtree(folder / "runs", ignore_errors=True)
        files = {path.relative_to(folder).as_posix(): checksum(path) for path in files_behind(folder)}
        wanted = next(iter(stages))
        write_sealed(
            folder / MANIFEST, {"trivium": __version__, "stage": wanted, "stages": stages, "files": files}
        )
    return list(stages)


def verify(bundle: Path, runs: Path) -> list[list[str]]:
    """Compare a bundle's files, make every stage of it anew, and compare what came of it; rows of a table."""
    manifest = read_sealed(bundle / MANIFEST, "get the bundle again.")
    for name, expected in manifest["files"].items():
        for part in name.split("/"):
            bare_name(bundle / MANIFEST, part)
        path = bundle / name
        if not path.is_file():
            raise DamagedError(f"{path} is missing; get the bundle again.")
        if checksum(path) != expected:
            raise DamagedError(f"{path} is not what was bundled; get the bundle again.")
    _check(prepare(bundle / RECIPE, runs), manifest["stages"])
    prepared = run(bundle / RECIPE, runs)
    rows = [["stage", "", "", "files", "where they differ"]]
    for name, then in manifest["stages"].items():
        seal, record = read_seal(prepared.entry(name).folder), prepared.entry(name).record
        different = [file for file, one in then["files"].items() if seal["files"].get(file) != one]
        equal = not different
        why = ", ".join(different)
        if not equal and then["kernels"] != record["machine"].get("kernels"):
            why += f" (made with {then['kernels']}, here with {record['machine'].get('kernels')})"
        verdict = "equal" if equal else "differs"
        rows.append([name, prepared.became[name], verdict, str(len(then["files"])), why])
    return rows


def _line(runs: str | Path, stage: str) -> dict[str, tuple[Entry, dict[str, Any]]]:
    """The entry of a stage and all it stands on, each with its record; all have to be finished and sound."""
    entry = find(runs, stage)
    store = Store(entry.folder.parent.parent)
    found: dict[str, tuple[Entry, dict[str, Any]]] = {}
    for one in store.line([entry]):
        if one.state != "done":
            raise TriviumError(f"{one.folder.name} is {one.state}; run its recipe again, then bundle it.")
        one.verify(one.output)
        record = one.record
        _refuse_code_of_results(one, record, store)
        found[one.folder.name] = (one, record)
    return found


def _refuse_code_of_results(entry: Entry, record: Mapping[str, Any], store: Store) -> None:
    """Code is read from where a person put it, never from what came out of a shared store."""
    kind = str(record.get("kind_from", "")).rpartition(":")[0]
    for file in (kind, *map(str, (record["outside"] or {}).values())):
        if file.endswith(".py") and store.folder.resolve() in Path(file).resolve().parents:
            raise TriviumError(
                f"{entry.folder.name} names {file} as code, which lies in a result; move it out."
            )


def _names(entries: Mapping[str, tuple[Entry, dict[str, Any]]]) -> dict[str, str]:
    """What each entry is called in the bundle's recipe: the stage's name in letters that a name may have."""
    found: dict[str, str] = {}
    for entry, (_, record) in entries.items():
        owner, part, rest = str(record["stage"]).partition(PART)
        name = re.sub(r"[^A-Za-z0-9_-]", "_", owner) + part + rest
        found[entry] = name if name not in found.values() else f"{name}_{record['fingerprint'][:6]}"
    return found


def _stage(
    record: Mapping[str, Any], names: Mapping[str, str], folder: Path, base: Path | None
) -> dict[str, Any]:
    """A stage's settings as the bundle's recipe writes them: with its names, its data and its seed."""
    stage = stage_of(record)
    called: dict[str, str] = {}
    for written, parent in (record["parents"] or {}).items():
        entry, at, checkpoint = str(parent).partition("@")
        called[written] = names.get(entry, entry) + (f"{at}{checkpoint}" if at else "")
    scoring = [one.name for one in stage.references() if one.setting == SCORING]
    for number, (written, place) in enumerate((record["outside"] or {}).items(), start=1):
        if written in scoring:
            called[written] = _beside(written, Path(str(place)), folder)
        else:
            called[written] = _copied(written, str(place), folder, f"{record['stage']}-{number}", base)
    named = {**{one: one for one in _parts(stage)}, **called}
    settings = with_names(stage, {**stage.settings(), SCORING: scoring}, named)
    # No setting of its own: the files of `file.py:function`, which other settings name.
    del settings[SCORING]
    if stage.produces:
        settings["seed"] = record["seed"]
    if "kind_from" in record:
        file, _, name = str(record["kind_from"]).rpartition(":")
        (folder / "kinds").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "kinds" / Path(file).name)
        settings["kind"] = f"kinds/{Path(file).name}:{name}"
    return settings


def _parts(stage: Stage) -> list[str]:
    """What a stage names that is a part of itself."""
    return [reference.name for reference in stage.references() if PART in reference.name]


def _beside(written: str, place: Path, folder: Path) -> str:
    """A file of functions, copied to where the settings say that it lies, since their words count."""
    if Path(written).is_absolute() or ".." in Path(written).parts:
        raise TriviumError(
            f"{written} lies outside the recipe's folder; put it beside the recipe to bundle it."
        )
    target = folder / written
    if not place.is_file():
        raise TriviumError(f"{place} ({written}) is not there any more; put it back to bundle it.")
    if target.exists() and target.read_bytes() != place.read_bytes():
        raise TriviumError(f"{written} is another file in another recipe; give one of them another name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(place, target)
    return written


def _copied(written: str, place: str, folder: Path, under: str, base: Path | None) -> str:
    """Data from outside as the bundle's recipe names it: a copy of files, else a commit or a generator."""
    path = Path(place)
    pattern = not path.exists() and is_pattern(place) and not written.startswith("world:")
    if not path.exists() and not pattern:
        if not path.is_absolute() and is_elsewhere(place):
            return place
        raise TriviumError(f"{place} ({written}) is not there any more; put it back to bundle it.")
    fixed = Path(re.split(r"[*?\[]", place)[0] + "_").parent if pattern else path.parent
    # A curation writes the names of its sources into its rows, so what lies beside the recipe keeps its name.
    if _base(written, place) == base and base is not None:
        target = folder / fixed.relative_to(base)
    else:
        target = folder / "data" / re.sub(r"[^A-Za-z0-9_-]", "_", under)
        written = f"./{target.relative_to(folder).as_posix()}/{path.relative_to(fixed).as_posix()}"
    for file in files_behind(path):
        copy = target / file.relative_to(fixed)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return written


def _base(written: str, place: str) -> Path | None:
    """The folder of the recipe beside which data lies; None for what lies elsewhere, or under a name that
    the bundle has for itself."""
    name = Path(written)
    if name.is_absolute() or not name.parts or name.parts[0] in OWN or ".." in name.parts:
        return None
    end = f"/{name.as_posix()}"
    return Path(place.removesuffix(end) or "/") if place.endswith(end) else None


def _result(entry: Entry, record: Mapping[str, Any]) -> dict[str, Any]:
    """What is compared: the checksums of what the stage made, and how it was computed."""
    seal = read_seal(entry.folder)
    made = entry.output.relative_to(entry.folder).as_posix()
    # A model's card names the recipe and its data, which lies elsewhere here.
    files = {
        name: one
        for name, one in seal["files"].items()
        if name.startswith((f"{made}/", "kept/")) and not name.endswith("/README.md")
    }
    return {
        "fingerprint": record["fingerprint"],
        "files": files,
        "kernels": (record.get("machine") or {}).get("kernels"),
        "processes": record.get("processes"),
    }


def _check(prepared: Run, stages: Mapping[str, Mapping[str, Any]]) -> None:
    """The recipe has to mean the same results here; other code or another device would make others."""
    for name, one in stages.items():
        if name not in prepared.nodes:
            raise TriviumError(f"{name} is no stage of the bundle's recipe; get the bundle again.")
        if prepared.nodes[name].fingerprint != one["fingerprint"]:
            raise TriviumError(
                f"{name} would be another result here ({prepared.nodes[name].fingerprint} instead of"
                f" {one['fingerprint']}): its version, its code or the kind of device differs; use the"
                " version of Trivium and the device that `records` names."
            )
