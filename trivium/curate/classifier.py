"""A quality classifier: a linear model over hashed word n-grams, or over a language model's hidden states.

The score of a text with features x is sigmoid(w · x + b). For n-grams (Joulin et al. 2017 without the hidden
layer), x counts every word and pair of words in one of `buckets` places, divided by the root of their
number, so that long texts are not surer for being long. For hidden states, x is their mean over the text
(FineWeb-Edu's way: a frozen encoder with a linear head). Cross-entropy against labels in [0, 1] with an L2
penalty is convex and small, so L-BFGS finds its minimum; there is nothing to schedule or to seed. Platt
scaling (1999) on held-out texts then makes scores probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trivium.curate.characters import Characters
from trivium.kit import machine
from trivium.kit.errors import TriviumError
from trivium.kit.files import load_tensors, read_object, save_tensors, write_json
from trivium.model.attention import Documents
from trivium.model.folder import load_model
from trivium.tokens.tokenizer import Tokenizer

Features = Literal["ngrams", "hidden"]
_WEIGHTS, _FACTS, _MODEL = "classifier.safetensors", "classifier.json", "model"
_ITERATIONS = 60
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Grams:
    """Hashed n-grams: their buckets [grams], where each text's begin, and 1/root of their number [texts]."""

    buckets: Tensor
    starts: Tensor
    scale: Tensor

    def dot(self, weights: Tensor) -> Tensor:
        """w · x, [texts]."""
        summed = torch.nn.functional.embedding_bag(self.buckets, weights[:, None], self.starts, mode="sum")
        return summed[:, 0] * self.scale


def grams_of(texts: Sequence[str], sizes: Sequence[int], buckets: int) -> Grams:
    """The n-grams of texts, words folded to lower case."""
    words = Characters(texts).folded_words(True)
    parts = [words.grams(size) for size in sizes]
    hashes = np.concatenate([hashes for hashes, _ in parts])
    documents = np.concatenate([words.documents[places] for _, places in parts])
    order = np.argsort(documents, kind="stable")
    places = (hashes[order] >> np.uint64(64 - buckets.bit_length() + 1)).astype(np.int64)
    counts = np.bincount(documents, minlength=len(texts))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    scale = 1 / np.sqrt(np.maximum(counts, 1))
    return Grams(
        torch.from_numpy(places), torch.from_numpy(starts), torch.from_numpy(scale.astype(np.float32))
    )


@torch.no_grad()
def hidden_means(texts: Sequence[str], model: Any, tokenizer: Tokenizer) -> Tensor:
    """The mean last hidden state of every text's first tokens, [texts, width]."""
    longest = model.config.context
    rows = [ids[:longest] or [tokenizer.end_of_text_id] for ids in tokenizer.encode_batch(list(texts))]
    found: list[Tensor] = []
    group: list[list[int]] = []
    for place, row in enumerate(rows):
        group.append(row)
        if place == len(rows) - 1 or sum(map(len, group)) + len(rows[place + 1]) > _TOKENS_AT_ONCE:
            lengths = tuple(map(len, group))
            tokens = torch.tensor([one for ids in group for one in ids], device=model.device)
            hidden = model(tokens, Documents(lengths, tokens.device)).float()
            found += [part.mean(0).cpu() for part in hidden.split(lengths)]
            group = []
    return torch.stack(found)


