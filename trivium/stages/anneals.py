"""Micro-anneals: short trainings from one checkpoint, one per candidate mixture, ranked by what they gain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from trivium.data.rows import Row
from trivium.kit import machine
from trivium.kit.files import read_json, whole_folder, write_json
from trivium.kit.metrics import MetricsLog
from trivium.kit.processes import barrier, world
from trivium.learn.settings import Training
from trivium.learn.validation import measure
from trivium.model.folder import load_config, load_model
from trivium.model.hub import resolve
from trivium.stages.midtrain import Midtrain
from trivium.stages.mixtures import Mixture, mixture_references, unseen_rows
from trivium.stages.stage import Product, Reference, Work
from trivium.stages.training import TrainingStage
from trivium.tokens.tokenizer import Tokenizer


class Anneals(TrainingStage):
    """Train the model of `from` on every candidate alike and measure all of them on `measure`."""

    kind: Literal["anneals"]
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "report"

    start: str = Field(alias="from")
    candidates: dict[str, Mixture] = Field(min_length=1)
    measure: Mixture

    def references(self) -> list[Reference]:
        """The model, every candidate's sources, and what is measured."""
        found = [Reference("from", self.start, ("model",)), *mixture_references(self.measure, "measure")]
        for name, mixture in self.candidates.items():
            found += mixture_references(mixture, f"candidates.{name}")
        return found

    def run(self, work: Work) -> dict[str, Any]:
        """Train the candidates one after the other and write the table."""
        folder = resolve(str(work.path(self.start)))
        context = load_config(folder).context
        unseen = unseen_rows(work, self.measure, Tokenizer.load(folder), context, self.validation.tokens)
        before = _measured(folder, unseen)
        table: list[dict[str, Any]] = []
        for name, mixture in self.candidates.items():
            inside = work.folder / "candidates" / name
            own = replace(
                work, stage=f"{work.stage}/{name}", folder=inside, log=MetricsLog(inside / "metrics.jsonl")
            )
            inside.mkdir(parents=True, exist_ok=True)
            summary_path = inside / "tokens.json"
            if not own.output("model").is_dir() or not summary_path.is_file():
                settings = {field: getattr(self, field) for field in Training.model_fields}
                stage = Midtrain.model_validate(
                    {"kind": "midtrain", "from": self.start, "data": mixture, **settings}
                )
                summary = stage.run(own)
                if world().leads:
                    write_json(summary_path, {"tokens": summary["tokens"]})
                barrier()
            after = _measured(own.output("model"), unseen)
            tokens = int(read_json(summary_path)["tokens"])
            gains = {source: before[source] - after[source] for source in unseen}
            mean = sum(gains.values()) / len(gains)
            table.append(
                {"candidate": name, "tokens": tokens, "bits_per_byte": after, "gain": gains,
                 "gain_per_million_tokens": mean / tokens * 1e6}
            )  # fmt: skip
        table.sort(key=lambda row: -row["gain_per_million_tokens"])
        for row in table:
            work.say(f"{row['candidate']}: {row['gain_per_million_tokens']:+.4f} bits per byte per M tokens")
        if world().leads:
            with whole_folder(work.output("report")) as report:
                write_json(report / "table.json", {"before": before, "candidates": table})
        barrier()
        return {"before": before, "candidates": table}


def _measured(folder: Path, unseen: dict[str, list[Row]]) -> dict[str, float]:
    """Bits per byte of a model on every source."""
    model = load_model(folder, dtype=torch.float32, device=machine.device())
    return {name: measure(model, rows).bits_per_byte for name, rows in unseen.items()}
