"""What a stage is: settings a person writes, inputs it names, and one method that does the work."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pydantic import Field

from trivium.kit.errors import TriviumError
from trivium.kit.machine import device_class
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.processes import world
from trivium.kit.progress import Progress
from trivium.kit.settings import Settings

if TYPE_CHECKING:
    from trivium.curate.examination import Examined
    from trivium.data.rows import PackedSequence
    from trivium.data.sources import Source
    from trivium.tokens.tokenizer import Tokenizer

# What stages make and need: weights with their tokenizer, the same with a score in place of words, a
# classifier of texts, a tokenizer alone, tokenised documents, documents as text; and `source`, data from
# outside the recipe (files, the hub, `world:`).
Product = Literal["model", "reward", "classifier", "tokenizer", "shards", "data", "report", "source"]
PART = "+"


def part_of(stage: str, part: str) -> str:
    """What a part of a stage is called, which is a stage of its own."""
    return f"{stage}{PART}{part}"


HANDOVER, MOMENTS = "training.json", "moments.safetensors"
"""What a training stage leaves beside its model: how far it came, and the optimiser state."""
FOLDERS: dict[Product, str] = {"shards": "data", "reward": "model"}


@dataclass(frozen=True)
class Reference:
    """A setting (dotted, down to the text, list or mapping that names it) and what the named has to be."""

    setting: str
    name: str
    needs: tuple[Product, ...]
    read: Source | None = None
    """How it is read, where it is data from outside the recipe."""


@dataclass
class Work:
    """What the pipeline hands to a stage that runs: where to write, what to read, whom to tell."""

    stage: str
    folder: Path
    inputs: Mapping[str, Path]
    seed: int
    log: MetricsLog
    progress: Progress
    base: Path = field(default_factory=Path.cwd)
    resume: bool = False
    started: float = field(default_factory=time.time)

    def path(self, name: str) -> Path:
        """Where the thing a setting names lies: a parent's model, tokenizer or data, or an outside folder."""
        return self.inputs[name]

    def output(self, product: Product) -> Path:
        """Where the stage's product belongs; it has to appear there whole."""
        return self.folder / FOLDERS.get(product, product)

    def say(self, text: str) -> None:
        """Tell the person a line that stays."""
        self.progress.say(f"{self.stage}: {text}")

    def change(self, what: str, before: Any, after: Any) -> None:
        """Say and log what this stage takes over from its parent and what it makes of it."""
        row = {"change": what, "before": before, "after": after}
        if world().leads and row not in read_metrics(self.log.path):
            shown = [_shown(one) for one in (before, after)]
            if shown[0] != shown[1]:
                self.say(f"{what}: {' -> '.join(shown)}")
            self.log.write(row)


def _shown(value: Any) -> str:
    """A value of a change in a line of words: numbers in three digits, a mapping as `name number`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(one)}" for name, one in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Stage(Settings):
    """One kind of work; a subclass that has a `kind` and lies in `stages/` is known to recipes."""

    # Raise it when the same settings and inputs would give another result: old results are then made again.
    version: ClassVar[int] = 1
    produces: ClassVar[Product]
    # Whether all processes work on it together; else the first does and the others wait.
    together: ClassVar[bool] = False
    # Whether it computes with a model: its result then holds for one kind of device.
    computes: ClassVar[bool] = True
    # Settings that cannot change the result, and so do not count in the fingerprint.
    unaffecting: ClassVar[frozenset[str]] = frozenset()
    kinds: ClassVar[dict[str, type[Stage]]] = {}
    # Where a kind outside the package is defined, and the checksum of that file, which counts.
    file: ClassVar[str | None] = None
    code: ClassVar[str | None] = None
    # Earlier names of this kind, and of all kinds with their present names.
    formerly_kind: ClassVar[tuple[str, ...]] = ()
    formerly_kinds: ClassVar[dict[str, str]] = {}

    kind: str
    """The kind of stage."""
    seed: int | None = Field(default=None, ge=0)
    """Seeds everything random in the stage; the recipe's `seed` where it is left out."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for kind in get_args(cls.model_fields["kind"].annotation):
            Stage.kinds[kind] = cls
            Stage.formerly_kinds.update(dict.fromkeys(cls.formerly_kind, kind))

    def parts(self, name: str) -> dict[str, Stage]:
        """The stages that a stage of this name is made of besides itself, by what is added to its name."""
        return {}

    def references(self) -> list[Reference]:
        """The settings that name a parent stage, an outside model or outside data."""
        return []

    def examines(self) -> Examined | None:
        """What the stage measures on and learns nothing from, for `decontaminate: {against: recipe}`."""
        return None

    def settings(self) -> dict[str, Any]:
        """The resolved settings as a recipe would write them, every default spelled out."""
        return self.model_dump(mode="json", by_alias=True)

    def counted(self) -> dict[str, Any]:
        """The settings that decide the result."""
        found = {name: value for name, value in self.settings().items() if name not in self.unaffecting}
        found |= {"device": device_class()} if self.computes else {}
        return found | ({"code": self.code} if self.code is not None else {})

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """Numbers that follow from the settings: `tokens`, `parameters`, `flops`... for `trivium plan`.

        `inputs` holds a folder for what exists already and the parent's own plan for what does not.
        """
        return {}

    def check_machine(self) -> None:
        """Try what the stage needs of this machine besides its inputs; one sentence on what is missing."""

    def run(self, work: Work) -> dict[str, Any]:
        """Do the work and return the summary that is kept in `stage.yaml`."""
        raise NotImplementedError

    def documents_of(self, work: Work, step: int) -> list[str]:
        """The ids of the documents that optimiser step `step` learns from."""
        raise TriviumError(f"{work.stage} is a {self.kind} stage, which has no steps to show.")

    def batch_of(self, work: Work, step: int) -> tuple[list[PackedSequence], Tokenizer]:
        """The packed rows that optimiser step `step` learns from, and the tokenizer that reads them."""
        raise TriviumError(f"{work.stage} is a {self.kind} stage, which has no packed batch to show.")
