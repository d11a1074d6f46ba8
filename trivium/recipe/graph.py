"""The graph of a recipe: who needs whom, checked before anything runs, and the fingerprint of every stage."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trivium.kit.errors import TriviumError, nearest
from trivium.kit.files import expanded
from trivium.kit.fingerprint import fingerprint
from trivium.kit.numbers import number
from trivium.learn.checkpoints import kept_place
from trivium.learn.settings import Training
from trivium.recipe.outside import (
    Checksums,
    check_world,
    content_fingerprint,
    is_elsewhere,
    is_on_the_hub,
    locate,
)
from trivium.recipe.revisions import Revisions
from trivium.recipe.schema import Recipe
from trivium.stages.parts.stage import PART, Reference, Stage


@dataclass(frozen=True)
class Parent:
    """A stage this one needs, or one kept checkpoint of it: `base@tokens=2M`."""

    stage: str
    checkpoint: tuple[str, int] | None = None


@dataclass(frozen=True)
class Node:
    """A stage with everything that decides its result."""

    name: str
    stage: Stage
    parents: Mapping[str, Parent]
    outside: Mapping[str, str]
    fingerprint: str
    pinned: Mapping[str, str] = field(default_factory=dict)
    """For what lies on the hub, the commit that is read: `owner/name@commit`."""
    after: tuple[str, ...] = ()
    """Stages that come before it although nothing of theirs decides its result."""

    @property
    def entry(self) -> str:
        return f"{self.name}-{self.fingerprint}"


def build(
    recipe: Recipe,
    checksums: Checksums | None = None,
    revisions: Revisions | None = None,
    accepted: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Node]:
    """All stages, each after what it needs, with their fingerprints.

    `accepted` holds fingerprints that a person said stand for the result of an earlier one.
    """
    checksums, revisions = checksums or Checksums(), revisions or Revisions()
    parents = {name: _parents(recipe, name, stage) for name, stage in recipe.stages.items()}
    nodes: dict[str, Node] = {}
    for name in _order(recipe, parents):
        stage = recipe.stages[name]
        splits: dict[str, dict[str | None, None]] = {}
        pinned: dict[str, str] = {}
        settings: dict[str, str] = {}
        for reference in stage.references():
            if reference.name not in parents[name]:
                settings[reference.name] = reference.setting
                split = reference.read.split if reference.read is not None else None
                splits.setdefault(reference.name, {})[split] = None
                commit = _pinned(reference, recipe, revisions)
                if commit is not None:
                    pinned[reference.name] = commit
        outside = {}
        for one, read in splits.items():
            try:
                outside[one] = content_fingerprint(one, recipe.base, checksums, read, pinned.get(one))
            except TriviumError as error:
                place = recipe.written.place(["stages", as_written(name), *settings[one].split(".")])
                raise TriviumError(f"{place}: {error}") from None
        made_of = {written: _identity(parent, nodes) for written, parent in parents[name].items()} | outside
        identity = fingerprint(
            {
                "kind": stage.kind,
                "version": stage.version,
                "settings": with_names(stage, stage.counted(), made_of),
                "inputs": sorted(made_of.values()),
            }
        )
        known = accepted.get(identity, identity)
        after = tuple(recipe.waits_for(name))
        nodes[name] = Node(name, stage, parents[name], outside, known, pinned, after)
    checksums.keep()
    return nodes


def _pinned(reference: Reference, recipe: Recipe, revisions: Revisions) -> str | None:
    """The commit of a repository of the hub that a setting names, where that can be found out."""
    if locate(reference.name, recipe.base) is not None or not is_on_the_hub(reference.name):
        return None
    return revisions.pinned(reference.name, "dataset" if "source" in reference.needs else "model")


def needed(nodes: Mapping[str, Node], only: Iterable[str]) -> list[str]:
    """The stages asked for and everything they stand on, in order; all of them when none is asked for."""
    wanted: set[str] = set()
    waiting = list(only)
    for name in waiting:
        if name not in nodes:
            raise TriviumError(
                f"The recipe has no stage `{name}`{nearest(name, nodes) or f'; it has {_listed(nodes)}.'}"
            )
    if not waiting:
        return list(nodes)
    while waiting:
        name = waiting.pop()
        wanted.add(name)
        waiting += [*(parent.stage for parent in nodes[name].parents.values()), *nodes[name].after]
    return [name for name in nodes if name in wanted]


def _parents(recipe: Recipe, name: str, stage: Stage) -> dict[str, Parent]:
    """The stages among a stage's references, each checked for being what is needed."""
    found = {}
    try:
        references = stage.references()
    except TriviumError as error:
        # What a setting says that changes nothing begins with the setting's name.
        setting, colon, said = str(error).partition(": ")
        place = recipe.written.place(["stages", as_written(name), *([setting] if colon else [])])
        raise TriviumError(f"{place}: {said or setting}") from None
    for reference in references:
        place = recipe.written.place(["stages", as_written(name), *reference.setting.split(".")])
        try:
            check_world(reference.name, reference.read)
        except TriviumError as error:
            raise TriviumError(f"{place}: {error}") from None
        written, at, checkpoint = reference.name.partition("@")
        written = recipe.meant(name, written)
        if written in recipe.stages:
            produces = recipe.stages[written].produces
            if produces not in reference.needs:
                raise TriviumError(
                    f"{place} needs {_needs(reference)}, but `{written}` is a {recipe.stages[written].kind}"
                    f" stage and makes {_ARTICLES[produces]}."
                )
            kept = _kept(checkpoint, recipe, written, place) if at else None
            found[reference.name] = Parent(written, kept)
        elif locate(reference.name, recipe.base) is None and not is_elsewhere(reference.name):
            hint = (
                _near_file(reference.name, recipe.base)
                or nearest(written, recipe.stages)
                or f"; its stages are {_listed(recipe.stages)}."
            )
            raise TriviumError(
                f"{place}: `{reference.name}` is neither a stage of this recipe nor a path that exists{hint}"
            )
    return found


