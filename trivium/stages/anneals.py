"""Micro-anneals: short trainings from one checkpoint, one per candidate mixture, ranked by what they gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from trivium.data.rows import PackedSequence
from trivium.kit import machine
from trivium.kit.files import read_json, whole_folder, write_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.processes import barrier, world
from trivium.learn.checkpoints import Checkpoints
from trivium.learn.settings import Training
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.stages.midtrain import Midtrain, Replayed
from trivium.stages.parts.inheritance import trained_on
from trivium.stages.parts.mixtures import (
    MEASURED,
    Mixture,
    Portion,
    TokenisedData,
    ingredients,
    mixture_references,
    validation_rows,
)
from trivium.stages.parts.paired import Spent, bits_per_byte, changes, gained, spent, told
from trivium.stages.parts.stage import Product, Reference, Work
from trivium.stages.parts.training import TrainingStage
from trivium.tokens.tokenizer import Tokenizer


class Anneals(TrainingStage):
    """Train the model of `from` on every candidate alike and measure all of them on `measure`."""

    kind: Literal["anneals"]
    """Rank candidate mixtures by short annealing runs."""
    version: ClassVar[int] = 3
    produces: ClassVar[Product] = "report"

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

    def counted(self) -> dict[str, Any]:
        """How much is measured counts as well: here the measurement is the result."""
        return {**super().counted(), "measured_tokens": self.validation.tokens}

    def references(self) -> list[Reference]:
        """The model, every candidate's sources, and what is measured."""
        found = [
            Reference("from", self.start, ("model",)),
            *mixture_references(self.measure, "measure", by_length=True, without=MEASURED),
        ]
        for name, mixture in self.candidates.items():
            found += mixture_references(mixture, f"candidates.{name}", by_length=True)
        if self.replay is not None and self.replay.data is not None:
            found += mixture_references(self.replay.data, "replay.data", by_length=True)
        return found

    def plan(self, inputs: Mapping[str, Path | Mapping[str, Any]]) -> dict[str, Any]:
        """What all candidates together come to."""
        numbers = self._candidate(next(iter(self.candidates.values()))).plan(inputs)
        for name in ("tokens", "flops"):
            if name in numbers:
                numbers[name] *= len(self.candidates)
        return numbers

    def run(self, work: Work) -> dict[str, Any]:
        """Train the candidates one after the other and write the table."""
        folder = resolve(str(work.path(self.start)))
        context, tokenizer = load_config(folder).reach, Tokenizer.load(folder)
        learnt = trained_on([folder])
        replayed = (self.replay and self.replay.data) or {}
        for name, mixture in self.candidates.items():
            own = self._own(work, name)
            new, old = ingredients(own, mixture, tokenizer, replayed), ingredients(own, replayed, tokenizer)
            learnt += [TokenisedData(one.shards) for one in (*new, *old)]
        validation = validation_rows(
            work, self.measure, tokenizer, context, self.validation.tokens,
            learnt=learnt, required=list(self.measure),
        )  # fmt: skip
        before = _spent(folder, validation)
        found: dict[str, tuple[int, Spent]] = {}
        for name, mixture in self.candidates.items():
            own = self._own(work, name)
            summary_path = own.folder / "tokens.json"
            if not own.output("model").is_dir() or not summary_path.is_file():
                summary = self._candidate(mixture).run(own)
                if world().leads:
                    write_json(summary_path, {"tokens": summary["tokens"]})
                    # Saved states of the stage itself are cleared by who runs it, but these are its own.
                    Checkpoints(own.folder / "checkpoints", 1, work.say).clear()
                barrier()
            found[name] = int(read_json(summary_path)["tokens"]), _spent(own.output("model"), validation)
        table = ranked(before, found)
        for line in lines(table):
            work.say(line)
        result = {"before": bits_per_byte(before), "candidates": table}
        if world().leads:
            with whole_folder(work.output("report")) as report:
                write_json(report / "table.json", result)
        barrier()
        return result

    def _candidate(self, mixture: Mapping[str, Portion]) -> Midtrain:
        """One candidate's training as a stage of its own."""
        shared = {*Training.model_fields, "ramp", "replay"}
        settings = {field: getattr(self, field) for field in shared}
        return Midtrain.model_validate({"kind": "midtrain", "from": self.start, "data": mixture, **settings})

    def _own(self, work: Work, name: str) -> Work:
        """Where one candidate is trained and logged."""
        inside = work.folder / "candidates" / name
        inside.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(inside / "metrics.jsonl")
        return replace(work, stage=f"{work.stage}/{name}", folder=inside, log=log)


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
        gain = told(row["gain_per_million_tokens"])
        rows.append((row["candidate"], f"{row['tokens']:,}", gain, told(behind) if behind else ""))
    widths = [max(map(len, column)) for column in zip(*rows)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [*text, "Intervals are over documents; how another seed would rank them they do not say."]


def _spent(folder: Path, validation: Mapping[str, Sequence[PackedSequence]]) -> Spent:
    """What the model in a folder spends on every held-out document."""
    return spent(load_model(folder, dtype=torch.float32, device=machine.device()), validation)
