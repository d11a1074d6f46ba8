"""Micro-anneals: short trainings from one checkpoint, one per candidate mixture, ranked by what they gain."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from trivium.curate.examination import Examined, held_out_of
from trivium.data.door import Door
from trivium.data.settings import Mixture
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_json
from trivium.learn.settings import UNAFFECTING, Training
from trivium.stages.midtrain import Midtrain
from trivium.stages.parts.documents import MEASURED, Replayed, mixture_references
from trivium.stages.parts.inheritance import trained_on
from trivium.stages.parts.model_folders import ModelFolder, folder_of
from trivium.stages.parts.paired import Spent, bits_per_byte, changes, gained, in_words, spent
from trivium.stages.parts.parents import handed_over
from trivium.stages.parts.stage import Product, Reference, Stage, Work, part_of


class Anneals(Training, Stage):
    """Train the model of `from` on every candidate alike and measure all of them on `measure`.

    Each candidate is a `midtrain` stage of its own, `NAME+CANDIDATE`, kept and resumed like any other.
    """

    kind: Literal["anneals"]
    """Rank candidate mixtures by short annealing runs."""
    version: ClassVar[int] = 4
    produces: ClassVar[Product] = "report"
    unaffecting: ClassVar[frozenset[str]] = UNAFFECTING

    start: str = Field(alias="from")
    """The model to start from."""
    candidates: dict[str, Mixture] = Field(min_length=1)
    """The mixtures to compare, by name."""
    measure: Mixture
    """What every candidate is measured on."""
    ramp: Literal["linear", "cosine"] = "linear"
    """How the weights move from start to end."""
    replay: Replayed | None = None
    """As in `midtrain`, the same beside every candidate."""

    _trained: dict[str, str] = {}
    """The stage that trains each candidate."""

    def parts(self, name: str) -> dict[str, Stage]:
        # Only what was said: the rest is midtrain's own, and `plan` tells a wish from a default.
        fields = {*Training.model_fields, "seed", "ramp", "replay"} & self.model_fields_set
        shared = {field: getattr(self, field) for field in sorted(fields)}
        found: dict[str, Stage] = {}
        for candidate, mixture in self.candidates.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", candidate):
                raise TriviumError(
                    f"`{candidate}` cannot be the name of a stage; write letters, digits, `.`, `-` and `_`."
                )
            settings = {"kind": "midtrain", "from": self.start, "data": mixture, **shared}
            found[candidate] = Midtrain.model_validate(settings)
        self._trained = {candidate: part_of(name, candidate) for candidate in found}
        return found

    def counted(self) -> dict[str, Any]:
        """The trained candidates, and how much is measured: here the measurement is the result."""
        kept = {key: value for key, value in super().counted().items() if key not in Training.model_fields}
        names, trained = list(self.candidates), list(self._trained.values())
        return {**kept, "candidates": names, "trained": trained, "measured_tokens": self.validation.tokens}

    def references(self) -> list[Reference]:
        for name, source in self.measure.items():
            if source.validation == 0:
                raise TriviumError(
                    f"measure: of `{name}` nothing that is not trained on is held out to be measured; "
                    "give it a `validation`."
                )
        return [
            Reference("from", self.start, ("model",)),
            *(Reference("trained", one, ("model",)) for one in self._trained.values()),
            *mixture_references(self.measure, "measure", by_length=True, without=MEASURED),
        ]

    def examines(self) -> Examined:
        """What is held out of the sources that candidates are measured on."""
        return held_out_of(self.measure.values())

    def run(self, work: Work) -> dict[str, Any]:
        """Measure every candidate beside the model they started from, and write the table."""
        start = folder_of(work, self.start)
        models = {name: work.path(stage) for name, stage in self._trained.items()}
        validation = Door(work, start.tokenizer).validation_rows(
            self.measure, start.config.reach, self.validation.tokens,
            learnt=trained_on([start.path, *models.values()]), required=list(self.measure),
        )  # fmt: skip
        before, *after = (
            spent(one.load(torch.float32), validation) for one in (start, *map(ModelFolder, models.values()))
        )
        tokens = [(handed_over(model) or {})["tokens"] for model in models.values()]
        table = ranked(before, dict(zip(models, zip(tokens, after, strict=True), strict=True)))
        for line in lines(table):
            work.say(line)
        result = {"before": bits_per_byte(before), "candidates": table}
        with whole_folder(work.output("report")) as report:
            write_json(report / "table.json", result)
        return result


def ranked(before: Spent, found: Mapping[str, tuple[int, Spent]]) -> list[dict[str, Any]]:
    """The candidates from the greatest gain per token down, each with how far it lies behind the first."""
    nothing = gained(before, before, 1)
    gains = {name: gained(before, after, tokens) for name, (tokens, after) in found.items()}
    whole = changes({name: (nothing, gain) for name, gain in gains.items()})
    order = sorted(found, key=lambda name: -whole[name]["value"])
    behind = changes({name: (gains[name], gains[order[0]]) for name in order[1:]})
    table = []
    for name in order:
        tokens, after = found[name]
        row = {
            "candidate": name,
            "tokens": tokens,
            "documents": whole[name]["documents"],
            "bits_per_byte": bits_per_byte(after),
            "gain_per_million_tokens": whole[name],
        }
        table.append({**row, "behind_the_first": behind[name]} if name in behind else row)
    return table


def lines(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ranking as a table, and what it does not show."""
    rows = [("candidate", "tokens", "gain in bits per byte per M tokens", "behind the first")]
    for row in table:
        behind = row.get("behind_the_first")
        gain = in_words(row["gain_per_million_tokens"])
        rows.append((row["candidate"], f"{row['tokens']:,}", gain, in_words(behind) if behind else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [*text, "Intervals are over documents; how another seed would rank them they do not say."]
