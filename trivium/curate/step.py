"""What a step of curation is, and how the list `steps:` of a recipe names it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import numpy as np
import pyarrow as arrow
from pydantic import PrivateAttr, ValidationError

from trivium.curate.batch import Batch, Outcome
from trivium.kit.errors import TriviumError
from trivium.kit.settings import Settings

Keys = dict[str, np.ndarray]


class Step(Settings):
    """One step: settings, and a function from a batch to what is said of its documents."""

    known: ClassVar[dict[str, type[Step]]] = {}
    name: ClassVar[str] = ""
    short: ClassVar[str] = ""
    """The setting that `{name: value}` means where the value is no mapping."""
    needs_raw: ClassVar[bool] = False
    """Whether it reads bytes, as `extract` does, and so comes first."""

    _place: Path | None = PrivateAttr(default=None)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "name" in vars(cls):
            Step.known[cls.name] = cls

    @classmethod
    def variant(cls, written: Mapping[str, Any]) -> type[Step]:
        """The class these settings are read by; a step with several methods has one for each."""
        return cls

    @property
    def title(self) -> str:
        """What the funnel calls this step."""
        return self.name

    def written(self) -> dict[str, Any]:
        """The step as a recipe would write it, every default spelled out."""
        return {self.name: self.model_dump(mode="json")}

    def mentions(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """What it needs besides the documents: the setting, the name in it, and what the named has to be."""
        return []

    def locate(self, where: Mapping[str, Path]) -> None:
        """Replace names by places: `where` says where what it mentions lies."""

    def columns(self) -> dict[str, arrow.DataType]:
        """The columns it adds."""
        return {}

    def check(self) -> None:
        """Refuse what could not run here, such as a library that is missing, before any work begins."""

    def prepare(self, place: Path, where: Mapping[str, Path]) -> None:
        """Write to `place` what every process needs of it; `where` says where what it mentions lies."""

    def run(self, batch: Batch) -> Outcome:
        """What is said of these documents."""
        return Outcome()


@dataclass
class Decision:
    """Where the decisions on a shard stand, and how far in it the batches have come."""

    folder: Path
    shard: int
    row: int = 0
    """The batch's first document in its shard."""
    seen: int = 0
    """How many keys the batches before had, where a document has several."""


class WholeStep(Step):
    """A step that has to see all documents: keys of each, one decision on all keys, then the verdicts.

    `run` comes before the keys and may add columns.
    """

    def keys(self, batch: Batch) -> Keys:
        """What decides about these documents, as arrays that are joined along their first axis."""
        raise NotImplementedError

    def decide(self, shards: Sequence[Path], to: Path) -> dict[str, Any]:
        """Write the decision on all shards' keys to the folder `to`; returns facts for the funnel.

        Each path holds one array a key: `<path>/<name>.npy`.
        """
        raise NotImplementedError

    def verdict(self, batch: Batch, decision: Decision) -> Outcome:
        """What was decided about these documents."""
        raise NotImplementedError


def step_names() -> list[str]:
    """Every step there is."""
    _load()
    return sorted(Step.known)


def _load() -> None:
    package = import_module("trivium.curate.steps")
    for module in iter_modules(package.__path__):
        import_module(f"{package.__name__}.{module.name}")


def parse_steps(written: Any) -> list[Step]:
    """The steps of a list such as `[repair, {filters: gopher}]`; a ValueError says what is wrong."""
    _load()
    if isinstance(written, str | Mapping):
        written = [written]
    if not isinstance(written, list) or not written:
        raise ValueError(f"`steps` is a list such as [repair, {{filters: gopher}}]; steps are {_names()}")
    steps = [_parsed(place, one) for place, one in enumerate(written, start=1)]
    for place, step in enumerate(steps):
        if step.needs_raw and place:
            raise ValueError(f"`{step.name}` reads the files themselves, so it has to be the first step")
    return steps


def _parsed(place: int, written: Any) -> Step:
    if isinstance(written, str):
        written = {written: {}}
    if not isinstance(written, Mapping) or len(written) != 1:
        raise ValueError(f"step {place} is a name or one name with its settings, not {written!r}")
    ((name, value),) = written.items()
    if name not in Step.known:
        near = difflib.get_close_matches(str(name), Step.known, 1)
        hint = f"did you mean `{near[0]}`?" if near else f"steps are {_names()}"
        raise ValueError(f"step {place}: there is no step `{name}`; {hint}")
    kind = Step.known[name]
    if value is None:
        value = {}
    if not isinstance(value, Mapping):
        if not kind.short:
            raise ValueError(f"step {place}: `{name}` takes settings by name, not {value!r}")
        value = {kind.short: value}
    try:
        kind = kind.variant(value)
    except ValueError as error:
        raise ValueError(f"step {place}: {error}") from None
    try:
        return kind.model_validate(dict(value))
    except ValidationError as error:
        raise ValueError(f"step {place}: {_complaint(name, kind, error)}") from None
    except TriviumError as error:
        raise ValueError(f"step {place}: {error}") from None


def _complaint(name: str, kind: type[Step], error: ValidationError) -> str:
    first = error.errors()[0]
    setting = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(setting, kind.model_fields, 1)
        known = ", ".join(kind.model_fields) or "none"
        hint = f"did you mean `{near[0]}`?" if near else f"it has {known}"
        return f"`{name}` has no setting `{setting}`; {hint}"
    if first["type"] == "value_error":
        return f"`{name}`: {(first.get('ctx') or {}).get('error', first['msg'])}"
    message = first["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return f"`{name}: {{{setting}: {first['input']!r}}}` {message}"


def _names() -> str:
    return ", ".join(sorted(Step.known))
