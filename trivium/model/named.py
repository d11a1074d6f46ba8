"""What a person means by a model's name: a folder, a stage of a run, or a repository of the hub."""

from difflib import get_close_matches
from pathlib import Path

from trivium.kit.errors import TriviumError
from trivium.kit.files import expanded
from trivium.kit.seals import COMPLETE, RECORD, read_record
from trivium.model.hub import HUB_NAME, resolve

RUNS = "runs"
"""The folder of results, unless another is named."""


def find_model(name: str | Path, runs: str | Path = RUNS) -> Path:
    """The Hugging Face folder of `laptop/sft`, `sft`, `runs/laptop/sft`, any folder, or `owner/name`."""
    stage = find_stage(name, runs)
    if stage is not None:
        return model_of(stage, str(name))
    path = expanded(name)
    if path.exists():
        return resolve(name)
    refuse_unknown(str(name), Path(runs))
    try:
        return resolve(name)
    except TriviumError as error:
        raise TriviumError(f"no stage {name} has run under {runs}, and on the hub: {error}") from None


def find_stage(name: str | Path, runs: str | Path = RUNS) -> Path | None:
    """The folder of a stage: a path, `recipe/stage`, `stage` (the newest), or an entry of the store.

    A result whose settings were changed since has no link any more; it goes by its entry, `sft-0123abcd`, or
    by as much of that as tells it apart.
    """
    path = expanded(name)
    if (path / RECORD).is_file():
        return path.resolve()
    if (path / "config.json").is_file():
        return None
    recipe, _, stage = str(name).rpartition("/")
    found = [link for link in stage_links(runs) if link.name == stage and recipe in ("", link.parent.name)]
    if not found and not recipe and "-" in stage:
        store = Path(runs) / "store"
        entries = [entry for entry in store.glob("*-*") if (entry / RECORD).is_file()]
        same = [entry for entry in entries if entry.name == stage]
        begun = same or [entry for entry in entries if entry.name.startswith(stage)]
        if len(begun) > 1:
            names = ", ".join(sorted(entry.name for entry in begun))
            raise TriviumError(f"{name} begins the names of several results: {names}; write one of them.")
        found = begun
    newest = max(found, key=lambda place: (place / RECORD).stat().st_mtime, default=None)
    return None if newest is None else newest.resolve()


def stage_links(runs: str | Path) -> list[Path]:
    """The links from every recipe's folder to the results of its stages."""
    places = sorted(Path(runs).glob("*/*")) if Path(runs).is_dir() else []
    return [place for place in places if place.is_symlink() and (place / RECORD).is_file()]


def find_reward_model(name: str | Path, runs: str | Path = RUNS) -> Path:
    """The folder of a reward model: what a reward stage made, a folder, or a classifier on the hub."""
    stage = find_stage(name, runs)
    if stage is None or read_record(stage).get("produces") != "reward":
        return find_model(name, runs)
    if not (stage / COMPLETE).is_file():
        raise TriviumError(f"{name} is not finished; run its recipe again.")
    return stage / "model"


def model_of(stage: Path, name: str) -> Path:
    """The Hugging Face folder of the model that a finished stage made."""
    record = read_record(stage)
    if record.get("produces") != "model":
        raise TriviumError(
            f"{name} is a {record['kind']} stage, which makes no model that writes text; name a stage that "
            "makes one."
        )
    if not (stage / COMPLETE).is_file():
        raise TriviumError(f"{name} is not finished; run its recipe again.")
    return stage / "model"


def refuse_unknown(name: str, runs: Path) -> None:
    """Refuse what cannot be on the hub or is plainly a stage of a recipe that ran, before any network."""
    links = stage_links(runs)
    known = sorted({link.name for link in links} | {f"{link.parent.name}/{link.name}" for link in links})
    near = get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else "`trivium ls` lists what there is."
    recipe, _, stage = name.rpartition("/")
    if recipe and any(link.parent.name == recipe for link in links):
        raise TriviumError(f"the recipe {recipe} has no stage {stage} under {runs}; {hint}")
    if not HUB_NAME.match(name):
        raise TriviumError(
            f"{name} is neither a folder nor a stage under {runs} nor an id of the hub (owner/name); {hint}"
        )
