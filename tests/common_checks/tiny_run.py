"""Runs of single stages over inputs small enough for hundreds of them, and what can be observed of each."""

from __future__ import annotations

import io
import json
import sqlite3
import wave
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import trivium
from trivium.data.rows import PackedSequence, collate
from trivium.generate.engine import Engine
from trivium.generate.requests import Request
from trivium.kit.files import load_tensors, read_json
from trivium.kit.metrics import MetricsLog, read_metrics
from trivium.kit.progress import Progress
from trivium.learn.checkpoints import Checkpoints
from trivium.learn.objective import Objective
from trivium.learn.trainer import Trainer
from trivium.model.attention import Documents
from trivium.stages import kinds
from trivium.stages.parts.stage import Stage, Work, part_of

RECIPE = """\
name: tiny
stages:
  words: {kind: tokenizer, data: ./texts.jsonl, vocabulary: 272}
  bigger: {kind: tokenizer, data: ./others.jsonl, vocabulary: 280}
  corpus: {kind: corpus, data: ./texts.jsonl, tokenizer: words, validation: 0.2, columns: [ease]}
  others: {kind: corpus, data: ./others.jsonl, tokenizer: words, validation: 0.2}
  base: {kind: pretrain, data: corpus, model: {SHAPE}, context: 64, batch: 128, steps: 4,
         learning_rate: {to: 0.5}}
  second: {kind: pretrain, data: corpus, model: {SHAPE}, context: 64, batch: 128, steps: 4, seed: 2}
  llama: {kind: pretrain, data: corpus, model: {family: llama, SHAPE}, context: 64, batch: 128, steps: 1}
  wide: {kind: pretrain, data: corpus, model: {SHAPE}, context: 1024, batch: 1024, steps: 8}
  forked: {kind: midtrain, from: base, data: others, batch: 128, steps: 2, learning_rate: 0.03}
  deep: {kind: grow, from: base, layers: 4, method: random}
  loud: {kind: merge, of: [base], base: second, method: tasks, scale: 30000,
         data: {./texts.jsonl: {validation: 0.3}}}
  judge: {kind: reward, from: base, data: ./pairs.jsonl, steps: 2, pairs: 4, context: 64}
  chatty: {kind: sft, from: base, data: ./turns.jsonl, batch: 128, context: 64, steps: 1}
  prm: {kind: reward, steps: true, from: base, data: ./steps.jsonl, pairs: 4, epochs: 0.4, separator: " "}
  before: {kind: evaluate, from: base, on: [instructions], asking: {limit: 2, max_new_tokens: 2}}
""".replace("SHAPE", "depth: 1, width: 32, head_width: 16, heads: 2, inner_width: 32")

TEXTS = [f"{one} and {other} make {one + other}." for one in range(12) for other in range(5)]
NOUNS = ("river", "miller", "bell", "tower")
OTHERS = [f"the {noun} of {number} rises" for number in range(9) for noun in NOUNS]