def _near_file(name: str, base: Path) -> str:
    """`; did you mean X?` when a file beside a missing path has nearly its name, else nothing."""
    folder, slash, last = name.rpartition("/")
    path = base / expanded(folder or ".")
    if not (slash or "." in last) or not path.is_dir():
        return ""
    close = get_close_matches(last, [one.name for one in path.iterdir()], n=1)
    return f"; did you mean `{folder}{slash}{close[0]}`?" if close else ""


def as_written(name: str) -> str:
    """The stage in the recipe behind a part of it, or behind what it is in an arm or with a seed."""
    return name.partition(PART)[0].partition(".")[0]


def _checkpoint(text: str, place: str) -> tuple[str, int]:
    unit, _, amount = text.partition("=")
    count = number(amount)
    if unit not in ("tokens", "step") or not isinstance(count, int):
        raise TriviumError(f"{place}: `@{text}` names no checkpoint; write @tokens=2M or @step=1200.")
    return unit, count


def _kept(text: str, recipe: Recipe, name: str, place: str) -> tuple[str, int]:
    """A checkpoint that the stage will have kept, going by its settings."""
    unit, count = _checkpoint(text, place)
    stage = recipe.stages[name]
    if not isinstance(stage, Training):
        return unit, count
    if (unit, count) not in [kept_place(one) for one in stage.checkpoint.at]:
        raise TriviumError(
            f"{place}: `{name}` keeps no checkpoint at {text}; write `checkpoint: {{at: [{text}]}}` in it."
        )
    most = stage.tokens if unit == "tokens" else stage.steps
    if most is not None and count > most:
        raise TriviumError(
            f"{place}: `{name}` ends after {most:,} {unit.rstrip('s')}s, before {text}; name an earlier one."
        )
    return unit, count


def _order(recipe: Recipe, parents: Mapping[str, Mapping[str, Parent]]) -> list[str]:
    sorter = TopologicalSorter(
        {
            name: [*(parent.stage for parent in of.values()), *recipe.waits_for(name)]
            for name, of in parents.items()
        }
    )
    try:
        return list(sorter.static_order())
    except CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise TriviumError(
            f"{recipe.written.path.name}: the stages need each other in a circle ({circle});"
            " change one `from`."
        ) from None


def _identity(parent: Parent, nodes: Mapping[str, Node]) -> str:
    identity = nodes[parent.stage].fingerprint
    return (
        identity if parent.checkpoint is None else f"{identity}@{parent.checkpoint[0]}={parent.checkpoint[1]}"
    )


def with_names(stage: Stage, settings: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Settings of a stage with everything that they name called otherwise."""
    for reference in stage.references():
        *above, last = reference.setting.split(".")
        inside: Any = settings
        for key in above:
            inside = inside[int(key) if isinstance(inside, list) else key]
        here: Any = int(last) if isinstance(inside, list) else last
        value, identity = inside[here], names[reference.name]
        if isinstance(value, dict):
            inside[here] = {identity if key == reference.name else key: one for key, one in value.items()}
        elif isinstance(value, list):
            inside[here] = [identity if one == reference.name else one for one in value]
        else:
            inside[here] = identity
    return settings


_ARTICLES = {
    "model": "a model",
    "reward": "a reward model",
    "classifier": "a quality classifier",
    "tokenizer": "a tokenizer",
    "shards": "a tokenised corpus",
    "data": "documents",
    "report": "a report",
    "source": "data",
}


def _needs(reference: Reference) -> str:
    return " or ".join(_ARTICLES[need] for need in reference.needs if need != "source") or "data"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
