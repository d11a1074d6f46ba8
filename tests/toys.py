"""Toy stages made of text files and counting, for tests of everything around the stages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from trivium.kit.files import read_json, whole_folder, write_json, write_text
from trivium.kit.numbers import Count
from trivium.stages.parts.stage import Product, Reference, Stage, Work


class ToyDial(BaseModel):
    model_config = ConfigDict(extra="forbid")

    depth: int = 1
    width: Count | None = None


class ToyWords(Stage):
    kind: Literal["toy_words"]
    produces: ClassVar[Product] = "tokenizer"
    unaffecting: ClassVar[frozenset[str]] = frozenset({"seed"})
    data: str
    vocabulary: Count = 10

    def references(self) -> list[Reference]:
        return [Reference("data", self.data, ("source",))]

    def run(self, work: Work) -> dict[str, Any]:
        with whole_folder(work.output("tokenizer")) as folder:
            write_text(folder / "words.txt", f"{self.vocabulary}")
        return {}


class ToyReward(Stage):
    kind: Literal["toy_reward"]
    produces: ClassVar[Product] = "reward"
    start: str = Field(alias="from")

    def references(self) -> list[Reference]:
        return [Reference("from", self.start, ("model",))]

    def run(self, work: Work) -> dict[str, Any]:
        with whole_folder(work.output("reward")) as folder:
            write_json(folder / "model.json", {"scores": 7})
        return {}


class ToyTrain(Stage):
    """Counts to `steps`; at every step it may be told to die, and it goes on where it was cut off."""

    kind: Literal["toy_train"]
    produces: ClassVar[Product] = "model"
    start: str | None = Field(default=None, alias="from")
    words: str | None = None
    reward: str | None = None
    model: ToyDial = ToyDial()
    rate: float | dict[str, float] = 0.1
    steps: Count = 3
    keep: tuple[int, ...] = ()
    die_at: int | None = None
    gate: str | None = None
    gate_at: int | None = None
    unaffecting: ClassVar[frozenset[str]] = frozenset({"die_at", "gate", "gate_at"})

    def references(self) -> list[Reference]:
        found = [Reference("from", self.start, ("model",))] if self.start else []
        found += [Reference("reward", self.reward, ("reward",))] if self.reward else []
        return found + ([Reference("words", self.words, ("tokenizer", "model"))] if self.words else [])

    def plan(self, inputs: Any) -> dict[str, Any]:
        return {"tokens": self.steps * 1000, "flops": self.steps * 1e9}

    def run(self, work: Work) -> dict[str, Any]:
        counter = work.folder / "checkpoints" / "count.json"
        step = read_json(counter)["step"] if work.resume and counter.exists() else 0
        if self.start and step == 0:
            work.change("rate", read_json(work.path(self.start) / "model.json")["rate"], self.rate)
        while step < self.steps:
            step += 1
            while self.gate and self.gate_at in (None, step) and not Path(self.gate).exists():
                time.sleep(0.01)
            work.log.write({"step": step, "tokens": step * 1000, "loss": 1.0 / step})
            write_json(counter, {"step": step})
            if step in self.keep:
                kept = work.folder / "kept" / f"step-{step}"
                write_json(kept / "model" / "model.json", {"steps": step, "rate": self.rate})
                write_json(
                    kept / "kept.json", {"step": step, "tokens": step * 1000, "at": [["tokens", step * 1000]]}
                )
            if step == self.die_at:
                os._exit(9)
        with whole_folder(work.output("model")) as folder:
            write_json(folder / "model.json", {"steps": step, "rate": self.rate, "seed": work.seed})
        return {"tokens": step * 1000, "loss": 1.0 / step}

    def documents_of(self, work: Work, step: int) -> list[str]:
        return [f"doc-{work.seed}-{step}"]


RECIPE = """\
name: toy
seed: 7
stages:
  words: {kind: toy_words, data: ./texts, vocabulary: 4k}
  base:  {kind: toy_train, words: words, model: {depth: 2}, steps: 4}
  left:  {kind: toy_train, from: base, steps: 2}
  right: {kind: toy_train, from: base, steps: 2, rate: {from: 0.1, to: 0.0}}
"""


def write_recipe(folder: Path, text: str = RECIPE, name: str = "toy.yaml") -> Path:
    (folder / "texts").mkdir(exist_ok=True)
    (folder / "texts" / "a.txt").write_text("some words\n")
    (folder / name).write_text(text)
    return folder / name


def own_kinds(folder: Path) -> Path:
    """A file with the same kinds under other names, for recipes that name kinds by their file."""
    path = folder / "toys.py"
    path.write_text(Path(__file__).read_text().replace('Literal["toy_', 'Literal["own_'))
    return path