PAIRS = [
    {"prompt": f"{n} and {n} make", "chosen": f" {2 * n}", "rejected": " the river rises" * (1 + n % 3)}
    for n in range(20)
]
COLOURS = (("red", (200, 0, 0)), ("green", (0, 200, 0)), ("blue", (0, 0, 200)))
QUESTIONS = [
    {"question": f"What costs {price}?", "sql": f"SELECT name FROM goods WHERE price = {price}"}
    for price in range(12)
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "texts": [{"text": text, "ease": n % 7, "other": f"zz {text}"} for n, text in enumerate(TEXTS)],
    "others": [{"text": text, "other": f"zz {text}"} for text in OTHERS],
    "pairs": [{**one, "other": f" zz {n}"} for n, one in enumerate(PAIRS)],
    "answers": [
        {"prompt": f"{n} and {n} make", "completion": f" {2 * n}", "ease": n % 7, "other": f" zz {n}"}
        for n in range(80)
    ],
    "steps": [
        {
            "prompt": f"{n} and {n} and 1 make",
            "completions": [f"{n}+{n}={2 * n}", f"{2 * n}+1={2 * n + 1 + n % 2}"],
            "labels": [True, n % 2 == 0],
        }
        for n in range(20)
    ],
    "turns": [
        {
            "messages": [
                {"role": role, "content": f"{one} {n}"}
                for one in ("so", "and")
                for role in ("user", "assistant")
            ]
        }
        for n in range(20)
    ],
    "pictures": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "path": f"pictures/{n}.png"}]},
                {"role": "assistant", "content": COLOURS[n % 3][0]},
            ]
        }
        for n in range(40)
    ],
    "sounds": [
        {
            "messages": [
                {"role": "user", "content": [{"type": "audio", "path": f"sounds/{n}.wav"}]},
                {"role": "assistant", "content": ("low", "high")[n % 2]},
            ]
        }
        for n in range(40)
    ],
    "problems": [
        {"prompt": one["prompt"], "answer": str(2 * n), "other": f"zz {n}"}
        for n, one in enumerate(PAIRS[:12])
    ],
    "passages": [{"prompt": "Say it.", "text": " ".join([text] * 3)} for text in OTHERS[:12]],
    "questions": [{**one, "other": f"zz {one['question']}"} for one in QUESTIONS],
    "few-questions": [{**one, "other": f"zz {one['question']}"} for one in QUESTIONS[:6]],
    "numbers": [{"text": f"{price} 123456"} for price in range(12)],
}
"""The rows of every file; what is in the column `other` can be told by its letters."""