def fit(products: Any, size: int, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """The weights [size] and bias that minimise mean cross-entropy plus `penalty` times the squared weights.

    `products(w)` is w · x of every text; `targets` lie in [0, 1].
    """
    weights = torch.zeros(size, requires_grad=True)
    share = targets.mean().clamp(1e-4, 1 - 1e-4)
    bias = torch.logit(share).detach().clone().requires_grad_(True)
    solver = torch.optim.LBFGS(
        [weights, bias], max_iter=_ITERATIONS, history_size=10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        scores = products(weights) + bias
        found = torch.nn.functional.binary_cross_entropy_with_logits(scores, targets)
        found = found + penalty * weights.square().sum()
        found.backward()
        return found

    solver.step(loss)
    return weights.detach(), bias.detach()


@dataclass
class Classifier:
    """A fitted model: scores are calibrated probabilities, `scale` says what numbers the labels were."""

    features: Features
    weights: Tensor
    bias: float
    slope: float = 1.0
    offset: float = 0.0
    sizes: tuple[int, ...] = (1, 2)
    scale: tuple[float, float] = (0.0, 1.0)
    folder: Path | None = None
    """Where the language model lies, for hidden states."""

    def raw(self, texts: Sequence[str]) -> np.ndarray:
        """w · x + b, before calibration, [texts]."""
        if self.features == "ngrams":
            found = grams_of(texts, self.sizes, len(self.weights)).dot(self.weights)
        else:
            assert self.folder is not None
            model, tokenizer = _language_model(str(self.folder))
            found = hidden_means(texts, model, tokenizer) @ self.weights
        return found.numpy().astype(np.float64) + self.bias

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """How good each text is, from 0 to 1, [texts]."""
        if not len(texts):
            return np.empty(0)
        return 1 / (1 + np.exp(-np.clip(self.slope * self.raw(texts) + self.offset, -60, 60)))

    def calibrate(self, raw: np.ndarray, targets: np.ndarray) -> None:
        """Platt scaling: the slope and offset that make held-out scores probabilities."""
        values = torch.tensor(raw, dtype=torch.float32)
        centre, spread = values.mean(), values.std().clamp(min=1e-6)
        normal = (values - centre) / spread
        slope, offset = fit(lambda w: normal * w[0], 1, torch.tensor(targets, dtype=torch.float32), 1e-4)
        self.slope = float(slope[0] / spread)
        self.offset = float(offset - slope[0] * centre / spread)

    def save(self, folder: Path) -> None:
        """Write it to a folder; for hidden states the folder holds the language model, too."""
        save_tensors(folder / _WEIGHTS, {"weights": self.weights})
        facts = {
            "features": self.features, "bias": self.bias, "slope": self.slope, "offset": self.offset,
            "sizes": list(self.sizes), "scale": list(self.scale),
        }  # fmt: skip
        write_json(folder / _FACTS, facts)

    @classmethod
    def load(cls, folder: Path) -> Classifier:
        """Read what `save` wrote."""
        if not (folder / _FACTS).is_file():
            raise TriviumError(f"{folder} is no quality classifier; name a stage of kind quality_classifier.")
        facts = read_object(folder / _FACTS)
        return cls(
            facts["features"], load_tensors(folder / _WEIGHTS)["weights"], facts["bias"], facts["slope"],
            facts["offset"], tuple(facts["sizes"]), tuple(facts["scale"]), folder / _MODEL,
        )  # fmt: skip


@lru_cache(1)
def _language_model(folder: str) -> tuple[Any, Tokenizer]:
    model = load_model(Path(folder), dtype=torch.float32, device=machine.device())
    return model.requires_grad_(False).eval(), Tokenizer.load(Path(folder))


@lru_cache(2)
def loaded(folder: str) -> Classifier:
    """A classifier, read once in a process."""
    return Classifier.load(Path(folder))


def train(
    texts: Sequence[str], targets: np.ndarray, *, features: Features, buckets: int, sizes: tuple[int, ...],
    penalty: float, model: Path | None = None,
) -> Classifier:  # fmt: skip
    """Fit a classifier to texts and their targets in [0, 1]."""
    goal = torch.tensor(targets, dtype=torch.float32)
    if features == "ngrams":
        grams = grams_of(texts, sizes, buckets)
        weights, bias = fit(grams.dot, buckets, goal, penalty)
        return Classifier("ngrams", weights, float(bias), sizes=sizes)
    assert model is not None
    states = hidden_means(texts, *_language_model(str(model)))
    centre, spread = states.mean(0), states.std(0).clamp(min=1e-6)
    normal = (states - centre) / spread
    weights, bias = fit(lambda w: normal @ w, normal.shape[1], goal, penalty)
    weights = weights / spread
    return Classifier("hidden", weights, float(bias - centre @ weights), folder=model)


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """How often a good text scores above another one, ties counted half; NaN without both kinds."""
    positives = int(good.sum())
    negatives = len(good) - positives
    if not positives or not negatives:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return float((ranks[inverse][good].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _agreement(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The share on which two verdicts agree, and Cohen's kappa: the same with chance taken off."""
    same = float((one == other).mean())
    chance = float(one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean()))
    return {"agreement": same, "kappa": (same - chance) / (1 - chance) if chance < 1 else 1.0}


def report(
    texts: Sequence[str], ids: Sequence[str], scores: np.ndarray, targets: np.ndarray
) -> dict[str, Any]:
    """What a classifier is worth on texts it has not seen: AUC, precision, recall, calibration, mistakes."""
    good = targets >= 0.5
    thresholds = []
    for threshold in np.linspace(0.1, 0.9, 9):
        chosen = scores >= threshold
        hits = int((chosen & good).sum())
        thresholds.append({
            "threshold": round(float(threshold), 2),
            "kept": float(chosen.mean()),
            "precision": hits / int(chosen.sum()) if chosen.any() else None,
            "recall": hits / int(good.sum()) if good.any() else None,
        })  # fmt: skip
    bins = []
    for low in np.arange(0, 1, 0.1):
        inside = (scores >= low) & (scores < low + 0.1 + (low > 0.85))
        if inside.any():
            bins.append({"said": float(scores[inside].mean()), "is": float(targets[inside].mean()),
                         "documents": int(inside.sum())})  # fmt: skip
    error = sum(abs(one["said"] - one["is"]) * one["documents"] for one in bins) / max(len(scores), 1)
    worst = np.argsort(-np.abs(scores - targets), kind="stable")[:20]
    return {
        "documents": len(scores),
        "auc": auc(scores, good),
        "correlation": float(np.corrcoef(scores, targets)[0, 1]) if scores.std() and targets.std() else None,
        **_agreement(scores >= 0.5, good),
        "thresholds": thresholds,
        "calibration": bins,
        "calibration_error": error,
        "disagreements": [
            {"id": ids[place], "score": float(scores[place]), "label": float(targets[place]),
             "text": texts[place][:600]}
            for place in worst
        ],
    }  # fmt: skip
