"""The quality classifier stage: learn from labelled texts which documents are worth training on."""

import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from trivium.curate.batch import Batch, arrow, strings
from trivium.curate.classifier import Classifier, Features, report, train
from trivium.curate.step import WholeStep, parse_steps
from trivium.data.door import documents
from trivium.data.settings import Sources
from trivium.data.sources import Document, Reading
from trivium.kit.errors import TriviumError
from trivium.kit.files import whole_folder, write_json
from trivium.kit.numbers import Count
from trivium.kit.steps import read_steps
from trivium.model.hub import resolve
from trivium.stages.parts.documents import source_references
from trivium.stages.parts.judge_labels import PAIRS, LabelJudge, judge_labels
from trivium.stages.parts.stage import Product, Reference, Stage, Work

_FEWEST = 20
_SPEED_TEST = 2000


@dataclass
class _Labelled:
    """Texts with their ids and labels, the scale where it is known, and what is said of a judge."""

    texts: list[str]
    ids: list[str]
    labels: np.ndarray
    scale: tuple[float, float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)


class QualityClassifier(Stage):
    """Fit a small classifier to labels, calibrate it, and report what it is worth on held-out texts."""

    kind: Literal["quality_classifier"]
    """Train a quality classifier."""
    version: ClassVar[int] = 1
    produces: ClassVar[Product] = "classifier"

    data: Sources
    """Labelled texts; with `against`, the good ones."""
    label: str = "score"
    """The column with the label, a number; the higher the better."""
    labels: Literal["column", "rules", "contrast"] | dict[str, Any] = "column"
    """Where labels come from: `label`, what `rules` keep, `data` (good) against `against`, or a model that
    scores texts: `{judge: {model: ..., rubric: education, rows: 500}}`, or `endpoint` in place of `model`."""
    rules: list[str | dict[str, Any]] = Field(default=[{"filters": "gopher"}])
    """Steps of curation: what they keep is good."""
    against: Sources | None = None
    """The other corpus: texts that are not good."""
    scale: tuple[float, float] | None = None
    """The lowest and the highest label, for instance [0, 5]; those found where it is left out."""
    model: str | None = None
    """A model whose hidden states are read in place of n-grams: stronger, and slower."""
    ngrams: list[int] = Field(default=[1, 2], min_length=1, max_length=5)
    """How many words the n-grams have."""
    buckets: int = Field(default=1 << 18, ge=1 << 10, le=1 << 26)
    """Weights that n-grams share by their hash, a power of two."""
    penalty: float = Field(default=1e-5, ge=0)
    """How much large weights cost."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """The share of texts that calibrates and judges, half each."""
    shuffled: bool = False
    """Shuffle the labels to learn from: a control that must fail."""
    documents: Count = Field(default=100_000, ge=20)
    """Learn from at most so many texts."""

    @field_validator("labels", mode="before")
    @classmethod
    def _known_judge(cls, labels: Any) -> Any:
        return _judge(labels).written() if isinstance(labels, dict) else labels

    @model_validator(mode="after")
    def _labels_are_there(self) -> Self:
        if (self.labels == "contrast") != (self.against is not None):
            raise ValueError("`labels: contrast` and `against` belong together: write both or neither")
        if self.buckets & (self.buckets - 1):
            raise ValueError("`buckets` has to be a power of two, such as 262144")
        if self.scale is not None and self.scale[0] >= self.scale[1]:
            raise ValueError("`scale` is the lowest label, then the highest")
        for step in parse_steps(self.rules):
            if isinstance(step, WholeStep) or step.needs_raw or step.mentions():
                raise ValueError(
                    f"`rules` are steps that judge one text by itself, which `{step.name}` does not"
                )
        return self

    def references(self) -> list[Reference]:
        """`data` and `against` are documents, `model` is read."""
        found = source_references("data", self.data)
        if self.against is not None:
            found += source_references("against", self.against)
        judge = self._asked
        if judge is not None and judge.model is not None:
            found.append(Reference("labels.judge.model", judge.model, ("model",)))
        return found + ([Reference("model", self.model, ("model",))] if self.model is not None else [])

    @property
    def _asked(self) -> LabelJudge | None:
        return _judge(self.labels) if isinstance(self.labels, dict) else None

    @property
    def asks(self) -> str | None:
        """The model that judges, where it is one of ours."""
        return None if self._asked is None else self._asked.model

    def judging(self, documents: int, characters: float, known: float) -> dict[str, float]:
        """What a judge costs at most, if `known` is the share of documents that try it."""
        if self._asked is None:
            return {}
        tried = min(round(known * documents), 2 * PAIRS)
        return self._asked.estimate(min(documents, self._asked.rows + tried), characters)

    def counted(self) -> dict[str, Any]:
        """How fast a judge is asked, and what it costs, changes no label."""
        judge = self._asked
        return super().counted() | ({} if judge is None else {"labels": {judge.name: judge.counted()}})

    def check_machine(self) -> None:
        if self._asked is not None and self._asked.endpoint is not None:
            self._asked.endpoint.key()

    def run(self, work: Work) -> dict[str, Any]:
        """Read the labels, fit, calibrate on one half of what is held out, and judge on the other."""
        labelled = self._labelled(work)
        texts, ids, labels = labelled.texts, labelled.ids, labelled.labels
        scale = self.scale or labelled.scale or (float(labels.min()), float(labels.max()))
        if scale[0] == scale[1]:
            raise TriviumError(
                f"{work.stage}: every text has the label {scale[0]:g}; it needs texts of both kinds."
            )
        targets = np.clip((labels - scale[0]) / (scale[1] - scale[0]), 0, 1)
        # By the text, so that copies of one do not stand on both sides.
        place = np.array([_chance(work.seed, text) for text in texts])
        held, judged = place < self.held_out, place < self.held_out / 2
        for part, rows in (("train on", ~held), ("hold out", judged), ("calibrate on", held & ~judged)):
            if len(set((targets[rows] >= 0.5).tolist())) < 2:
                raise TriviumError(
                    f"{work.stage}: the {int(rows.sum())} texts to {part} are all good or all not; "
                    "give it more labelled texts, or another `scale`."
                )
        folder = None if self.model is None else resolve(str(work.path(self.model)))
        features: Features = "ngrams" if folder is None else "hidden"
        goal = targets[~held]
        if self.shuffled:
            goal = np.random.default_rng(work.seed).permutation(goal)
        started = time.perf_counter()
        found = train(
            _of(texts, ~held), goal, features=features, buckets=self.buckets,
            sizes=tuple(self.ngrams), penalty=self.penalty, model=folder,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        found.scale = scale
        found.calibrate(found.raw(_of(texts, held & ~judged)), targets[held & ~judged])
        facts = report(
            _of(texts, judged), _of(ids, judged), found.scores(_of(texts, judged)), targets[judged]
        )
        facts |= {"trained_on": int((~held).sum()), **labelled.facts}
        # What a clock says is no part of the product.
        times = {"seconds": round(seconds, 3), **self._speed(found, texts), **labelled.cost}
        with whole_folder(work.output("classifier")) as made:
            found.save(made)
            if folder is not None:
                shutil.copytree(folder, made / "model")
            write_json(made / "report.json", facts)
        work.say(f"AUC {facts['auc']:.3f} on {facts['documents']} held-out texts")
        return times | {
            name: value for name, value in facts.items() if name not in ("disagreements", "calibration")
        }

    def _labelled(self, work: Work) -> _Labelled:
        reading = Reading()
        found: list[tuple[str, str, float]] = []
        more: dict[str, Any] = {}
        if self.labels == "contrast":
            assert self.against is not None
            half = self.documents // 2
            for sources, label in ((self.data, 1.0), (self.against, 0.0)):
                some = _first(documents(work, sources, reading), half)
                found += [(one.text or "", one.id, label) for one in some if one.text]
        elif self.labels == "rules":
            read = [one for one in _first(documents(work, self.data, reading), self.documents) if one.text]
            kept = _kept_by(self.rules, [one.text or "" for one in read])
            found = [(one.text or "", one.id, float(good)) for one, good in zip(read, kept)]
        elif (judge := self._asked) is not None:
            read = [one for one in _first(documents(work, self.data, reading), self.documents) if one.text]
            judged = judge_labels(work, judge, read, self.label)
            found = [(one.text or "", one.id, label) for one, label in zip(judged.documents, judged.labels)]
            more = {"scale": judge.scale, "facts": {"judge": judged.facts}, "cost": judged.cost}
        else:
            for one in _first(documents(work, self.data, reading), self.documents):
                value = one.fields.get(self.label)
                if not isinstance(value, int | float) or not np.isfinite(value) or not one.text:
                    raise TriviumError(
                        f"{work.stage}: {one.id} needs a `text` and a number as `{self.label}`, not "
                        f"{value!r}; name the column with `label`, or say `labels: rules`."
                    )
                found.append((one.text, one.id, float(value)))
        if len(found) < _FEWEST:
            raise TriviumError(f"{work.stage}: {len(found)} labelled texts are too few; give it {_FEWEST}.")
        texts, ids, labels = zip(*found)
        return _Labelled(list(texts), list(ids), np.array(labels), **more)

    def _speed(self, found: Classifier, texts: list[str]) -> dict[str, float]:
        some = texts[:_SPEED_TEST]
        started = time.perf_counter()
        found.scores(some)
        passed = time.perf_counter() - started
        return {
            "documents_per_second": round(len(some) / passed, 1),
            "megabytes_per_second": round(sum(len(one.encode()) for one in some) / passed / 1e6, 2),
        }


def _judge(written: dict[str, Any]) -> LabelJudge:
    return read_steps([written], {LabelJudge.name: LabelJudge}, "[{judge: {model: teacher}}]")[0]


def _first(found: Iterator[Document], count: int) -> Iterator[Document]:
    for _, one in zip(range(count), found):
        yield one


def _of(values: list[str], rows: np.ndarray) -> list[str]:
    return [value for value, chosen in zip(values, rows) if chosen]


def _chance(seed: int, text: str) -> float:
    digest = hashlib.blake2b(f"{seed} {text}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _kept_by(rules: list[str | dict[str, Any]], texts: list[str]) -> list[bool]:
    """Which texts pass all these steps."""
    kept = [True] * len(texts)
    content = {
        "id": arrow.array(list(map(str, range(len(texts))))),
        "source": arrow.array([""] * len(texts)),
        "text": strings(texts),
    }
    batch = Batch(arrow.RecordBatch.from_pydict(content))
    for step in parse_steps(rules):
        step.check()
        found = step.run(batch)
        for place, reason in enumerate(found.reasons or []):
            kept[place] = kept[place] and reason is None
        if found.texts is not None:
            batch = batch.with_columns({"text": strings(found.texts)})
    return kept