def write_inputs(folder: Path) -> Path:
    """The files that the stages read, and the recipe that makes the models they start from."""

    def write(name: str, rows: list[Any], damage: str = "") -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows) + damage)

    for name, rows in ROWS.items():
        write(f"{name}.jsonl", rows)
        write(f"more-{name}.jsonl", rows)
        write(f"none-{name}.jsonl", [])
        write(f"one-{name}.jsonl", rows[:1])
        write(f"damaged-{name}.jsonl", rows, "{not json\n")
        write(f"halves-{name}/train.jsonl", rows[::2])
        write(f"halves-{name}/test.jsonl", rows[1::2])
    (folder / "pictures").mkdir()
    for n in range(40):
        red, green, blue = COLOURS[n % 3][1]
        picture = Image.new("RGB", (10, 8), (red + n, green + n, blue + n))
        picture.save(folder / "pictures" / f"{n}.png")
    (folder / "sounds").mkdir()
    for n in range(40):
        with wave.open(str(folder / "sounds" / f"{n}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            times = np.arange(4000) / 16000
            samples = np.sin(2 * np.pi * (300 + 600 * (n % 2) + n) * times) * 9000
            file.writeframes(samples.astype("<i2").tobytes())
    for place in folder.glob("halves-*"):
        for items in ("pictures", "sounds"):
            (place / items).symlink_to(folder / items)
    (folder / "notes.txt").write_text("\n\n".join(f"{one} | {other}" for one, other in pairwise(TEXTS)))
    write("errors.jsonl", [{**one, "labels": [False, False]} for one in ROWS["steps"]])
    write("bad-questions.jsonl", [*ROWS["questions"], {"question": "Who?", "sql": "SELECT nobody"}])
    shop = "".join(f"INSERT INTO goods (name, price) VALUES ('thing {n}', {n});\n" for n in range(12))
    (folder / "shop.sql").write_text(f"CREATE TABLE goods (name TEXT, price INTEGER);\n{shop}")
    with closing(sqlite3.connect(folder / "shop.sqlite")) as connection:
        connection.executescript(f"CREATE TABLE goods (name TEXT, price INTEGER, weight REAL);\n{shop}")
    (folder / "mine.py").write_text(
        "def spread(prompts, completions, **columns):\n"
        "    return [float(sum(one.encode()) % 7) for one in completions]\n"
        "def shortness(prompts, completions, **columns):\n"
        "    return [-float(len(one.split())) - (sum(one.encode()) % 3) for one in completions]\n"
        "def same(prompts, completions, **columns):\n"
        "    return [0.5 for one in completions]\n"
        "class Game:\n"
        "    def __init__(self, **columns):\n"
        "        pass\n"
        "    def step(self, action):\n"
        "        return '¶', 10.0, False\n"
    )
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder / "tiny.yaml"


@dataclass
class Inputs:
    """The inputs on disk, and where everything that a stage may name lies."""

    folder: Path
    places: dict[str, Path]
    count: int = 0

    def path(self, name: str) -> Path:
        """The place of a product of the recipe, of a file, or of what lies elsewhere."""
        if name in self.places:
            return self.places[name]
        return Path(name) if name.startswith("world:") else self.folder / name

    def new_folder(self) -> Path:
        """An empty folder for one more run."""
        self.count += 1
        place = self.folder / "observed" / f"{self.count:05d}"
        place.mkdir(parents=True)
        return place


def make_inputs(folder: Path) -> Inputs:
    """Write the files, run the recipe, and say where its products lie."""
    run = trivium.run(write_inputs(folder), runs=folder / "runs")
    products = {
        "words": "tokenizer",
        "bigger": "tokenizer",
        "corpus": "data",
        "others": "data",
        "before": "report",
    }
    places = {name: run[name].folder / products.get(name, "model") for name in run}
    return Inputs(folder, places | make_encoders(folder))


def make_encoders(folder: Path) -> dict[str, Path]:
    """A vision tower and a Whisper of random weights, as transformers saves them."""
    import transformers

    torch.manual_seed(1)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4)
    whisper = transformers.WhisperConfig(
        vocab_size=60, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    transformers.CLIPVisionModel(clip).save_pretrained(folder / "clip")
    transformers.WhisperModel(whisper).save_pretrained(folder / "whisper")
    return {"clip": folder / "clip", "whisper": folder / "whisper"}


@dataclass(repr=False)
class Seen:
    """What a run of one stage left to be looked at."""

    stage: Stage
    folder: Path
    inputs: dict[str, Path]
    said: str = ""
    summary: dict[str, Any] = field(default_factory=dict)
    trainers: list[Trainer] = field(default_factory=list)
    batches: list[list[PackedSequence]] = field(default_factory=list)
    passes: int = 0
    """Forward passes with a loss."""
    saved: list[int] = field(default_factory=list)
    """The steps after which a state was saved."""
    asked: list[list[int]] = field(default_factory=list)
    """The prompts that any engine was given."""
    cleared: list[str] = field(default_factory=list)
    """The states that were cleared away as the training ended."""
    forwards: list[Any] = field(default_factory=list)
    """What computed each pass: the model, or what it was compiled to."""
    multiplied: set[torch.dtype] = field(default_factory=set)
    """The types in which matrices were multiplied, but for that of the weights."""
    fixed: set[bool] = field(default_factory=set)
    """Whether torch was held to kernels that add in a fixed order."""
    begun: dict[str, Tensor] = field(default_factory=dict)
    """What was trained, before the first step."""

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The log's lines of optimiser steps."""
        return [row for row in self._lines if "step" in row]

    @cached_property
    def changes(self) -> dict[str, tuple[Any, Any]]:
        """What the stage said it takes over and changes."""
        return {row["change"]: (row["before"], row["after"]) for row in self._lines if "change" in row}

    @cached_property
    def place(self) -> Path:
        """The folder of the training itself; of several, the first."""
        return next(iter(sorted(self.folder.glob("candidates/*/"))), self.folder)

    @property
    def counted(self) -> list[dict[str, Any]]:
        """What decides the result: the settings that count, of the stage and of its parts."""
        return [one.counted() for one in (self.stage, *self.stage.parts(self.stage.kind).values())]

    @property
    def left(self) -> list[str]:
        """The states that were on disk when the training ended; who runs the stage clears them away."""
        return self.cleared or [path.name for path in sorted((self.place / "checkpoints").glob("step-*"))]

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.place / "metrics.jsonl")

    def column(self, name: str) -> list[float]:
        """One measure over all steps."""
        return [row[name] for row in self.log if name in row]

    @property
    def rates(self) -> list[float]:
        """The learning rate of every step."""
        return self.column("learning_rate")

    @property
    def losses(self) -> list[float]:
        """The loss of every step."""
        return self.column("loss")

    @property
    def trainer(self) -> Trainer:
        """The trainer of a stage that trains once, or the first."""
        return self.trainers[0]

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The model that the stage left."""
        files = sorted((self.place / "model").glob("*.safetensors"))
        return {name: one for file in files for name, one in load_tensors(file).items()}

    @cached_property
    def moments(self) -> dict[str, Tensor]:
        """The optimiser's state that it left."""
        return load_tensors(self.place / "moments.safetensors")

    @cached_property
    def adapter(self) -> dict[str, Tensor]:
        """The adapter's weights, if it left one apart."""
        return load_tensors(self.place / "model" / "adapter" / "adapter_model.safetensors")

    @property
    def adapter_config(self) -> dict[str, Any]:
        """How PEFT is told of the adapter."""
        return dict(read_json(self.place / "model" / "adapter" / "adapter_config.json"))

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the model that was left."""
        return dict(read_json(self.place / "model" / "config.json"))

    @property
    def files(self) -> set[str]:
        """Every file in the run's folder."""
        return {str(one.relative_to(self.place)) for one in self.place.rglob("*") if one.is_file()}

    @property
    def ids(self) -> list[list[str]]:
        """The documents of every step."""
        return [[name for row in rows for name in row.ids] for rows in self.batches]

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of the first step."""
        return np.concatenate([row.tokens for row in self.batches[0]])


KINDS = kinds()


def stage_of(kind: str, settings: Mapping[str, Any]) -> Stage:
    """The stage with these settings, as a recipe would make it."""
    return KINDS[kind].model_validate({"kind": kind, "seed": 1, **settings})


class NotTrained(Exception):
    """Raised in place of a training that nobody needs."""


def run_stage(
    inputs: Inputs,
    kind: str,
    settings: Mapping[str, Any],
    *,
    folder: Path | None = None,
    resume: bool = False,
    fault: str | None = None,
    trained: bool = True,
) -> Seen:
    """Run one stage of a kind by itself and record what happened."""
    stage = stage_of(kind, settings)
    home = folder or inputs.new_folder()
    parts = {part_of(kind, name): home / "candidates" / name / "model" for name in stage.parts(kind)}
    places = {one.name: parts.get(one.name) or inputs.path(one.name) for one in stage.references()}
    seen = Seen(stage, home, places)
    said = io.StringIO()

    def work(name: str, one: Stage, place: Path, places: dict[str, Path]) -> Work:
        log = MetricsLog(place / "metrics.jsonl")
        place.mkdir(parents=True, exist_ok=True)
        return Work(name, place, places, one.seed or 0, log, Progress(name, said), inputs.folder, resume)

    try:
        with watched(seen, fault, trained):
            for name, part in stage.parts(kind).items():
                named = {one.name: inputs.path(one.name) for one in part.references()}
                part.run(work(part_of(kind, name), part, home / "candidates" / name, named))
            seen.summary = stage.run(work(kind, stage, home, places))
    except NotTrained:
        pass
    finally:
        seen.said = said.getvalue()
    return seen


@contextmanager
def watched(seen: Seen, fault: str | None = None, trained: bool = True) -> Iterator[None]:
    """Note the trainers that run, their batches, passes and saved states, without changing any of them."""
    run, gradient = Trainer.run, Trainer._gradient
    save, clear, generate = Checkpoints.save, Checkpoints.clear, Engine.generate

    def noting_run(self: Trainer) -> dict[str, Any]:
        seen.trainers.append(self)
        seen.begun = seen.begun or {name: one.detach().clone() for name, one in self.named.items()}
        if not trained:
            self.make_ready()
            raise NotTrained
        rows, loss = self.batches.rows, self.objective.loss

        def noting_rows(step: int) -> list[PackedSequence]:
            found = rows(step)
            if len(seen.trainers) == 1:
                seen.batches.append(found)
            return found

        def noting_loss(model: Any, batch: Any) -> Any:
            seen.passes += 1
            seen.forwards.append(model)
            seen.fixed.add(torch.are_deterministic_algorithms_enabled())
            if torch.is_autocast_enabled(self.model.device.type):
                seen.multiplied.add(torch.get_autocast_dtype(self.model.device.type))
            return loss(model, batch)

        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.batches, "rows", noting_rows)
            inner.setattr(self.objective, "loss", noting_loss)
            return run(self)

    def noting_save(self: Checkpoints, step: int, *facts: Any, wait: bool) -> None:
        seen.saved.append(step)
        save(self, step, *facts, wait=wait)

    def noting_clear(self: Checkpoints) -> None:
        seen.cleared += [path.name for path in sorted(self.folder.glob("step-*"))]
        clear(self)

    def noting_generate(self: Engine, requests: Sequence[Request], *more: Any, **options: Any) -> Any:
        seen.asked += [list(one.prompt) for one in requests]
        return generate(self, requests, *more, **options)

    def failing_gradient(self: Trainer, rows: Any) -> Any:
        return gradient(self, rows)[0], float("nan")

    with pytest.MonkeyPatch.context() as patch:
        if fault == "gradient":
            patch.setattr(Trainer, "_gradient", failing_gradient)
        patch.setattr(Trainer, "run", noting_run)
        patch.setattr(Engine, "generate", noting_generate)
        patch.setattr(Checkpoints, "save", noting_save)
        patch.setattr(Checkpoints, "clear", noting_clear)
        yield


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether both hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def first_loss(seen: Seen, *, ended: bool = False) -> float:
    """The loss of the first step's batch, all of its terms, where training began or where it ended."""
    if ended:
        return loss_elsewhere(seen, seen.trainer.objective)
    with placed(seen, seen.begun):
        return _loss(seen, seen.trainer.objective, None)


def loss_elsewhere(
    seen: Seen, objective: Objective, *, noise: float | None = None, measure: str | None = None
) -> float:
    """What an objective makes of the first batch where training ended, or at some distance from its start."""
    if noise is None:
        return _loss(seen, objective, measure)
    generator = torch.Generator().manual_seed(0)
    moved = {
        name: one
        + noise * max(float(one.std(correction=0)), 0.02) * torch.randn(one.shape, generator=generator)
        for name, one in seen.begun.items()
    }
    with placed(seen, moved):
        return _loss(seen, objective, measure)


def _loss(seen: Seen, objective: Objective, measure: str | None) -> float:
    trainer = seen.trainer
    found = objective.loss(trainer.model, collate(seen.batches[0], trainer.model.device))
    if measure is not None:
        total, weight = found.metrics[measure]
        return float(total) / float(weight)
    return float(found.sum.detach()) / objective.weight(seen.batches[0])


def mean_over_learned(seen: Seen, measure: Callable[[Tensor], Tensor]) -> float:
    """The weighted mean over the first step's tokens of a measure of the logits [tokens, vocabulary]."""
    model = seen.trainer.model
    with placed(seen, seen.begun), torch.no_grad():
        batch = collate(seen.batches[0], model.device)
        logits = model.logits(model(batch.tokens, Documents(batch.lengths, batch.tokens.device)))
        return float((measure(logits) * batch.weights).sum() / batch.weights.sum())


@contextmanager
def placed(seen: Seen, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside the block, what is trained has these weights."""
    ended = {name: one.detach().clone() for name, one in seen.trainer.named.items()}
    _put(seen, weights)
    yield
    _put(seen, ended)


@torch.no_grad()
def _put(seen: Seen, weights: Mapping[str, Tensor]) -> None:
    for name, one in seen.trainer.named.items():
        one.copy_(weights[name])
