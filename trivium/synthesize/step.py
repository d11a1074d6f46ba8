"""What a step of a synthesis is, and the room it works in: whom to ask, where to drop, what is random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from trivium.generate.asking.asker import Asker
from trivium.generate.asking.writers import ChatRequest, LocalWriter, Writer
from trivium.generate.endpoint import ChatReply
from trivium.kit.errors import TriviumError
from trivium.kit.fingerprint import fingerprint
from trivium.kit.steps import NamedStep, read_steps
from trivium.synthesize.row import Row

EXAMPLE = '[{teacher: "Ask something about {{ topic }}."}, {answer: {samples: 4}}, {verify: math}]'


@dataclass
class Room:
    """What the steps of one synthesis share."""

    asker: Asker
    seed: int
    say: Callable[[str], None]
    base: Path
    """Where paths of the recipe start."""
    scratch: Path
    """What lies here is removed when the stage is done."""
    writer: Writer | None = None
    """The teacher."""
    others: dict[int, Writer] = field(default_factory=dict)
    """Writers of their own, by the place of the step that names them."""
    where: Mapping[str, Path] = field(default_factory=dict)
    """Where the places lie that steps mention."""
    data: list[Row] = field(default_factory=list)
    """The rows that the stage reads."""
    place: int = 0
    """Which step is running."""
    title: str = ""
    dropped: list[tuple[Row, str, str]] = field(default_factory=list)
    """Rows with the step and the reason."""
    reasons: dict[int, Counter[str]] = field(default_factory=dict)

    def drop(self, row: Row, reason: str) -> None:
        """Leave a row out; of `rule: what was found` the rule is what is counted by."""
        self.dropped.append((row, self.title, reason))
        self.reasons.setdefault(self.place, Counter())[reason.partition(":")[0]] += 1

    def ask(self, requests: Sequence[ChatRequest]) -> list[ChatReply]:
        """The replies of the model that answers this step."""
        return self.asker.ask(self.teacher(), requests)

    def teacher(self) -> Writer:
        """The model that answers this step."""
        found = self.others.get(self.place, self.writer)
        assert found is not None, "the stage refuses steps that ask where no model is named"
        return found

    def embedder(self, name: str) -> LocalWriter | None:
        """The checkpoint whose hidden states say how alike texts are: the teacher's own, or another."""
        found = self.writer if name == "own" else self.others.get(self.place)
        return found if isinstance(found, LocalWriter) and found.chosen.kind == "own" else None

    def number(self, *parts: Any) -> int:
        """A number that follows from the seed, the step and these parts."""
        return int(fingerprint([self.seed, self.place, *parts]), 16) % 2**31

    def random(self, *parts: Any) -> random.Random:
        """Chance that follows from the same."""
        return random.Random(self.number(*parts))


class Step(NamedStep):
    """One step: settings, and a function from rows to rows."""

    package: ClassVar[str] = "trivium.synthesize.steps"
    known: ClassVar[dict[str, type[Step]]] = {}
    asks: ClassVar[bool] = False
    """Whether it asks a model."""

    def check(self, base: Path) -> None:
        """Refuse what could not run here before anything is asked."""

    def answers(self, rows: float) -> tuple[float, float, int]:
        """Of so many rows: how many come out at most, how many answers that takes, and of how many tokens."""
        return rows, 0.0, 0

    def run(self, rows: list[Row], room: Room) -> list[Row]:
        """What becomes of the rows of one round."""
        return rows

    def finish(self, rows: list[Row], room: Room) -> list[Row]:
        """What becomes of all rows at the end."""
        return rows

    def facts(self) -> dict[str, Any]:
        """What it found out, for the report."""
        return {}


def parse_steps(written: Any) -> list[Step]:
    """The steps of a list; a ValueError says what is wrong."""
    steps = read_steps(written, Step.all(), EXAMPLE)
    for place, step in enumerate(steps):
        if step.name == "seed" and place:
            raise ValueError("`seed` makes the rows that the others work on, so it has to be the first step")
    return steps


def needs_column(row: Row, name: str, step: str) -> Any:
    """A column that a step cannot do without."""
    if row.fields.get(name) is None:
        raise TriviumError(
            f"`{step}` reads the column `{name}`, and the row {row.id} has "
            f"{', '.join(row.fields) or 'none'}; "
            "put a step before it that writes it, or rename one with `columns`."
        )
    return row.fields[name]
